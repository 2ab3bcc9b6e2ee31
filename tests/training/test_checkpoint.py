"""Checkpoints: whole or not at all, verified, restored onto any mesh."""

from __future__ import annotations

import json
import re
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import NoRoom, UserError
from rlhf_jax.training import checkpoint
from rlhf_jax.training.checkpoint import (
    Checkpoints,
    load_document,
    load_params,
    save_params,
    verify,
)
from rlhf_jax.training.mesh import make_mesh
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.state import init_state
from tests.training import model


def make_state(seed=0, mesh=None, name="muon", **options):
    optimizer, _ = make_optimizer({"name": name, "freeze": ("lm_head",)}, 10)
    return init_state(model.init(seed), optimizer, mesh=mesh, **options)


def equal(a, b):
    return jax.tree.all(
        jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)
    )


@pytest.fixture
def checkpoints(tmp_path):
    said = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", report=said.append)
    checkpoints.said = said
    yield checkpoints
    checkpoints.close()


def save(checkpoints, step, state=None):
    state = make_state(step) if state is None else state
    checkpoints.save(step, state, {"next_index": step}, {"tokenizer_hash": "t"})


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon"])
def test_everything_comes_back_bit_for_bit(checkpoints, name):
    state = make_state(3, name=name, ema=True)
    assert checkpoints.restore(state) is None
    save(checkpoints, 7, state)
    checkpoints.wait()
    restored = checkpoints.restore(make_state(4, name=name, ema=True))
    assert equal(restored.state, state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert restored.data == {"next_index": 7}
    assert restored.meta["step"] == 7 and restored.meta["tokenizer_hash"] == "t"
    assert restored.meta["versions"]["jax"] == jax.__version__
    assert not checkpoints.said


def test_the_state_may_be_donated_while_it_is_written(checkpoints):
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    state = {"x": jax.random.normal(jax.random.key(0), (4, 256, 1024))}
    expected = np.array(state["x"], copy=True)
    save(checkpoints, 1, state)
    for _ in range(3):
        state = {"x": overwrite(state["x"])}
    jax.block_until_ready(state)
    checkpoints.wait()
    np.testing.assert_array_equal(checkpoints.restore(state).state["x"], expected)


def test_a_save_waits_for_the_copy_and_not_for_the_disk(checkpoints, monkeypatch):
    seal, disk = checkpoint.seal, threading.Event()

    def slow(path):
        assert disk.wait(20)
        seal(path)

    monkeypatch.setattr(checkpoint, "seal", slow)
    state = make_state(1)
    kept = jax.tree.map(np.array, state)
    save(checkpoints, 1, state)
    assert checkpoints.steps() == []  # on its way
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # as the next step's donation does
    disk.set()
    checkpoints.wait()
    assert checkpoints.steps() == [1]
    assert equal(checkpoints.restore(make_state(2)).state, kept)


@pytest.mark.parametrize("sizes", [pytest.param((8, 1, 1), marks=pytest.mark.slow), (1, 2, 4)])
def test_a_checkpoint_goes_onto_another_mesh(checkpoints, sizes):
    state = make_state(1, mesh=make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    save(checkpoints, 1, state)
    checkpoints.wait()
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    for target in (make_state(2, mesh=mesh), make_state(2)):
        restored = checkpoints.restore(target).state
        assert equal(restored, state)
        jax.tree.map(
            lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim) or 1 / 0, restored, target
        )


def test_the_newest_ones_are_kept(checkpoints):
    for step in (1, 2, 3, 4):
        save(checkpoints, step)
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4]
    assert all(verify(checkpoints.directory / f"{s:08d}") is None for s in (3, 4))


def test_leftovers_go_and_damage_is_set_aside(checkpoints, tmp_path):
    for step in (1, 2):
        save(checkpoints, step)
    checkpoints.wait()
    (checkpoints.directory / "00000003.tmp" / "arrays").mkdir(parents=True)
    meta = checkpoints.directory / "00000002" / "meta.json"
    meta.write_text(meta.read_text() + " ")
    again = Checkpoints(checkpoints.directory, report=checkpoints.said.append)
    assert not (checkpoints.directory / "00000003.tmp").exists()
    assert again.restore(make_state()).meta["step"] == 1
    (said,) = checkpoints.said
    assert "00000002 is damaged (meta.json is not what was written)" in said
    assert again.steps() == [1]
    (checkpoints.directory / "00000001" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="no whole checkpoint is left"):
        again.restore(make_state())
    with pytest.raises(UserError, match="no whole checkpoint is left"):
        again.restore(make_state())
    again.close()


def test_a_checkpoint_under_another_name_is_not_the_newest(checkpoints):
    for step in (1, 2):
        save(checkpoints, step)
    checkpoints.wait()
    (checkpoints.directory / "00000001").rename(checkpoints.directory / "00000009")
    (checkpoints.directory / "30").mkdir()  # no name of ours
    assert checkpoints.restore(make_state()).meta["step"] == 2
    (said,) = checkpoints.said
    assert "00000009 is damaged (its meta.json is of step 1)" in said


OTHER_SHAPES = ("[]", "3", "null", '"x"', "{}", '{"a": 1, "a": 1}')


@pytest.mark.parametrize("name", ["manifest.json", "meta.json", "data.json"])
def test_documents_of_another_shape_are_named(checkpoints, name):
    for step in (1, 2):
        save(checkpoints, step)
    checkpoints.wait()
    path = checkpoints.directory / "00000002"
    whole = (path / name).read_text()
    for text in [*OTHER_SHAPES, whole[:-1], whole.replace(" ", "", 1)]:
        (path / name).write_text(text)
        assert name in verify(path), text
        if name == "meta.json" and text in OTHER_SHAPES:
            (path / "manifest.json").unlink()
            checkpoint.seal(path)  # with a manifest that says it must be so
            assert name in verify(path), text
    (path / name).write_text("[]")
    assert checkpoints.restore(make_state()).meta["step"] == 1


@pytest.mark.parametrize("name", ["manifest.json", "data.json"])
@pytest.mark.parametrize("text", OTHER_SHAPES)
def test_documents_of_final_parameters_of_another_shape_are_named(tmp_path, name, text):
    save_params(tmp_path, {"x": jnp.zeros(2)}, {"old": True})
    (tmp_path / name).write_text(text)
    for load in (load_params, load_document):
        with pytest.raises(UserError, match=name):
            load(tmp_path)


def test_a_newer_format_is_refused_by_name(checkpoints):
    save(checkpoints, 1)
    checkpoints.wait()
    path = checkpoints.directory / "00000001" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 2}))
    with pytest.raises(UserError, match="has format 2; this version of rlhf_jax reads 1"):
        checkpoints.restore(make_state())


def test_arrays_that_do_not_fit_are_named(checkpoints):
    save(checkpoints, 1, {"a": jnp.zeros(2), "b": jnp.zeros(3)})
    checkpoints.wait()
    with pytest.raises(UserError, match=r"does not fit: b is \('float32', \(3,\)\) there"):
        checkpoints.restore({"a": jnp.zeros(2), "b": jnp.zeros(4)})
    with pytest.raises(UserError, match=r"b is .* there, absent here"):
        checkpoints.restore({"a": jnp.zeros(2)})


def test_other_versions_are_reported(checkpoints, monkeypatch):
    save(checkpoints, 1)
    checkpoints.wait()
    monkeypatch.setattr("rlhf_jax.training.checkpoint._version", lambda library: "0")
    checkpoints.restore(make_state())
    (said,) = checkpoints.said
    assert "the run goes on, but not bit for bit" in said


def full(*_):
    raise OSError(28, "No space left on device")


def test_a_full_disk_ends_a_run_once_a_second_save_fails(checkpoints, monkeypatch):
    save(checkpoints, 1)
    checkpoints.wait()
    takes = sum(512 * p.stat().st_blocks for p in checkpoints.directory.rglob("*") if p.is_file())
    with monkeypatch.context() as disk:
        disk.setattr("rlhf_jax.training.checkpoint.seal", full)
        save(checkpoints, 2)
        while not checkpoints.lacks_room:
            time.sleep(0.01)
        save(checkpoints, 3)
        (said,) = checkpoints.said
        with pytest.raises(NoRoom) as raised:
            checkpoints.wait()
    for text, name in ((said, "00000002"), (str(raised.value), "00000003")):
        path = re.escape(str(checkpoints.directory))
        numbers = re.search(
            rf"no room for {path}/{name} \(No space left on device\): "
            rf"(\d+) bytes needed, (\d+) free in {path};",
            text,
        )
        assert numbers and int(numbers[1]) >= takes
    assert [p.name for p in checkpoints.directory.iterdir()] == ["00000001"]
    save(checkpoints, 4)  # once there is room
    checkpoints.wait()
    assert checkpoints.restore(make_state()).meta["step"] == 4


def test_a_save_that_is_waited_for_is_tried_twice(checkpoints, monkeypatch):
    seal, failing = checkpoint.seal, [True, False, True, True]

    def sometimes(path):
        full() if failing.pop(0) else seal(path)

    monkeypatch.setattr(checkpoint, "seal", sometimes)
    checkpoints.save(1, make_state(1), {}, {}, wait=True)
    assert checkpoints.steps() == [1] and len(checkpoints.said) == 1
    with pytest.raises(NoRoom):
        checkpoints.save(2, make_state(2), {}, {}, wait=True)
    assert [p.name for p in checkpoints.directory.iterdir()] == ["00000001"]


def test_what_late_writes_of_a_failed_save_leave_is_removed(checkpoints, monkeypatch):
    """TensorStore's threads make a directory again that was removed under them."""
    late: list[threading.Thread] = []

    def fail_with_writes_on_their_way(path):
        def write():
            for _ in range(6):
                time.sleep(0.1)
                (path / "arrays").mkdir(parents=True, exist_ok=True)

        late.append(threading.Thread(target=write))
        late[-1].start()
        full()

    monkeypatch.setattr(checkpoint, "seal", fail_with_writes_on_their_way)
    save(checkpoints, 1)
    checkpoints.wait()
    assert list(checkpoints.directory.iterdir()) == []
    late[0].join()
    assert list(checkpoints.directory.iterdir()) == []


def test_saves_that_fail_for_another_reason_end_a_run_the_third_time(checkpoints, monkeypatch):
    def broken(path):
        raise OSError(5, "Input/output error")

    save(checkpoints, 1)
    checkpoints.wait()
    monkeypatch.setattr("rlhf_jax.training.checkpoint.seal", broken)
    for step in (2, 3):
        save(checkpoints, step)
        checkpoints.wait()
        assert "Input/output error" in checkpoints.said[-1]
    save(checkpoints, 4)
    with pytest.raises(UserError, match="3 in a row, the older ones are intact"):
        checkpoints.wait()
    assert [p.name for p in checkpoints.directory.iterdir()] == ["00000001"]
    assert checkpoints.restore(make_state()).meta["step"] == 1


def test_final_parameters_for_which_there_is_no_room_leave_the_older_ones(tmp_path, monkeypatch):
    save_params(tmp_path / "params", model.init(5), {"old": True})
    monkeypatch.setattr("rlhf_jax.training.checkpoint.seal", full)
    with pytest.raises(NoRoom, match=r"params \(No space left on device\): \d+ bytes needed"):
        save_params(tmp_path / "params", model.init(6), {})
    assert [p.name for p in tmp_path.iterdir()] == ["params"]
    assert load_params(tmp_path / "params")[1] == {"old": True}


def test_final_parameters(tmp_path):
    params = model.init()
    save_params(tmp_path / "params", model.init(5), {"old": True})
    save_params(tmp_path / "params", params, {"model": {"width": 16}, "tokenizer_hash": "t"})
    for mesh in (None, make_mesh({"fsdp": 4, "tensor": 2})):
        loaded, document = load_params(tmp_path / "params", mesh=mesh)
        assert equal(loaded, params)
        assert jax.tree.structure(loaded) == jax.tree.structure(params)
        assert document == {"model": {"width": 16}, "tokenizer_hash": "t"}
    assert loaded["lm_head"]["kernel"].addressable_shards[0].data.shape == (4, 16)
    assert [p.name for p in tmp_path.iterdir()] == ["params"]
    (tmp_path / "params" / "data.json").unlink()
    with pytest.raises(UserError, match=r"data\.json is missing"):
        load_params(tmp_path / "params")
    with pytest.raises(UserError, match="no such directory"):
        load_params(tmp_path / "nothing")

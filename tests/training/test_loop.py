"""The loop: what it logs, when it evaluates, and how it ends."""

from __future__ import annotations

import errno
import json
import os
import signal
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.errors import NoRoom, Preempted, UserError
from rlhf_jax.training import loop, progress
from rlhf_jax.training.mesh import make_mesh
from rlhf_jax.training.metrics import read_metrics
from rlhf_jax.training.rundir import RunDirectory
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_step
from tests.training import model


def train(
    directory, *, alter=lambda index, batch: batch, steps=7, batches=None, rate=0.1, **options
):
    optimizer = optax.sgd(rate)
    options = {"log_every": 3, "checkpoint_every": 100, "tensorboard": False} | options
    with RunDirectory(directory, {"train": {"log_every": options["log_every"]}}) as run:
        state = init_state(model.init(), optimizer)
        step = make_step(model.loss_fn, optimizer)
        batches = batches or model.Batches(alter)
        return start(run, state, step, batches, steps=steps, **options)


def start(run, state, step, batches, evaluation=lambda state: {}, **options):
    """`Loop.train` of options that are all named alike."""
    own = ("mesh", "clock", "tokenizer_hash", "ends")
    others = {name: options.pop(name) for name in own if name in options}
    section = loop.Train(**{"checkpoint_minutes": 0.0} | options)
    return loop.Loop(section, run, step, batches, evaluation, **others).train(state)


def test_lines_hold_means_since_the_line_before_and_evaluations(tmp_path):
    seen = []

    def evaluation(state):
        seen.append(int(state.step))
        return {"eval/twice": 2.0 * int(state.step)}

    state, rates = train(tmp_path, eval_every=2, evaluation=evaluation)
    assert int(state.step) == 7
    assert seen == [2, 4, 6, 7]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 7]
    assert [line.get("eval/twice") for line in lines] == [4, None, 8, 12, 14]

    optimizer = optax.sgd(0.1)
    state, step = init_state(model.init(), optimizer), make_step(model.loss_fn, optimizer)
    own = {}
    for number in range(1, 8):
        state, metrics = step(state, model.make_batch(number))
        own[number] = {name: float(value) for name, value in metrics.items()}
    means = ("train/loss", "train/accuracy", "logps/chosen")
    for line, window in zip(lines, [(1, 2), (3,), (4,), (5, 6), (7,)], strict=True):
        weights = [own[n]["train/weight"] for n in window]
        assert len(set(weights)) == len(weights)
        for name, value in own[window[-1]].items():
            if name in means:
                value = np.average([own[n][name] for n in window], weights=weights)
            np.testing.assert_allclose(line[name], value, rtol=1e-12, err_msg=name)
        if len(window) == 1:
            assert all(line[name] == own[window[0]][name] for name in means)

    assert set(rates) == {"train/steps_per_second", "train/tokens_per_second"}


def test_a_checkpoint_from_before_means_were_kept_resumes(tmp_path, monkeypatch):
    meta = loop.Loop._meta
    monkeypatch.setattr(loop.Loop, "_meta", lambda self: meta(self) | {"means": None})
    train(tmp_path, steps=4)
    train(tmp_path, steps=7)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 4, 6, 7]


def test_speed_counts_tokens_that_are_not_padding(tmp_path):
    _, rates = train(tmp_path, clock=progress.Clock(10.0), log_every=1)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    for line, number in zip(lines, range(1, 8), strict=True):
        tokens = int(model.make_batch(number)["segment_ids"].sum())
        seconds = line["time/step_seconds"]
        np.testing.assert_allclose(line["time/tokens_per_second"], tokens / seconds)
        np.testing.assert_allclose(line["time/flops_per_second"], 10 * tokens / seconds)
        assert 0 <= line["time/data_share"] <= 1.1
    np.testing.assert_allclose(
        rates["train/flops_per_second"], 10 * rates["train/tokens_per_second"]
    )


def test_a_run_that_is_done_is_not_run_again(tmp_path):
    state, _ = train(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()

    def never(index, batch):
        raise AssertionError

    again, rates = train(tmp_path, alter=never)
    jax.tree.map(np.testing.assert_array_equal, state.params, again.params)
    assert (tmp_path / "metrics.jsonl").read_text() == before
    assert rates == {}


def test_updates_that_are_skipped_in_a_row_end_the_run_naming_rows(tmp_path):
    def alter(index, batch):
        if index >= 4 or index == 2:
            batch["weights"][3, 0] = np.nan
        return batch

    message = r"steps 4 to 6 .*row_ids of the data, by step: {4: \[64, .*, 5: \[80, .*, 6: \[96, "
    with pytest.raises(UserError, match=message):
        train(tmp_path, alter=alter, steps=20, max_skipped=3)


def no_weight(index, batch):
    return batch | {"weights": np.zeros_like(batch["weights"])}


@pytest.mark.parametrize(
    "changes, message",
    [
        # Every update is infinite; its loss and gradient are not.
        ({"rate": 1e30}, r"steps 1 to 3 end in 3 .* Lower optimizer\.learning_rate$"),
        # The first one is finite, and nothing after it.
        ({"rate": 1e18}, r"steps 2 to 4 .* as the parameters\. Lower optimizer\.learning_rate$"),
        ({"alter": no_weight}, r"steps 1 to 3 .* nothing in them has weight.*row_ids.*1: \[16,"),
    ],
)
def test_the_cause_of_skipped_updates_is_named(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path, steps=20, max_skipped=3, **changes)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"train/updates": 4}, r"steps 8 to 9 end in 6 .* the loss is not finite.*9: \[90\]"),
        ({"train/updates": 6}, r"steps 9 to 9 "),
        ({"train/updates": 6, "advantages/max": np.inf}, r"advantages of inf .*scores = 7\)"),
        ({"train/updates": 6, "advantages/max": 1e25}, r"advantages of 1e\+25 .*scores = 7\)"),
        ({"train/loss": 1, "train/grad_norm": np.inf}, r"the gradient is not finite\. Look at"),
        ({"train/weight": 0, "rewards/failures": 8}, r"no.* weight \(rewards/failures = 8\)\. Lo"),
        ({"train/weight": 0, "tools/failures": 8}, r"no.* weight \(tools/failures = 8\)\. Lo"),
        (
            {"train/consecutive_skipped": 0, "val/consecutive_skipped": 6, "loss/value_avg": 1},
            r"the update is not\. Lower critic\.learning_rate$",
        ),
    ],
)
def test_the_cause_is_told_from_the_metrics_of_a_step_of_several_updates(tmp_path, values, message):
    values = {
        "train/consecutive_skipped": 6, "train/loss": np.nan, "train/weight": 1,
        "objective/kl": 0.5, "objective/scores": 7, "val/grad_norm": 1,
    } | values  # fmt: skip

    def row(index, batch):
        return {"segment_ids": np.ones(1), "row_ids": np.array([10 * index])}

    def step(state, batch):
        found = values if batch["row_ids"] == 90 else {"train/consecutive_skipped": 0}
        return state, {name: np.float32(value) for name, value in found.items()}

    with RunDirectory(tmp_path, {}) as run, pytest.raises(UserError, match=message):
        start(
            run, {}, step, model.Batches(row), steps=9, max_skipped=6, checkpoint_every=99,
            tensorboard=False,
        )  # fmt: skip


@pytest.mark.parametrize("full", [3, 4, 7])
def test_lines_without_room_are_kept_with_the_state(tmp_path, monkeypatch, full):
    """Of a step, of one that is evaluated, of the last."""
    options = {"log_every": 1, "eval_every": 2}
    options |= {"evaluation": lambda state: {"eval/step": int(state.step)}}
    train(tmp_path / "whole", **options)
    write = os.write

    def limited(file, data):
        if json.loads(bytes(data))["step"] >= full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    with monkeypatch.context() as disk:
        disk.setattr(os, "write", limited)
        with pytest.raises(NoRoom, match=r"metrics\.jsonl"):
            train(tmp_path / "run", **options)
        (saved,) = os.listdir(tmp_path / "run" / "checkpoints")
        assert full <= int(saved) <= full + 2
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == full - 1
        with pytest.raises(NoRoom, match=r"metrics\.jsonl"):
            train(tmp_path / "run", **options)  # still full
    train(tmp_path / "run", **options)
    whole, again = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "run"))
    for line in (*whole, *again):
        for name in [name for name in line if name.startswith("time/")]:
            del line[name]
    assert again == whole


def test_data_that_ends_early_is_a_user_error(tmp_path):
    class Short(model.Batches):
        def __next__(self):
            if self._next == 3:
                raise StopIteration
            return super().__next__()

    with pytest.raises(UserError, match="the data ended after 3 of 7 steps"):
        train(tmp_path, batches=Short())


@pytest.mark.parametrize("error", [Preempted("at a stop_point"), UserError("the reward raised")])
@pytest.mark.parametrize("asked", [True, False])
def test_a_step_that_is_given_up_leaves_the_one_before(tmp_path, error, asked):
    """Its batch is the next one when the run goes on; a whole run writes the same lines."""
    optimizer = optax.sgd(0.1)
    options = {"log_every": 3, "tensorboard": False, "steps": 7}

    def begin(directory, fails):
        compiled = make_step(model.loss_fn, optimizer)

        def step(state, batch):
            if fails and int(state.step) == 4:
                if asked:
                    os.kill(os.getpid(), signal.SIGTERM)
                raise error
            return compiled(state, batch)

        with RunDirectory(directory, {}) as run:
            state = init_state(model.init(), optimizer)
            return start(run, state, step, model.Batches(), **options)

    saved = "is saved at step 4; run the same command" if asked else str(error)
    expected = Preempted if asked else type(error)
    with pytest.raises(expected, match=saved):
        begin(tmp_path / "stopped", fails=True)
    assert [path.name for path in (tmp_path / "stopped/checkpoints").iterdir()] == ["00000004"]
    state, _ = begin(tmp_path / "stopped", fails=False)
    whole, _ = begin(tmp_path / "whole", fails=False)
    jax.tree.map(np.testing.assert_array_equal, state.params, whole.params)
    lines = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("stopped", "whole")]
    for ours, theirs in zip(*lines, strict=True):
        same = {k: v for k, v in ours.items() if not k.startswith("time/")}
        assert same == {k: v for k, v in theirs.items() if not k.startswith("time/")}


def test_a_step_that_has_changed_the_state_is_not_saved(tmp_path):
    optimizer = optax.sgd(0.1)
    compiled = make_step(model.loss_fn, optimizer)

    def step(state, batch):
        after = compiled(state, batch)
        if int(after[0].step) == 3:
            raise UserError("after the update")
        return after

    with RunDirectory(tmp_path, {}) as run, pytest.raises(UserError, match="after the update"):
        state = init_state(model.init(), optimizer)
        start(run, state, step, model.Batches(), steps=7, tensorboard=False)
    assert not [*(tmp_path / "checkpoints").iterdir()]


def test_another_evaluation_takes_the_place_of_the_older_one(tmp_path):
    def run(count):
        with RunDirectory(tmp_path, {"eval": {"count": count}}) as run:
            optimizer = optax.sgd(0.1)
            state, step = init_state(model.init(), optimizer), make_step(model.loss_fn, optimizer)
            batches, told = model.Batches(lambda index, batch: batch), {"eval/count": count}
            options = {"log_every": 3, "checkpoint_every": 2, "tensorboard": False, "steps": 5}
            start(run, state, step, batches, lambda state: told, eval_every=3, **options)
        lines = read_metrics(tmp_path / "metrics.jsonl")
        return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]

    first, same, other = run(8), run(8), run(9)
    assert first == same and [line["step"] for line in first] == [3, 5]
    without = {name: value for name, value in first[0].items() if name != "eval/count"}
    assert other == [without, first[1] | {"eval/count": 9}]
    kept = read_metrics(tmp_path / "metrics.1.jsonl")
    assert [line["eval/count"] for line in kept] == [8, 8] and run(9) == other
    assert not (tmp_path / "metrics.2.jsonl").exists()


def test_another_evaluation_that_was_killed_before_it_began_is_done(tmp_path):
    def evaluations(count):
        return {"eval_every": 2, "evaluation": lambda state: {"eval/count": count}}

    train(tmp_path, **evaluations(8))
    held = {"train": {"log_every": 3}}
    with RunDirectory(tmp_path, held | {"eval": {"count": 9}}):
        pass  # killed where the model is loaded
    with RunDirectory(tmp_path, held | {"eval": {"count": 9}}) as run:
        optimizer = optax.sgd(0.1)
        state, step = init_state(model.init(), optimizer), make_step(model.loss_fn, optimizer)
        options = {"log_every": 3, "checkpoint_every": 100, "tensorboard": False, "steps": 7}
        start(run, state, step, model.Batches(), **options, **evaluations(9))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line.get("eval/count") for line in lines] == [None, None, None, None, 9]


def test_an_evaluation_that_was_interrupted_is_done_again_and_its_line_once(tmp_path):
    def evaluations(fails):
        def evaluation(state):
            if fails == int(state.step):
                raise Preempted("at a stop_point")
            return {"eval/twice": 2.0 * int(state.step)}

        return {"eval_every": 2, "evaluation": evaluation, "checkpoint_every": 4}

    for at in (2, 4, 7):
        with pytest.raises(Preempted):
            train(tmp_path, **evaluations(fails=at))
    for _ in range(2):
        train(tmp_path, **evaluations(fails=None))
        lines = read_metrics(tmp_path / "metrics.jsonl")
        assert [line["step"] for line in lines] == [2, 3, 4, 6, 7]
        assert [line.get("eval/twice") for line in lines] == [4, None, 8, 12, 14]
    train(tmp_path / "whole", **evaluations(fails=None))
    whole = read_metrics(tmp_path / "whole/metrics.jsonl")
    for ours, theirs in zip(lines, whole, strict=True):
        assert {k for k in theirs if not k.startswith("time/")} <= ours.keys()
        assert all(ours[k] == v for k, v in theirs.items() if not k.startswith("time/"))


def test_checkpoints_by_time_begin_where_none_is_being_written(tmp_path, monkeypatch):
    clock, saved = [0.0], []
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(loop.Checkpoints, "writing", property(lambda self: len(saved) == 1))
    save = loop.Checkpoints.save

    def kept(self, step, *args, **options):
        saved.append(step)
        save(self, step, *args, **options)

    monkeypatch.setattr(loop.Checkpoints, "save", kept)

    def alter(index, batch):
        clock[0] += 40.0
        return batch

    train(tmp_path / "a", alter=alter, steps=9, checkpoint_minutes=2.0)
    assert saved == [3, 9]  # the one of 6 would have had to wait
    saved[:] = [0, 0]
    train(tmp_path / "b", alter=alter, steps=9, checkpoint_minutes=2.0, checkpoint_every=4)
    assert saved[2:] == [3, 4, 7, 8, 9]
    saved[:] = [0, 0]
    train(tmp_path / "c", alter=alter, steps=9)
    assert saved[2:] == [9]


def test_another_tokenizer_is_a_user_error(tmp_path):
    train(tmp_path, tokenizer_hash="a")
    with pytest.raises(UserError, match="tokenizer a, this is b"):
        train(tmp_path, tokenizer_hash="b")


def test_a_recompilation_for_known_shapes_is_reported(capsys):
    step = jax.jit(lambda state, batch: (state, batch["x"].sum()))
    guard = loop._Guard(step)

    def take(state, batch):
        batch = jax.device_put(batch)
        with guard.around(batch):
            step(state, batch)

    narrow, wide = {"x": np.zeros(3, np.float32)}, {"x": np.zeros(4, np.float32)}
    short, long = jnp.zeros(2), jnp.zeros(3)
    for batch in (narrow, wide, narrow, wide):
        take(short, batch)
    assert capsys.readouterr().out == ""
    take(long, narrow)
    assert "compiled again for batch shapes (('x', (3,), 'float32'),)" in capsys.readouterr().out


def test_training_does_not_recompile(tmp_path, capsys):
    train(tmp_path, checkpoint_every=2)
    train(tmp_path / "again", checkpoint_every=2, steps=3)
    assert "compiled again" not in capsys.readouterr().out


@pytest.mark.parametrize("axes", [None, {"data": 4, "fsdp": 2}])
def test_a_transfer_that_nobody_asked_for_is_an_error(tmp_path, axes):
    mesh = None if axes is None else make_mesh(axes)
    optimizer = optax.sgd(0.1)

    def begin(directory, shift):
        def loss_fn(params, batch, rng):
            (total, weight), metrics = model.loss_fn(params, batch, rng)
            return (total + params["shift"], weight), metrics

        step = make_step(loss_fn, optimizer, mesh=mesh, frozen={"shift": shift})
        state = init_state(model.init(), optimizer, mesh=mesh)
        with RunDirectory(directory, {}) as run:
            batches = model.Batches()
            start(run, state, step, batches, steps=3, mesh=mesh, tensorboard=False)

    there = None if mesh is None else NamedSharding(mesh, P())
    begin(tmp_path / "a", jax.device_put(np.float32(0), there))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        begin(tmp_path / "b", np.float32(0))


def test_waiting_for_data_is_seen(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    class Slow(model.Batches):
        def __next__(self):
            clock[0] += 0.03
            return super().__next__()

    def tokens(batch, metrics):
        clock[0] += 0.01
        return 7

    train(tmp_path, batches=Slow(), clock=progress.Clock(tokens=tokens), steps=8)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["time/data_share"] for line in lines] == pytest.approx([0.75] * 3)


def test_a_resumed_run_holds_one_state(tmp_path):
    train(tmp_path, steps=3)
    optimizer = optax.sgd(0.1)
    state = init_state(model.init(), optimizer)
    with RunDirectory(tmp_path, {"train": {"log_every": 3}}) as run:
        step = make_step(model.loss_fn, optimizer)
        after, _ = start(run, state, step, model.Batches(), steps=4, tensorboard=False)
    assert int(after.step) == 4
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_evaluations_and_checkpoints_take_no_training_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow(state):
        clock[0] += 0.5
        return {}

    def tokens(batch, metrics):
        clock[0] += 0.01
        return 7

    counting = progress.Clock(tokens=tokens)
    _, rates = train(tmp_path, eval_every=1, evaluation=slow, steps=5, clock=counting)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["time/step_seconds"] for line in lines] == pytest.approx([0.01] * 5)
    assert rates["train/steps_per_second"] == pytest.approx(100)
    assert rates["train/tokens_per_second"] == pytest.approx(700)


def test_a_run_ends_with_the_step_that_it_is_told_to_and_is_whole(tmp_path):
    def ends(step):
        return step >= 4

    state, _ = train(tmp_path, eval_every=2, evaluation=lambda state: {"eval/x": 1.0}, ends=ends)
    assert int(state.step) == 4
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 3, 4]
    seen = []
    again, _ = train(
        tmp_path, eval_every=2, evaluation=lambda state: seen.append(1) or {}, ends=ends
    )
    assert int(again.step) == 4 and not seen
    whole, _ = train(tmp_path / "whole", eval_every=2, evaluation=lambda state: {"eval/x": 1.0})
    assert int(whole.step) == 7

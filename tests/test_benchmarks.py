"""The benchmarks: what work costs, the table, and a round of our side at a small shape."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import before, ours, profile, readers, run, sweeps, work

TINY = work.SHAPES["tiny"]
REDUCED = work.Shape(2, 32, 2, 64, 96, 64, rows=2, steps=2)
LIMIT = work.Limit(flops=1e9, bytes=1e8)


def test_parameters_by_hand():
    layer = 4 * 256 * 256 + 3 * 256 * 688
    assert TINY.body_numbers == 4 * layer
    assert TINY.matrix_numbers == 4 * layer + 4096 * 256


def test_lengths_are_log_normal_within_the_context():
    lengths = work.lengths(10_000, 256)
    assert lengths.min() >= 16 and lengths.max() <= 256
    assert abs(np.median(lengths) - 0.45 * 256) < 3
    assert [len(ids) for ids in work.sequences(50, TINY)] == work.lengths(50, 256).tolist()


def test_pairs_share_their_prompt():
    for (prompt, chosen, rejected), ids in zip(
        work.pairs(20, TINY), work.sequences(20, TINY), strict=True
    ):
        assert [*prompt, *chosen] == [*ids, work.EOS]
        assert rejected[-1] == work.EOS and len(rejected) > 1
        assert min(prompt) >= work.FIRST


def test_flops_by_hand():
    shape = work.Shape(1, 2, 1, 3, 5, 8, rows=1, steps=1)
    body, head = 4 * 2 * 2 + 3 * 2 * 3, 2 * 5
    # Two answers of 2 tokens after a prompt of 4: each token sees what is before it, on the average
    # half of its own answer; 2 products of 2 · width a layer.
    seen = 4 * 4 / 2 + 2 * (2 * 4 + 2 * 2 / 2)
    expected = 2 * body * 8 + 2 * head * 4 + 4 * 2 * seen
    assert work.forward_flops(shape, 4, [2, 2]) == expected
    assert work.forward_flops(shape, 4, [2, 2], logits=False) == expected - 2 * head * 4


def test_decoding_is_bound_by_memory_or_by_products():
    one = LIMIT.decoding(TINY, 1, 1, 64, 128)
    prefill = work.forward_flops(TINY, 64, []) / LIMIT.flops
    read = 4 * (TINY.matrix_numbers + 2 * 4 * 256 * 128) / LIMIT.bytes
    np.testing.assert_allclose(one, prefill + 128 * read)
    fast_memory = dataclasses.replace(LIMIT, bytes=1e30)
    products = 2 * TINY.matrix_numbers + 4 * 4 * 256 * 128
    np.testing.assert_allclose(
        fast_memory.decoding(TINY, 1, 1, 64, 128), prefill + 128 * products / LIMIT.flops
    )


def test_least_seconds():
    full = work.least_seconds("pretrain", TINY, LIMIT)
    np.testing.assert_allclose(
        full, (6 * TINY.matrix_numbers + 6 * 4 * 256 * 256) / LIMIT.flops, rtol=1e-12
    )
    assert 0.9 * full < work.least_seconds("sft", TINY, LIMIT) < full
    assert work.least_seconds("reward", TINY, LIMIT) < work.least_seconds("dpo", TINY, LIMIT)
    twice = dataclasses.replace(LIMIT, flops=2 * LIMIT.flops, bytes=2 * LIMIT.bytes)
    for name in ("grpo", "ppo", "generate"):
        both = [work.least_seconds(name, TINY, each) for each in (LIMIT, twice)]
        np.testing.assert_allclose(both[0], 2 * both[1])


def result(row, ours, peer, **more):
    """Rounds with such rates, the limits at 1 GFLOP/s and 0.1 GB/s."""
    limit = [{"flops": LIMIT.flops, "bytes": LIMIT.bytes, "number": 4} for _ in ours]
    rates = {"ours": ours, "peer": peer}
    rounds = {k: [{"units": x, "seconds": 1.0} for x in v] for k, v in rates.items() if v}
    if row.work != "start":
        rounds["jax"] = limit
    return run.Result(row, rounds, ready=dict.fromkeys(rates, 7.0), **more)


def test_the_table():
    most = 1 / work.least_seconds("pretrain", TINY, LIMIT)
    row = run.Row("pretrain", "tiny", "tokens", 2.4)
    found = result(row, [most / 2, most / 2, most / 4], [most / 8] * 3)
    cells = dict(zip(run.HEADER, run.cells(found), strict=True))
    assert cells["ratio (spread)"] == "4.00× (2.00–4.00)"
    assert cells["possible"] == "8.0×"
    assert cells["of our limit"] == "50%"
    assert cells["target"] == "≥ 2.4×"
    assert cells["GFLOP/s, JAX / torch"] == "1"
    assert json.loads(json.dumps(dataclasses.asdict(found)))["row"]["work"] == "pretrain"


def test_the_table_without_a_peer_and_with_a_failure():
    row = run.Row("start", "tiny", "starts", 1.0)
    alone = result(row, [0.5], [])
    broken = result(row, [0.5], [], failed={"peer": "ImportError: no torch"})
    lines = run.table([alone, broken])
    assert lines[2].startswith("| start tiny | 2 s | not installed | – | ≥ 1.0× | – | – |")
    assert lines[3].startswith("| start tiny | 2 s | failed | – |")
    assert lines[-1] == "start tiny: peer failed: ImportError: no torch"


def test_a_side_that_fails_says_so_in_one_line():
    row = run.Row("pretrain", "tiny", "tokens", 2.4, both=("--no-such-word",))
    found = run.measure(row, {}, 1)
    assert found.rounds.keys() == {"jax"}
    assert "unrecognized arguments: --no-such-word" in found.failed["ours"]


def test_rows_are_named_apart():
    names = [row.name for row in run.ROWS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["pretrain", "sft", "dpo", "reward"])
def test_a_round_of_training(name):
    # One row an update, as SFT has it: then both are compiled once.
    shape = dataclasses.replace(REDUCED, rows=1) if name == "pretrain" else REDUCED
    round_ = ours.WORKS[name](shape)
    found = [round_() for _ in range(work.UPDATES // REDUCED.steps)]
    if name == "pretrain":
        assert found[0] == shape.steps * shape.rows * shape.context
    if name == "sft":  # as many tokens an update as the peer has in its sequences
        tokens = sum(map(len, work.sequences(work.UPDATES * REDUCED.rows, REDUCED)))
        np.testing.assert_allclose(sum(found), tokens, rtol=0.15)
    if name in ("dpo", "reward"):
        np.testing.assert_allclose(sum(found), work.UPDATES * work.PAIRS, rtol=0.15)


def test_a_round_of_generation():
    assert ours.WORKS["generate"](dataclasses.replace(REDUCED, context=256), batch=2)() == 256


@pytest.mark.slow
def test_a_round_of_grpo(monkeypatch):
    for name, value in {"GROUPS": 2, "GROUP": 2, "ANSWER": 4, "QUESTION": 8}.items():
        monkeypatch.setattr(work, name, value)
    assert ours.WORKS["grpo"](REDUCED)() == 1


@pytest.mark.slow
def test_a_round_of_ppo():
    assert ours.WORKS["ppo"](REDUCED)() == 1


def test_a_profile_knows_what_an_instruction_is():
    text = """
%inside (p: f32[2,2]) -> f32[2,2] {
  ROOT %dot.1 = f32[2,2]{1,0} dot(%p, %p), metadata={op_name="unused"}
}

ENTRY %main (p: f32[2,2]) -> f32[2,2] {
  %up.1 = f32[2,2]{1,0} fusion(%p), calls=%inside, metadata={op_name="jit(f)/_Block/mlp/up/dot"}
  %silu.1 = f32[2,2]{1,0} fusion(%p), calls=%other, metadata={op_name="jit(f)/_Block/mlp/mul"}
  %scores.1 = f32[2,2]{1,0} dot(%p, %p), metadata={op_name="jit(f)/_Block/attention/bhq/dot"}
  %joined.1 = f32[2,2]{1,0} dot(%p, %p), metadata={op_name="jit(f)/attention/query_key_value/dot"}
  %logits.1 = f32[2,2]{1,0} dot(%p, %p), metadata={op_name="jit(f)/cd,dv->cv/dot"}
  %copy.1 = f32[2,2]{1,0} copy(%p)
  %cached.1 = f32[2,2]{1,0} dot(%p, %p), lhs_batch_dims={0}, rhs_batch_dims={0}
  ROOT %adam.1 = f32[2,2]{1,0} fusion(%p), calls=%other, metadata={op_name="jit(f)/mul"}
}
"""
    found = profile.kinds(text)
    assert {name: found[name] for name in found if name not in ("dot.1",)} == {
        "up.1": "mlp: products with weights",
        "silu.1": "mlp: the rest",
        "scores.1": "attention: products of scores and values",
        "joined.1": "attention: products with weights",
        "logits.1": "vocabulary: products with weights",
        "copy.1": "copies",
        "cached.1": "attention: products of scores and values",
        "adam.1": "rest",
    }


def test_a_profile_counts_no_time_twice():
    events = [{"ts": 0.0, "dur": 10.0}, {"ts": 1.0, "dur": 4.0}, {"ts": 2.0, "dur": 1.0}]
    assert [time for _, time in profile.own_times(events)] == [6.0, 3.0, 1.0]


@pytest.mark.slow
def test_a_start_keeps_its_compilations_if_told_to(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    (row,) = [row for row in run.ROWS if row.name == "start tiny again"]
    found = run.measure(row, {}, 2)
    assert not found.failed and len(found.rounds["ours"]) == 2
    assert list(tmp_path.glob("compilations/*/jit_step-*-cache"))


def test_a_reader_is_the_same_off_or_refuses():
    wanted, notes = np.log([[0.25, 0.75], [0.5, 0.5]]), []
    same = {"logprobs": wanted.tolist()}
    assert readers.cell(same, wanted, notes) == "same"
    padded = {"logprobs": [[*row, -9.0] for row in wanted.tolist()]}  # the reader has more words
    assert readers.cell(padded, wanted, notes) == "same"
    off = {"logprobs": np.add(wanted, [[0, 0], [0, 0.25]]).tolist()}
    assert readers.cell(off, wanted, notes) == "**0.25 off**"
    assert [readers.cell({"refused": text}, wanted, notes) for text in "aba"] == [
        *("[1]", "[2]", "[1]"),
    ]
    assert notes == ["a", "b"]


def test_before_runs_the_first_command_of_both_checkouts_in_turns(monkeypatch, tmp_path):
    seconds = {run.ROOT: iter([4.0, 8.0]), tmp_path: iter([5.0, 16.0])}
    monkeypatch.setattr(before, "run_command", lambda root: next(seconds[root]))
    line = before.cells("first command", before.first_commands(tmp_path, 2))
    assert line[-1] == "1.625× (1.250–2.000)"


def test_before_takes_the_median_of_each_rounds_ratio():
    line = before.cells("sft tiny", [(2.0, 1.0), (3.0, 2.0), (9.0, 3.0)])
    assert line == ["sft tiny", "3", "2", "2.000× (1.500–3.000)"]


def test_a_sweep_is_compared_with_its_runs_on_all_workers():
    line = sweeps.cells("forks", 66.0, 90.5, [50.0, 30.0, 40.0])
    assert line == ["forks", "3", "66 s", "60 s", "1.10", "90 s"]

"""The GPU's benchmark runs at a reduced size on any machine; a part that fails costs one line."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from benchmarks import gpu


@pytest.mark.slow  # a minute of compiling
def test_every_part_runs_at_the_reduced_size(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert gpu.main(["--reduced", f"--out={out}"]) == 0
    lines = json.loads(out.read_text())["lines"]
    assert not [line for line in lines if "failed" in line]
    starts = ("limit: b", "limit: c", "SFT, row", "decoding", "GRPO, 2 ", "DPO, sha")
    assert tuple(line["name"][:8] for line in lines) == starts
    printed = capsys.readouterr().out
    assert "| of the bound | target |" in printed
    assert "≥ 55%" in printed


def test_a_part_that_fails_leaves_the_others(monkeypatch, tmp_path, capsys):
    def broken(size, found):
        yield {"name": "half", "rate": 1.0, "unit": "tokens"}
        raise MemoryError("out of memory\nand a long trace")

    def fine(size, found):
        yield {"name": "fine", "rate": 2.0, "unit": "tokens", "bound": 4.0, "target": 0.7}

    parts = dict.fromkeys(gpu.NAMES, fine) | {"sft": broken}
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.main(["--reduced", f"--out={tmp_path / 'gpu.json'}"]) == 0
    printed = capsys.readouterr().out
    assert "| sft | failed: MemoryError: out of memory |" in printed
    assert printed.count("| fine | 2 tokens/s | 50% | ≥ 70% |") == 2 * 4


def test_a_process_that_takes_too_long_is_ended_and_what_it_said_is_kept():
    code = 'import time; print(\'{"name": "first"}\', flush=True); time.sleep(60)'
    lines = list(gpu.lines_elsewhere([sys.executable, "-c", code], "slow", 3.0))
    assert lines == [{"name": "first"}, {"name": "slow", "failed": "took more than 3 s"}]


def test_peers_stand_beside_our_rates():
    line = {"name": "SFT, rows of 64, remat dots", "rate": 6.0, "unit": "tokens"}
    peers = {"SFT, rows of 64": {"name": "SFT, rows of 64", "rate": 2.0, "unit": "tokens"}}
    assert "| 2 tokens/s | 3.00 |" in gpu.table([line], peers)[-1]


def test_the_plans_rate_stands_beside_what_was_measured():
    line = {"name": "SFT", "unit": "tokens"} | gpu._rates(6.0, seconds=2.0, planned=1.5)
    assert (line["rate"], line["planned"]) == (3.0, 4.0)
    assert gpu.table([line], {})[-1].endswith("| 75% |")
    assert "planned" not in gpu._rates(6.0, seconds=2.0, planned=None)


@pytest.mark.parametrize(
    ("kind", "known"),
    [
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA A100-SXM4-80GB", True),
        ("NVIDIA H200", True),
        ("NVIDIA H100 PCIe", False),
        ("NVIDIA GH200 480GB", False),
    ],
)
def test_a_plan_is_of_the_very_card(kind, known, monkeypatch):
    monkeypatch.setattr("jax.devices", lambda: [SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr("rlhf_jax.plan.estimates.estimate", lambda *_: SimpleNamespace(seconds=2.0))
    shape = SimpleNamespace(heads=1, head_dim=1, layers=1)
    assert gpu._planned(shape, None, (1, 1)) == (2.0 if known else None)


def test_without_a_gpu_one_line_says_so():
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(command, cwd=gpu.ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: JAX sees no NVIDIA GPU")

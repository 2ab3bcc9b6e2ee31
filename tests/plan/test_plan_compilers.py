"""Plans by the compilers of TPUs and GPUs, where they are installed: requirements-plan.txt."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TPU = importlib.util.find_spec("libtpu") is not None
GPU = importlib.util.find_spec("jax_plugins") is not None and any(
    importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (12, 13)
)
SMALL = [
    *("--config.model.layers=2", "--config.model.width=128", "--config.model.heads=2"),
    *("--config.model.kv_heads=2", "--config.model.head_dim=64", "--config.model.mlp_width=256"),
    *("--config.model.compute_dtype=bfloat16", "--config.batch.rows=8"),
]


def plan(*flags):
    command = [sys.executable, "-m", "rlhf_jax.plan", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.skipif(not TPU, reason="libtpu is not installed")
def test_a_step_for_tpus_has_cycles_and_kernels():
    flags = ["--config.model.attention=splash", "--config.mesh.fsdp=8", *SMALL]
    done = plan("--config=experiments/pretrain.py", "--topology=v5e:2x4", *flags)
    assert done.returncode == 0, done.stderr
    for line in ("cycles", "kernels", "all-gather", "seconds, estimated"):
        assert f"| {line} | " in done.stdout
    assert "fits v5e:2x4: update needs " in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not TPU, reason="libtpu is not installed")
def test_what_a_tpus_compiler_refuses_does_not_fit():
    flags = [
        "--config.batch.rows=512",
        "--config.data.row_length=2048",
        "--config.model.remat=none",
    ]
    done = plan("--config=experiments/pretrain.py", "--topology=v5e:1x1", *SMALL[:-1], *flags)
    assert done.returncode == 0, done.stderr
    assert "does not fit v5e:1x1: update needs " in done.stdout
    assert "--config.batch.microbatches" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not GPU, reason="no CUDA plugin is installed")
def test_a_step_for_gpus_has_flops_and_messages():
    flags = ["--config.model.attention=cudnn", "--config.mesh.fsdp=8", *SMALL]
    done = plan("--config=experiments/pretrain.py", "--topology=h100:8", *flags)
    assert done.returncode == 0, done.stderr
    for line in ("FLOPs of products", "kernels", "reduce-scatter", "seconds, estimated"):
        assert f"| {line} | " in done.stdout
    assert "of GPUs at most, by a roofline" in done.stdout


@pytest.mark.skipif(TPU, reason="libtpu is installed")
def test_without_a_compiler_it_is_said_what_to_install():
    done = plan("--config=experiments/sft.py", "--topology=v5e:1x1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install -r requirements-plan.txt" in done.stderr


@pytest.mark.skipif(GPU, reason="a CUDA plugin is installed")
def test_without_a_compiler_for_gpus_it_is_said_what_to_install():
    done = plan("--config=experiments/sft.py", "--topology=h100:8")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install -r requirements-plan.txt" in done.stderr

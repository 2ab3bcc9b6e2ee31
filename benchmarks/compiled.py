"""Steps of training compiled for chips that are not there, beside MaxText's and an earlier build's.

    python -m benchmarks.compiled [--only=TEXT] [--maxtext-python=PYTHON] [--before=CHECKOUT]

Nothing is run: memory and collectives are what the chips' compilers say of one chip and one call,
cycles their estimates, which leave out kernels (attention's) and collectives. It needs
requirements-plan.txt; PYTHON is of an environment with `pip install "maxtext[tpu]==0.2.5"`
(Python 3.12), CHECKOUT an earlier commit of this repository. Both are asked for fine-tuning alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_jax.plan.chips import ENVIRONMENT

# https://huggingface.co/HuggingFaceTB/SmolLM2-135M
SMOLLM2 = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49_152,
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "hidden_act": "silu",
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 100_000, "tie_word_embeddings": True,
    "attention_bias": False, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SMALL = "SmolLM2-135M"


@dataclass(frozen=True)
class Row:
    """A stage on a topology, a row of `length` tokens for every `rows`.

    Attributes:
      stage: "sft", "dpo" or "grpo" of experiments/llama.py. shape: of that file, or `SMALL`.
      mesh: sizes of its axes. target: what the first step's numbers are to be, in words.
    """

    stage: str
    topology: str
    mesh: str = "fsdp=8"
    remat: str = "full"
    rows: int = 8
    length: int = 2048
    shape: str = "1b"
    target: str = ""

    @property
    def name(self) -> str:
        what = f"{self.stage} {self.shape}, {self.topology}, {self.mesh or 'one'}, {self.remat}"
        return f"{what}, {self.rows} rows"

    @property
    def kernel(self) -> str:
        return "cudnn" if self.topology[0] in "abh" else "splash"

    def flags(self, directory: Path) -> list[str]:
        """The command line of `rlhf_jax.main` for it; answers are a quarter of a row each."""
        quarter = self.length // 4
        fields = {
            "data.row_length": self.length,
            "batch.rows": self.rows,
            "compute.remat": self.remat,
            "compute.attention": self.kernel,
        } | {f"mesh.{axis.split('=')[0]}": axis.split("=")[1] for axis in self.mesh.split()}
        if self.shape == SMALL:
            fields["init.policy"] = str(directory)
        if self.stage == "grpo":  # a prompt and three answers fill a row
            fields |= {
                "rollout.prompts": self.rows,
                "rollout.samples": 3,
                "rollout.max_prompt_tokens": quarter,
                "rollout.max_new_tokens": quarter,
                "rollout.slots": 8 * self.rows if self.rows < 64 else 256,
            }
        shape = "1b" if self.shape == SMALL else self.shape
        return [
            f"--config=experiments/llama.py:{self.stage}-{shape}",
            *(f"--config.{name}={value}" for name, value in fields.items()),
        ]


def _on(topology: str, target: str, **fields) -> list[Row]:
    return [Row(stage, topology, target=target, **fields) for stage in ("sft", "dpo", "grpo")]


_V5E = "≤ 4.0e8 cycles, ≤ 2.0 GiB, ≤ 10 GB; decode ≤ 6.7e6, 0 GB; a pass ≤ 1.4e8"
ROWS = [
    *_on("v5e:2x4", _V5E),
    Row("sft", "v5e:2x4", remat="dots", target="≤ 4.0e8 cycles, ≤ 3.5 GiB"),
    Row("sft", "v5e:4x4", "fsdp=16", rows=16),
    Row("sft", "v5p:2x2x1", "fsdp=4", rows=4),
    *_on("h100:8", "≤ 16.5 GiB, ≤ 8 GB", remat="dots", rows=64),
    *_on("h100:8", "≤ 16.5 GiB, ≤ 8 GB", rows=64),
    *_on("v5e:1x1", "≤ 6 GiB, ≤ 1.1e9 cycles", mesh="", shape=SMALL),
    *_on("v5e:1x1", "≤ 6 GiB, ≤ 1.1e9 cycles", mesh="", shape=SMALL, remat="dots"),
    *(
        Row("sft", "v5p:4x4x4", mesh, remat, rows, 4096, "8b", "≥ 55 % of peak")
        for mesh, remat, rows in (
            ("fsdp=64", "full", 64),
            ("fsdp=16", "full", 64),
            ("fsdp=16", "dots", 64),
            ("fsdp=16", "none", 64),
            ("fsdp=16", "full", 128),
            ("fsdp=16", "dots", 128),
        )
    ),
]
HEADS = ("side", "step", "temporaries, GiB", "collectives, GB", "cycles", "of the peak", "target")


def ours(row: Row, directory: Path) -> Iterator[list[str]]:
    """A line for every step of a row."""
    from rlhf_jax.main import parse
    from rlhf_jax.plan.plan import plan

    config, _, stated, _ = parse(row.flags(directory))
    with contextlib.redirect_stdout(sys.stderr):
        planned = plan(config, stated, row.topology, search=False)
    for i, each in enumerate(planned.estimates):
        counted, used = each.counted, f"{each.held['temporaries'] / 2**30:.2f}"
        name, passes = each.step.name, each.step.passes
        if passes > 1:
            name = f"{name}, one of them"
        cells = ["refused by the compiler", "", ""]
        if counted is not None:
            moved = counted.collective_bytes / passes
            cells = [f"{moved / 1e9:.2f}", f"{counted.cycles / passes:.3g}", ""]
        if each.seconds:
            peak = each.step.flops / each.seconds / planned.devices / planned.chip.flops
            cells[2] = f"{peak:.0%}"
        yield ["ours", name, used, *cells, row.target if not i else ""]


def theirs(side: str, command: Sequence[str], chips: int, root: Path) -> list[str]:
    """The line of another side, whose process writes what it has compiled to a file."""
    from rlhf_jax.plan.compiled_text import count

    script = Path(__file__).with_name("compiled_peers.py")
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [command[0], script, folder, *command[1:]],
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(root)},
            cwd=root,
            capture_output=True,
            text=True,
        )
        if run.returncode:
            return [
                side,
                "update",
                f"failed: {run.stderr.strip().splitlines()[-1]}",
                "",
                "",
                "",
                "",
            ]
        temporaries = json.loads(Path(folder, "memory.json").read_text())
        counted = count(Path(folder, "step.txt").read_text(), chips)
    used = [f"{temporaries / 2**30:.2f}", f"{counted.collective_bytes / 1e9:.2f}"]
    return [side, "update", *used, f"{counted.cycles:.3g}", "", ""]


def main(argv: list[str] | None = None) -> None:
    """Runs one command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--maxtext-python")
    parser.add_argument("--before")
    given = parser.parse_args(argv)
    os.environ |= ENVIRONMENT
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(SMOLLM2))
        for row in (row for row in ROWS if given.only in row.name):
            lines = list(ours(row, Path(folder)))
            chips, here = row.rows, Path(__file__).resolve().parents[1]
            if (row.stage, row.shape, row.kernel) == ("sft", "1b", "splash"):
                if given.maxtext_python:
                    options = (given.maxtext_python, "maxtext", row.topology, row.remat)
                    lines.append(theirs("MaxText", options, chips, here))
                if given.before:
                    options = (sys.executable, "before", row.topology, row.remat)
                    lines.append(theirs("before", options, chips, Path(given.before)))
            print(f"\n{row.name}\n\n| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}")
            print("\n".join(f"| {' | '.join(line)} |" for line in lines), flush=True)


if __name__ == "__main__":
    main()

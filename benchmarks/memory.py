"""Memory of one SFT, DPO and GRPO step: ours, the peer's, and what arithmetic asks for.

    python -m benchmarks.memory [--peer-python=PYTHON] [--shapes=tiny,small] [--only=sft,dpo,grpo]

PYTHON as for `benchmarks.run`. Float32, AdamW. Four figures, in MiB:

* arithmetic: parameters, two moments and a gradient, 16 bytes a parameter; the reference of GRPO,
  4; and what the forward pass computes, kept once for the backward one (see `activations`). Logits
  are those of one chunk of tokens and their gradient, never of all.
* compiled: what XLA plans for the jitted update: arguments + outputs − the outputs written over
  arguments + temporaries.
* a step, ours and the peer's: peak resident memory of the process while it works, after two rounds
  to warm up, above a process that only imported the same libraries.
* at most, ours and the peer's: the same from the start of the process, compilation and all.

The peaks are the kernel's (VmHWM, which is `ru_maxrss`), so this runs on Linux only.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import work
from benchmarks.run import ROOT, SETTINGS

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """A line of the table; `peer` are further words of the peer's command line."""

    work: str
    shape: str
    peer: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join((self.work, self.shape, *(w.removeprefix("--") for w in self.peer)))


@dataclass
class Result:
    """What was found, in bytes; the peer's are 0 where there is none."""

    row: Row
    arithmetic: dict[str, float] = field(default_factory=dict)
    compiled: dict[str, float] = field(default_factory=dict)
    ours: dict[str, float] = field(default_factory=dict)
    peer: dict[str, float] = field(default_factory=dict)


def parameters(shape: work.Shape) -> int:
    """All of them: the matrices, the embedding, two norms a layer and the last one."""
    norms = (2 * shape.layers + 1) * shape.width
    return shape.matrix_numbers + shape.vocab_size * shape.width + norms


def activations(shape: work.Shape, rows: int, length: int, targets: int, chunk: int) -> float:
    """Bytes of what a forward pass over rows of so many tokens leaves for the backward pass.

    A layer keeps of every token what it reads and writes: the residual stream before attention and
    before the MLP, both after their norms, query, key and value, what attention mixed (8 widths),
    its weights over the row (heads × length), gate, up and their product (3 MLP widths). Then the
    last hidden state before and after its norm, and a chunk's logits with their gradient.
    """
    layer = 8 * shape.width + 3 * shape.mlp_width + shape.heads * length
    kept = rows * length * (shape.layers * layer + 2 * shape.width)
    return 4.0 * (kept + 2 * min(targets, chunk) * shape.vocab_size)


def arithmetic(row: Row, shape: work.Shape, batch: dict[str, int]) -> dict[str, float]:
    """Bytes by what they are for."""
    count = 4.0 * parameters(shape)
    parts = {"parameters": count, "optimizer": 2 * count, "gradients": count}
    if row.work == "grpo":  # under full training the reference is a model of its own
        parts["reference"] = count
    return parts | {"activations": activations(shape, **batch)}


def status(process: int, name: str) -> float:
    """A figure of /proc/…/status, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (found,) = [line.split() for line in lines if line.startswith(f"{name}:")]
    return float(found[1]) * 1024


def started(python: str, *words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [python, *words], cwd=ROOT, env=os.environ | SETTINGS, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def answer(process: subprocess.Popen) -> dict:
    """The next line the process says."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.args}\n{process.communicate()[1][-2000:]}")
    return json.loads(line)


def resident(python: str, module: str, row: Row, words: tuple[str, ...], imports: str) -> dict:
    """Peaks of a side of a benchmark: {"imports", "step", "most"}, the latter two above imports."""
    idle = started(python, "-c", f"{imports}\nprint('{{}}', flush=True); input()")
    answer(idle)
    imported = status(idle.pid, "VmHWM")
    idle.kill()
    idle.communicate()
    side = started(python, "-m", module, row.work, row.shape, *words)
    try:
        answer(side)
        most = status(side.pid, "VmHWM")
        Path(f"/proc/{side.pid}/clear_refs").write_text("5")  # the peak begins anew
        assert side.stdin is not None
        side.stdin.write("go\n")
        side.stdin.flush()
        answer(side)
        step = status(side.pid, "VmHWM")
    finally:
        side.kill()
        side.communicate()
    return {"imports": imported, "step": step - imported, "most": max(most, step) - imported}


OUR_IMPORTS = "import benchmarks.ours, jax; jax.numpy.zeros(1)"
PEER_IMPORTS = (
    "import benchmarks.peers, datasets, trl\nfrom trl import DPOTrainer, GRPOTrainer, SFTTrainer\n"
)


class Reached(Exception):
    """The update is about to be done, and has been looked at."""


def compiled(given: str, shape: str) -> dict[str, dict[str, float]]:
    """What XLA plans for the update of a work, and the shape of its batch."""
    import jax

    from benchmarks import ours
    from rlhf_jax.losses.cross_entropy import token_statistics
    from rlhf_jax.training import learner

    make, found = learner.make_step, {}

    def watched(*arguments, **options):
        step = make(*arguments, **options)

        def look(state, batch):
            analysis = step.lower(state, batch).compile().memory_analysis()
            names = ("argument", "output", "alias", "temp")
            sizes = {name: getattr(analysis, f"{name}_size_in_bytes") for name in names}
            sizes["state"] = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            found["compiled"] = sizes
            rows, length = batch["tokens"].shape
            found["batch"] = {"rows": rows, "length": length, "targets": batch["targets"].size}
            raise Reached

        return look

    learner.make_step = ours.make_step = watched
    with suppress(Reached):
        ours.WORKS[given](work.SHAPES[shape])()
    signature = inspect.signature(token_statistics)
    found["batch"]["chunk"] = signature.parameters["chunk_tokens"].default
    return found


def measure(row: Row, peer_python: str | None) -> Result:
    words = ("-m", "benchmarks.memory", "--compiled", row.work, row.shape)
    process = started(sys.executable, *words)
    found = answer(process)
    process.communicate()
    result = Result(row, arithmetic(row, work.SHAPES[row.shape], found["batch"]))
    result.compiled = found["compiled"] | {"batch": found["batch"]}
    result.ours = resident(sys.executable, "benchmarks.ours", row, (), OUR_IMPORTS)
    if peer_python:
        result.peer = resident(peer_python, "benchmarks.peers", row, row.peer, PEER_IMPORTS)
    return result


HEADER = (
    *("work", "arithmetic", "compiled", "of it temporaries", "state reused"),
    *("a step, ours", "a step, peer", "peer / ours", "at most, ours", "at most, peer"),
)


def line(result: Result) -> str:
    """Of the table, in Markdown."""
    sizes, total = result.compiled, sum(result.arithmetic.values())
    planned = sizes["argument"] + sizes["output"] - sizes["alias"] + sizes["temp"]
    cells = [
        result.row.name,
        *(f"{size / MIB:,.0f}" for size in (total, planned, sizes["temp"])),
        f"{sizes['alias'] / sizes['state']:.0%}",
        f"{result.ours['step'] / MIB:,.0f}",
        f"{result.peer['step'] / MIB:,.0f}" if result.peer else "–",
        f"{result.peer['step'] / result.ours['step']:.2f}" if result.peer else "–",
        f"{result.ours['most'] / MIB:,.0f}",
        f"{result.peer['most'] / MIB:,.0f}" if result.peer else "–",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python")
    parser.add_argument("--shapes", default="tiny,small")
    parser.add_argument("--only", default="sft,dpo,grpo")
    parser.add_argument("--out", default="memory.json")
    parser.add_argument("--compiled", nargs=2, help=argparse.SUPPRESS)  # for `measure`
    given = parser.parse_args()
    if given.compiled:
        said = sys.stdout
        sys.stdout = sys.stderr
        print(json.dumps(compiled(*given.compiled)), file=said, flush=True)
        return
    peers: dict[str, list[tuple[str, ...]]] = {"dpo": [(), ("--precomputed",)]}
    rows = [
        Row(name, shape, words)
        for shape in given.shapes.split(",")
        for name in given.only.split(",")
        for words in peers.get(name, [()])[: None if given.peer_python else 1]
    ]
    results = []
    print(f"MiB\n\n| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}", flush=True)
    for row in rows:
        results.append(measure(row, given.peer_python))
        print(line(results[-1]), flush=True)
    document = [vars(result) | {"row": result.row.name} for result in results]
    Path(given.out).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()

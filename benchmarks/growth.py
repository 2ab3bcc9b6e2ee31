"""Cost of a training step as work grows: python -m benchmarks.growth [--rounds=5].

Time a token and its ratio to that of the smallest point, against context length, batch, model
width and number of fake CPU devices. Every point is a process that is warm before the first round;
the points of a series are visited in turns, and a figure is the median over rounds. What a step
compiles after its warm-up is counted, and should be nothing. Prints a table, draws growth.svg
beside this file, and writes JSON.

Fake devices share the same cores: what grows with their number is the price of being split, not a
gain. Their model, batch and tokens are the same throughout.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from benchmarks import work
from benchmarks.run import ROOT, SETTINGS

TOKENS = 4096  # an update, of a series that does not say otherwise
ENOUGH = 0.25  # seconds a round takes at least


@dataclass(frozen=True)
class Point:
    """A training step on full rows.

    Attributes:
      series: its line in the figure. x: where on it.
      width: of the model; its MLP is 2.7 times as wide, and a head has 64.
      context: tokens a row. rows: an update.
      devices: fake ones, which split the rows.
    """

    series: str
    x: int
    width: int = 128
    context: int = 256
    rows: int = TOKENS // 256
    devices: int = 1

    def shape(self) -> work.Shape:
        """Four layers and 4096 words."""
        tiny = work.SHAPES["tiny"]
        heads, mlp = self.width // 64, 8 * math.ceil(self.width * 2.7 / 8)
        sizes = {"width": self.width, "heads": heads, "mlp_width": mlp}
        return replace(tiny, **sizes, context=self.context, rows=self.rows)


SERIES: dict[str, tuple[str, list[Point]]] = {
    "context": (
        "tokens a row",
        [
            Point("context", n, context=n, rows=TOKENS // n)
            for n in (128, 256, 512, 1024, 2048, 4096)
        ],
    ),
    "batch": ("rows of 256", [Point("batch", n, rows=n) for n in (1, 2, 4, 8, 16, 32)]),
    "width": ("model width", [Point("width", n, width=n, rows=4) for n in (64, 128, 256, 512)]),
    "devices": ("fake devices", [Point("devices", n, devices=n) for n in (1, 2, 4)]),
}


class Side:
    """A warm process that times a round when told to."""

    def __init__(self, point: Point):
        flag = f"--xla_force_host_platform_device_count={point.devices}"
        flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), flag)))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.growth", "--point", json.dumps(vars(point))],
            cwd=ROOT, env=os.environ | SETTINGS | {"XLA_FLAGS": flags}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._read()

    def _read(self) -> dict:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(self._process.communicate()[1][-2000:])
        return json.loads(line)

    def round(self) -> dict:
        """{"seconds", "tokens", "compiled"} of one more round."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def serve(point: Point) -> None:
    """A round for every line on standard input."""
    import jax

    from benchmarks import ours
    from rlhf_jax.data.packing import Document, pack_documents
    from rlhf_jax.models import init
    from rlhf_jax.models.scoring import target_cross_entropy
    from rlhf_jax.training.mesh import make_mesh, shard_batch
    from rlhf_jax.training.optimizer import OptimizerConfig, make_optimizer
    from rlhf_jax.training.state import init_state
    from rlhf_jax.training.step import make_step

    said, sys.stdout = sys.stdout, sys.stderr
    shape = point.shape()
    config = ours.model_config(shape)
    mesh = make_mesh({"data": -1}) if jax.device_count() > 1 else None
    tokens = work.full_rows(point.rows, shape)
    documents = [Document(row, [0, *[1] * (len(row) - 1)]) for row in tokens.tolist()]
    batch = shard_batch(mesh, pack_documents(documents, point.context)[0])

    def loss_fn(params, batch, rng):
        return target_cross_entropy(config, params, batch)

    optimizer, _ = make_optimizer(OptimizerConfig(schedule="constant"), 10**6)
    step = make_step(loss_fn, optimizer, mesh=mesh, max_grad_norm=1.0)
    state = init_state(init(config, jax.random.key(0)), optimizer, mesh=mesh)

    def updates(count: int) -> float:
        nonlocal state
        begun = time.perf_counter()
        for _ in range(count):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        return time.perf_counter() - begun

    updates(2)
    compiled = step._cache_size()
    count = max(1, math.ceil(ENOUGH / updates(1)))
    print(json.dumps({"ready": True}), file=said, flush=True)
    while sys.stdin.readline():
        seconds = updates(count)
        answer = {"seconds": seconds, "tokens": count * tokens.size}
        answer["compiled"] = step._cache_size() - compiled
        print(json.dumps(answer), file=said, flush=True)


@dataclass(frozen=True)
class Result:
    """Microseconds a token of every round, and how often a warm step was compiled again."""

    point: Point
    rounds: list[float]
    compiled: int

    @property
    def microseconds(self) -> float:
        return median(self.rounds)


def measure(points: list[Point], rounds: int) -> list[Result]:
    """All points of a series, in turns."""
    sides: list[Side] = []
    try:
        sides.extend(Side(point) for point in points)
        found = [[side.round() for side in sides] for _ in range(rounds)]
    finally:
        for side in sides:
            side.end()
    return [
        Result(
            point,
            [1e6 * turn[i]["seconds"] / turn[i]["tokens"] for turn in found],
            found[-1][i]["compiled"],
        )
        for i, point in enumerate(points)
    ]


def lines(results: list[Result]) -> list[str]:
    """Of the table, in Markdown."""
    found = []
    for result in results:
        point, first = result.point, results[0].microseconds
        spread = f"{min(result.rounds):,.1f}–{max(result.rounds):,.1f}"
        flops = training_flops(point) / result.microseconds / 1e3
        found.append(
            f"| {SERIES[point.series][0]} | {point.x} | {result.microseconds:,.1f} ({spread}) | "
            f"{result.microseconds / first:.2f} | {flops:,.0f} | {result.compiled} |"
        )
    return found


def training_flops(point: Point) -> float:
    """A token: 6 a parameter that is multiplied with it, and causal attention over its row."""
    shape = point.shape()
    return 6.0 * shape.matrix_numbers + 6.0 * shape.layers * shape.width * shape.context


def draw(results: dict[str, list[Result]]) -> str:
    """The figure as SVG: time a token, and what of the processor that uses, by doublings."""
    from rlhf_jax.report.figure import LINES, add_legend, format_tick, label_axes, open_axes

    series = {
        name: [
            (
                math.log2(r.point.x / each[0].point.x),
                r.microseconds / each[0].microseconds,
                training_flops(r.point) / r.microseconds / 1e3,
            )
            for r in each
        ]
        for name, each in results.items()
    }
    rows = [(name, *point) for name, each in series.items() for point in each]
    header = ("series", "doublings", "time a token, relative", "GFLOP/s")
    title = "A training step as work grows"
    with open_axes(title, header, rows, 4.6, panels=(1, 1), width=5.6) as (panels, done):
        for color, (name, each) in zip(LINES, series.items(), strict=False):
            x, relative, rate = zip(*each, strict=True)
            first = results[name][0].point.x
            panels[0].plot(x, relative, "-o", color=color, label=f"{SERIES[name][0]}, from {first}")
            panels[1].plot(x, rate, "-o", color=color)
        panels[0].set_yscale("log", base=2)
        panels[0].yaxis.set_major_formatter(lambda value, _: format_tick(value))
        panels[1].set_ylim(bottom=0)
        panels[1].xaxis.get_major_locator().set_params(integer=True)
        label_axes(panels[0], "", "time a token, relative")
        label_axes(panels[1], "doublings", "GFLOP/s")
        add_legend(panels[0])
    svg = done().svg.replace("currentColor", "#1f2328")
    return svg.replace('style="', 'style="background: white; ', 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(SERIES))
    parser.add_argument("--most", type=int, default=2**20, help="leaves out points beyond this x")
    parser.add_argument("--out", default="growth.json")
    parser.add_argument("--svg", default=str(Path(__file__).with_name("growth.svg")))
    parser.add_argument("--point", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        serve(Point(**json.loads(given.point)))
        return
    results = {}
    print("| against | x | µs a token (range) | relative | GFLOP/s | compiled again |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in given.only.split(","):
        points = [point for point in SERIES[name][1] if point.x <= given.most]
        results[name] = measure(points, given.rounds)
        print("\n".join(lines(results[name])), flush=True)
    document = {
        name: [vars(result) | {"point": vars(result.point)} for result in each]
        for name, each in results.items()
    }
    Path(given.out).write_text(json.dumps(document, indent=2) + "\n")
    Path(given.svg).write_text(draw(results), "utf-8")


if __name__ == "__main__":
    main()

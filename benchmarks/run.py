"""Ours beside what else a user would pick, on the same work, in one run.

    python -m benchmarks.run --peer-python=PYTHON [--ppo-python=…] [--tunix-python=…]
        [--only=sft,dpo] [--rounds=5] [--out=benchmarks.json]

The interpreters are those of environments with what requirements-peers.txt says; rows whose peer is
not installed have our side and the limits only. Both sides of a row, and the limits of both their
libraries, are processes of their own that are warm before the first round and then work in turns,
A B A B …; figures are medians over rounds. Ratios are what counts: machines are shared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from benchmarks import work
from rlhf_jax.malloc import MALLOC

ROOT = Path(__file__).resolve().parents[1]
# Before a process starts, the same for all: the allocator's, which GLIBC_TUNABLES overrides, and
# nothing from the net.
SETTINGS = {
    "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", MALLOC),
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
PATIENCE = 900.0  # seconds until a side must be warm
# Of each --…-python: what is run there, and whether torch is there, whose limits count too.
ENVIRONMENTS = {
    "peer": ("benchmarks.peers", True),
    "ppo": ("benchmarks.peers", True),
    "tunix": ("benchmarks.tunix_peer", False),
}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      work, shape: of `ours.WORKS`, `work.SHAPES`. unit: of what is counted a second.
      target: what our rate over the peer's must be.
      both, ours, peer: further words of the command line of both sides, or of either.
      environment: which interpreter is the peer's.
    """

    work: str
    shape: str
    unit: str
    target: float
    note: str = ""
    both: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()
    peer: tuple[str, ...] = ()
    environment: str = "peer"

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.work, self.shape, self.note)))

    @property
    def batch(self) -> int:
        """Of generation."""
        return next((int(w.partition("=")[2]) for w in self.both if w.startswith("--batch=")), 1)


def _rows() -> list[Row]:
    packs = {"ours": ("--full",), "peer": ("--packing",), "note": "peer packs"}
    half = {"both": ("--bfloat16",), "note": "bfloat16"}
    rows = [
        Row("pretrain", "tiny", "tokens", 2.4),
        Row("pretrain", "small", "tokens", 2.6),
        Row("sft", "tiny", "tokens", 5.0),
        Row("sft", "small", "tokens", 4.5),
        Row("sft", "tiny", "tokens", 4.8, **packs),
        Row("sft", "small", "tokens", 4.0, **packs),
        Row("sft", "tiny", "tokens", 1.6, **half),
        Row("dpo", "tiny", "pairs", 6.0),
        Row("dpo", "tiny", "pairs", 4.5, "peer precomputes", peer=("--precomputed",)),
        Row("dpo", "tiny", "pairs", 3.5, "Tunix", environment="tunix"),
        Row("reward", "tiny", "pairs", 4.0),
    ]
    targets = {"tiny": {1: 4.5, 8: 4.5, 64: 4.0}, "small": {1: 3.0, 8: 3.2, 64: 3.2}}
    for shape, each in targets.items():
        for batch, target in each.items():
            words = (f"--batch={batch}",)
            rows.append(Row("generate", shape, "tokens", target, f"batch {batch}", words))
    words = ("--batch=1", "--bfloat16")
    return [
        *rows,
        Row("generate", "small", "tokens", 1.5, "batch 1 bfloat16", words),
        Row("grpo", "tiny", "steps", 4.0),
        Row("grpo", "tiny", "steps", 2.7, "Tunix", environment="tunix"),
        Row("ppo", "tiny", "steps", 4.0, environment="ppo"),
        Row("start", "tiny", "starts", 1.0),
        Row("start", "tiny", "starts", 1.0, "again", ours=("--kept",)),
        Row(  # torch keeps what it compiles, too
            *("start", "tiny", "starts", 1.0, "again peer compiles"),
            ours=("--kept",),
            peer=("--compile",),
        ),
    ]


ROWS = _rows()


class Failed(Exception):
    """A side ended before it had done what it was told to; the message is one line."""


class Side:
    """A process that is warm, and does a round when told to; stopped while it is not its turn.

    Attributes:
      facts: what it said when it was warm. ready: seconds from its start until then.
    """

    def __init__(self, python: str, module: str, words: tuple[str, ...], root: Path = ROOT):
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe would fill up
        begun = time.perf_counter()
        self._process = subprocess.Popen(
            [python, "-m", module, *words],
            cwd=root,
            env=os.environ | SETTINGS,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        impatient = threading.Timer(PATIENCE, self._process.kill)
        impatient.start()
        try:
            self.facts = self._read()
        finally:
            impatient.cancel()
        self.ready = time.perf_counter() - begun
        self._process.send_signal(signal.SIGSTOP)

    def _read(self) -> dict:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):  # C libraries print to it too
                return json.loads(line)
        if self._process.wait() == -signal.SIGKILL:
            raise Failed(f"not warm after {PATIENCE:.0f} s, or killed for memory")
        self._errors.seek(0)
        said = [line for line in self._errors.read().splitlines() if line.strip()]
        raise Failed(said[-1].strip()[:200] if said else f"exit {self._process.returncode}")

    def round(self) -> dict:
        """What it says of one more round."""
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        said = self._read()
        self._process.send_signal(signal.SIGSTOP)
        return said

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


class Start:
    """A side whose work it is to start: every round is a process of its own."""

    def __init__(self, *command):
        self._command = command
        self.facts: dict = {}
        self.ready = 0.0

    def round(self) -> dict:
        """As of `Side`."""
        side = Side(*self._command)
        side.end()
        self.facts = side.facts
        return {"units": 1.0, "seconds": side.ready}

    def end(self) -> None:
        pass


@dataclass
class Result:
    """Of each side ("ours", "peer") what it said of every round, when warm, and its failure.

    Attributes:
      rounds: {"units", "seconds"} of a side; {"flops", "bytes", "number"} of "jax" and "torch",
        the limits. facts: versions. ready: seconds. failed: why there is nothing, or no more.
    """

    row: Row
    rounds: dict[str, list[dict]] = field(default_factory=dict)
    facts: dict[str, dict] = field(default_factory=dict)
    ready: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def rates(self, side: str) -> list[float]:
        """Units a second of every round; with a library's name, of its limit."""
        rounds = self.rounds.get(side, [])
        if side in ("ours", "peer"):
            return [each["units"] / each["seconds"] for each in rounds]
        if self.row.work == "start":
            return []
        shape, batch = work.SHAPES[self.row.shape], self.row.batch
        found = [work.Limit(r["flops"], r["bytes"], r["number"]) for r in rounds]
        return [1 / work.least_seconds(self.row.work, shape, each, batch) for each in found]

    def ratios(self, over: str, under: str) -> list[float]:
        """Of the rates of two in the same round."""
        return [a / b for a, b in zip(self.rates(over), self.rates(under), strict=False)]


def measure(row: Row, pythons: dict[str, str], rounds: int) -> Result:
    """Rounds of all sides in turns; one that fails is left out of those that follow."""
    result = Result(row)
    words = (row.work, row.shape, *row.both)
    numbers = work.numbers_read(row.work, work.SHAPES[row.shape], row.batch)
    limit = (row.shape, f"--numbers={numbers}", *(w for w in row.both if w == "--bfloat16"))
    commands = {"ours": (sys.executable, "benchmarks.ours", (*words, *row.ours))}
    python, (module, torch) = pythons.get(row.environment), ENVIRONMENTS[row.environment]
    if python:
        commands["peer"] = (python, module, (*words, *row.peer))
    if row.work != "start":
        commands["jax"] = (sys.executable, "benchmarks.limits", ("jax", *limit))
        if python and torch:
            commands["torch"] = (python, "benchmarks.limits", ("torch", *limit))
    sides: dict[str, Side | Start] = {}
    try:
        for name, command in commands.items():
            try:
                sides[name] = (Start if row.work == "start" else Side)(*command)
            except Failed as failure:
                result.failed[name] = str(failure)
        for _ in range(rounds):
            for name in [*sides]:
                try:
                    result.rounds.setdefault(name, []).append(sides[name].round())
                except Failed as failure:
                    result.failed[name] = str(failure)
                    sides.pop(name).end()
    finally:
        for name, side in sides.items():
            result.facts[name], result.ready[name] = side.facts, side.ready
            side.end()
    return result


def figure(number: float) -> str:
    """Three digits, no exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _rate(result: Result, side: str) -> str:
    if not result.rates(side):
        return "failed" if side in result.failed else "not installed"
    rate, unit = median(result.rates(side)), result.row.unit
    if unit in ("steps", "starts"):
        return f"{figure(1 / rate)} s"
    return f"{figure(rate)} {unit}/s"


def _ratio(result: Result) -> str:
    ratios = result.ratios("ours", "peer")
    if not ratios:
        return "–"
    return f"{median(ratios):.2f}× ({min(ratios):.2f}–{max(ratios):.2f})"


def _products(result: Result) -> str:
    """Of the limits: GFLOP/s of either library."""
    found = [result.rounds.get(library, []) for library in ("jax", "torch")]
    shown = [f"{median(r['flops'] for r in rounds) / 1e9:.0f}" for rounds in found if rounds]
    return " / ".join(shown) or "–"


def cells(result: Result) -> list[str]:
    """One line of the table."""
    possible, share = result.ratios("jax", "peer"), result.ratios("ours", "jax")
    return [
        result.row.name,
        _rate(result, "ours"),
        _rate(result, "peer"),
        _ratio(result),
        f"≥ {result.row.target}×",
        f"{median(possible):.1f}×" if possible else "–",
        f"{median(share):.0%}" if share else "–",
        _products(result),
        *(f"{result.ready[s]:.0f}" if result.ready.get(s) else "–" for s in ("ours", "peer")),
    ]


HEADER = (
    *("work", "ours", "peer", "ratio (spread)", "target", "possible", "of our limit"),
    *("GFLOP/s, JAX / torch", "ours ready, s", "peer ready, s"),
)


def markdown(lines: list[list[str]]) -> list[str]:
    """A table with the first line as its header."""
    text = [f"| {' | '.join(line)} |" for line in lines]
    return [text[0], "|" + "---|" * len(lines[0]), *text[1:]]


def table(results: list[Result]) -> list[str]:
    """All results as Markdown, and below them what failed."""
    lines = markdown([list(HEADER), *map(cells, results)])
    failed = [
        f"{result.row.name}: {side} failed: {why}"
        for result in results
        for side, why in result.failed.items()
    ]
    return [*lines, *(["", *failed] if failed else [])]


def processor() -> str:
    """The model of this machine's."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    named = [line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line]
    return named[0] if named else platform.machine()


def circumstances(pythons: dict[str, str]) -> dict[str, str]:
    """What was run, when and where."""
    missing = ", ".join(name for name in ENVIRONMENTS if name not in pythons)
    return {
        "machine": f"{processor()}, {os.cpu_count()} CPUs",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", "benchmarks.run", *sys.argv[1:]]),
        "python": platform.python_version(),
        "malloc": SETTINGS["GLIBC_TUNABLES"],
        "not installed": missing or "nothing",
    }


def versions(results: list[Result]) -> dict[str, str]:
    """Of all libraries that took part; of several with one name, all."""
    found: dict[str, dict[str, None]] = {}
    for result in results:
        for side in ("ours", "peer"):
            for name, each in result.facts.get(side, {}).items():
                if name != "ready":
                    found.setdefault(name, {})[each] = None
    return {name: ", ".join(each) for name, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ENVIRONMENTS:
        parser.add_argument(f"--{name}-python")
    parser.add_argument("--only", default="", help="names of works or rows, with commas between")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", default="benchmarks.json")
    given = parser.parse_args()
    wanted = [name for name in given.only.split(",") if name]
    rows = [r for r in ROWS if not wanted or r.work in wanted or r.name in wanted]
    if not rows:
        raise SystemExit(f"--only={given.only}: there are {', '.join(r.name for r in ROWS)}")
    named = {name: getattr(given, f"{name}_python") for name in ENVIRONMENTS}
    pythons = {name: python for name, python in named.items() if python}
    about = circumstances(pythons)
    results = []
    for row in rows:
        results.append(measure(row, pythons, given.rounds))
        print("\n".join(table(results[-1:])[2:]), flush=True)
    about |= versions(results)
    print("", *table(results), "", *(f"{k}: {v}" for k, v in about.items()), sep="\n")
    document = about | {"rows": [asdict(result) for result in results]}
    Path(given.out).write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Where our side's time goes: python -m benchmarks.profile WORK SHAPE [--batch=N] [--bfloat16].

One round on one core, so that operations neither overlap nor wait for each other, in shares of the
time of all: the products and whatever else of attention, of the MLPs, of the vocabulary; "rest" is
what is of none of them: loss, optimizer and sampling, as far as they are no products. Linux only.
"""

from __future__ import annotations

import argparse
import collections
import glob
import gzip
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks import work
from benchmarks.run import SETTINGS, markdown

SCORES = "attention: products of scores and values"
KERNELS = "query|key|value|out|gate|up|down"


def kinds(text: str) -> dict[str, str]:
    """What every instruction of a compiled module is, by its name; text as XLA prints it."""
    bodies = dict(re.findall(r"^%?(\S+) \([^\n]*\) -> [^\n]* \{\n(.*?)\n\}", text, re.M | re.S))
    found = {}
    for name, operation, rest in re.findall(r"%(\S+) = \S+ ([\w-]+)\((.*)$", text, re.M):
        called = re.search(r"calls=%([^,\s]+)", rest)
        product = operation == "dot" or (called and " dot(" in bodies.get(called[1], ""))
        source = re.search(r'op_name="([^"]*)"', rest)
        if product and not source:  # XLA has made it, of another one
            batched = "batch_dims" in rest
            found[name] = SCORES if batched else "products whose names XLA has dropped"
        else:
            found[name] = kind(source[1] if source else "", bool(product), operation)
    return found


def kind(source: str, product: bool, operation: str) -> str:
    """Of an instruction that comes from `source`, the path of names that JAX gives it."""
    part = next((part for part in ("attention", "mlp") if f"/{part}/" in source), "")
    if product and part and not re.search(rf"/({KERNELS})(_|/)", source):
        return SCORES
    if product:
        return f"{part or 'vocabulary'}: products with weights"
    if operation == "copy" or not source:
        return "copies"
    return f"{part}: the rest" if part else "rest"


def own_times(events: Iterable[dict]) -> Iterator[tuple[dict, float]]:
    """Every event of one thread and its time (µs) less that of the events inside it."""
    ordered = sorted(events, key=lambda e: (e["ts"], -e["dur"]))
    own, open_ = [e["dur"] for e in ordered], []
    for i, event in enumerate(ordered):
        while open_ and ordered[open_[-1]]["ts"] + ordered[open_[-1]]["dur"] <= event["ts"]:
            open_.pop()
        if open_:
            own[open_[-1]] -= event["dur"]
        open_.append(i)
    return zip(ordered, own, strict=True)


def shares(trace: Path, dump: Path) -> dict[str, float]:
    """Of the time of all instructions in a trace, by kind; the largest first."""
    modules: dict[str, dict[str, str]] = {}
    for path in sorted(dump.glob("*after_optimizations.txt")):
        modules.setdefault(path.name.split(".")[1], {}).update(kinds(path.read_text()))
    (path,) = glob.glob(f"{trace}/**/*.trace.json.gz", recursive=True)
    with gzip.open(path) as file:
        events = json.load(file)["traceEvents"]
    threads = collections.defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            threads[event["pid"], event["tid"]].append(event)
    spent: collections.Counter[str] = collections.Counter()
    for each in threads.values():
        for event, time in own_times(each):
            module = modules.get(event["args"].get("hlo_module", ""), {})
            spent[module.get(event["args"]["hlo_op"], "rest")] += time
    whole = sum(spent.values())
    return {name: time / whole for name, time in spent.most_common()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work")
    parser.add_argument("shape", choices=work.SHAPES)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--bfloat16", action="store_true")
    given = parser.parse_args()
    if "GLIBC_TUNABLES" not in os.environ:  # read when a process starts
        os.environ |= SETTINGS
        os.execv(sys.executable, sys.orig_argv)
    dump, trace = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={dump} --xla_dump_hlo_as_text"
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

    import jax

    from benchmarks import ours

    options = {"batch": given.batch, "compute_dtype": "bfloat16" if given.bfloat16 else None}
    options = {name: value for name, value in options.items() if value is not None}
    round_ = ours.WORKS[given.work](work.SHAPES[given.shape], **options)
    for _ in range(2):
        round_()
    with jax.profiler.trace(str(trace)):
        round_()
    lines = [[name, f"{share:.1%}"] for name, share in shares(trace, dump).items()]
    print("\n".join(markdown([["part", "share"], *lines])))


if __name__ == "__main__":
    main()

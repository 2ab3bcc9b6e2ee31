"""Counts what a reader of this package walks through: `python -m tests.house [--walks]`.

Sizes are read from the syntax trees. A walk is recorded: a tiny run is started through the front
door, and the profiler notes which functions of the package carry a value of the configuration that
occurs nowhere else, or handle prompts. Bounds of all counts are in tests/test_house.py.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rlhf_jax"
ANNEXES = (
    "tasks",
    "environments",
    "hub",
    "report",
    "oracle",
    "plan",
    "sweep",
    "label",
    "labelers",
    "filter",
    "synthesize",
    "judges",
    "claims",
)


@dataclass(frozen=True)
class Function:
    """A function of the package as its source has it."""

    file: str
    name: str
    lines: int
    parameters: int  # without self and cls


def functions() -> Iterator[Function]:
    """Yields every function of the package, nested ones and methods too."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                names = [a.arg for a in named if a.arg not in ("self", "cls")]
                several = [a for a in (node.args.vararg, node.args.kwarg) if a]
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                yield Function(
                    path.relative_to(PACKAGE).as_posix(),
                    node.name,
                    length,
                    len(names) + len(several),
                )


def lines() -> dict[str, int]:
    """Returns the lines of Python in the core and in each annex."""
    counts = dict.fromkeys(("core", *ANNEXES), 0)
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0]
        counts[room if room in ANNEXES else "core"] += len(path.read_text("utf-8").splitlines())
    return counts


def files_that_name(names: set[str]) -> set[str]:
    """Returns the files of the package in which one of the strings stands by itself in code."""
    named = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and node.value in names:
                named.add(path.relative_to(PACKAGE).as_posix())
    return named


@dataclass
class Walk:
    """The functions that were seen, as (file, qualified name), and the types that held prompts."""

    functions: set[tuple[str, str]] = field(default_factory=set)
    containers: set[str] = field(default_factory=set)

    @property
    def files(self) -> set[str]:
        """The files of those functions."""
        return {file for file, _ in self.functions}


def _place(frame: FrameType) -> tuple[str, str] | None:
    """The file and name of a frame's function; None outside the package and for `<lambda>`s."""
    path, name = frame.f_code.co_filename, frame.f_code.co_qualname
    if not path.startswith(f"{PACKAGE}/") or name.endswith(">"):
        return None
    return path.removeprefix(f"{PACKAGE}/"), name


def _stack(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    while frame is not None:
        if place := _place(frame):
            yield place
        frame = frame.f_back


def _held(value: Any) -> list[Any]:
    """What a value is made of, one level down."""
    if isinstance(value, functools.partial):
        return [*value.args, *value.keywords.values()]
    if isinstance(value, Mapping):
        return list(value.values())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, each.name) for each in dataclasses.fields(value)]
    return []


def _is(value: Any, number: float) -> bool:
    return isinstance(value, float) and value == number


# A walk of a number leaves out who only keeps or shows the whole configuration.
NOT_ON_THE_WAY = ("training/rundir.py", "training/origin.py", "report/")


@contextlib.contextmanager
def recorded(note: Callable[[FrameType], None]) -> Iterator[None]:
    """Calls `note` with the frame of every function of the package that is called meanwhile."""

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and _place(frame):
            note(frame)

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)


def walk_of_number(number: float, run: Callable[[], None]) -> Walk:
    """Records the functions on the way of a number of the configuration to where it is used.

    Those are all that are running when a function is called with the number, or with an object
    that holds it directly, such as the options of a loss.
    """
    walk = Walk()

    def note(frame: FrameType) -> None:
        file, _ = _place(frame) or ("", "")
        if file.startswith(NOT_ON_THE_WAY):
            return
        for value in list(frame.f_locals.values()):
            if _is(value, number) or any(_is(each, number) for each in _held(value)):
                walk.functions.update(_stack(frame))
                return

    with recorded(note):
        run()
    return walk


def walk_of_prompts(token: int, run: Callable[[], None]) -> Walk:
    """Records what handles a prompt between its file and the advantages of its answers.

    That is every function that is called with something that holds the text `TOLD` or, in a list
    or array of integers, its token, and all functions that are running meanwhile.
    """
    walk, arrived = Walk(), []

    def holds(value: Any, depth: int = 4) -> bool:
        if isinstance(value, str):
            return TOLD in value
        if isinstance(value, np.ndarray):
            return value.dtype.kind == "i" and value.ndim > 0 and bool((value == token).any())
        if isinstance(value, list | tuple) and len(value) > 1 and type(value[0]) is int:
            return token in value
        parts = value if isinstance(value, list | tuple) else _held(value)
        held = depth > 0 and any(holds(part, depth - 1) for part in parts[:30])
        if held and type(value).__module__.startswith("rlhf_jax."):
            walk.containers.add(type(value).__name__)
        return held

    def note(frame: FrameType) -> None:
        if arrived:
            return
        file, name = _place(frame) or ("", "")
        if file.startswith("rl/") and name == "advantages":
            arrived.append(True)
        elif not any(map(holds, list(frame.f_locals.values()))):
            return
        walk.functions.update(_stack(frame))

    with recorded(note):
        run()
    return walk


TOLD = "Wilhelmina"  # occurs in every prompt of the recorded runs and makes a token of its own

EXPERIMENTS = """
from rlhf_jax.stages import defaults

TRAIN = dict(steps=1, log_every=1, tensorboard=False)
EVAL = dict(source="prompts.jsonl", count=2, max_new_tokens=4)
SHARED = dict(train=TRAIN, eval=EVAL | dict(during=2))


def get_config(stage):
    if stage == "pretrain":
        return defaults.base(
            "pretrain",
            model=defaults.model("tiny", layers=1, width=16, heads=1, kv_heads=1, head_dim=16,
                                 mlp_width=16),
            tokenizer=dict(kind="bpe", vocab_size=300),
            data=dict(train="texts.jsonl", validation="texts.jsonl", row_length=128),
            batch=dict(rows=1), train=TRAIN,
        )
    data = dict(validation="pairs.jsonl", row_length=256)
    if stage == "preference":
        return defaults.base(
            "preference", init=dict(policy="experiment.py:pretrain"), batch=dict(rows=1),
            data=data | dict(train="pairs.jsonl"), **SHARED,
        )
    return defaults.on_policy(
        "ppo", init=dict(policy="experiment.py:pretrain"), batch=dict(rows=1),
        data=data | dict(train="prompts.jsonl", validation="prompts.jsonl"),
        rollout=dict(prompts=2, samples=1, slots=2, max_new_tokens=4),
        reward=dict(scorers="length=-0.01"), **SHARED,
    )
"""


@contextlib.contextmanager
def experiments() -> Iterator[Callable[..., None]]:
    """Yields a function that runs `stage` with further flags; a base model is trained before it."""
    from rlhf_jax import main

    texts = [{"text": f"{TOLD} walks to the market and buys {n} eggs."} for n in range(40)]
    turns = [[{"role": "user", "content": f"Where is {TOLD} {n}?"}] for n in range(8)]
    pairs = [{"prompt": turn, "chosen": "At home.", "rejected": "I don't know."} for turn in turns]
    prompts = [{"messages": turn} for turn in turns]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("experiment.py").write_text(EXPERIMENTS)
        for name, records in {"texts": texts, "pairs": pairs, "prompts": prompts}.items():
            Path(f"{name}.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))

        def run(stage: str, *flags: str) -> None:
            said = io.StringIO()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                code = main.main([f"--config=experiment.py:{stage}", *flags])
            if code:
                raise RuntimeError(f"{stage} ended with {code}:\n{said.getvalue()}")

        run("pretrain")
        yield run


def _on_the_way(walk: Walk) -> Walk:
    return Walk({f for f in walk.functions if not f[0].startswith(NOT_ON_THE_WAY)})


def walks() -> dict[str, Walk]:
    """Returns the recorded walks by name: "beta", "clip" and "prompt"."""
    from rlhf_jax.training.saved_model import load_tokenizer

    with experiments() as run:
        (token,) = load_tokenizer(Path("runs/experiment-pretrain")).encode_texts([TOLD])[0]
        beta = walk_of_number(0.1003, lambda: run("preference", "--config.loss.beta=0.1003"))
        clip = walk_of_number(0.2003, lambda: run("ppo", "--config.loss.clip_low=0.2003"))
        prompt = walk_of_prompts(token, lambda: run("ppo", "--workdir=runs/again"))
    return {"beta": _on_the_way(beta), "clip": _on_the_way(clip), "prompt": prompt}


def sizes() -> dict[str, int]:
    """Returns the counts that the sources tell, by name."""
    from rlhf_jax.config import leaves
    from rlhf_jax.losses.policy import OBJECTIVES
    from rlhf_jax.rl.objectives import ADVANTAGES
    from rlhf_jax.stages.defaults import STAGES
    from tests.fields import fields_of

    every, of_parts = list(functions()), lines()
    fields = {stage: set(leaves(fields_of(stage))) for stage in STAGES}
    losses = set(OBJECTIVES) - {"ppo"}  # which is an algorithm's name too
    kinds = set(ADVANTAGES) - {"group"}  # which is a scale's name too
    return {
        "lines of the core": of_parts["core"],
        "lines with the annexes": sum(of_parts.values()),
        "functions over 60 lines": sum(f.lines > 60 for f in every),
        "functions over 80 lines": sum(f.lines > 80 for f in every),
        "functions over 8 parameters": sum(f.parameters > 8 for f in every),
        "functions over 10 parameters": sum(f.parameters > 10 for f in every),
        "fields of all stages": len(set().union(*fields.values())),
        "fields of PPO": len(fields["policy"]),
        "files that name a policy loss": len(files_that_name(losses)),
        "files that name an advantage": len(files_that_name(kinds)),
    }


def walked() -> dict[str, int]:
    """Returns the counts that the walks tell, by name."""
    table = {}
    for name, walk in walks().items():
        table[f"functions on the walk of {name}"] = len(walk.functions)
        table[f"files on the walk of {name}"] = len(walk.files)
        if walk.containers:
            table[f"containers on the walk of {name}"] = len(walk.containers)
    return table


if __name__ == "__main__":
    if "--walks" in sys.argv:
        for name, walk in walks().items():
            print(name, *sorted(walk.containers))
            for file, function in sorted(walk.functions):
                print(f"  {file:32} {function}")
    elif "--json" in sys.argv:
        print(json.dumps(walked()))
    else:
        for name, count in (sizes() | walked()).items():
            print(f"{count:7,}  {name}")

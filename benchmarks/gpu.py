"""One NVIDIA GPU in under nine minutes: python -m benchmarks.gpu [--peer-python=PYTHON].

Prints a table of rates beside what the card's own matrix products and copies allow, measured in the
same run, beside what `rlhf_jax.plan` expects of the updates, and beside transformers and TRL where
PYTHON has them (requirements-peers.txt, torch for CUDA). A part that fails or takes too long costs
one line, not the others. With --reduced all parts run at toy sizes on any machine, to see that they
work: those numbers mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import work

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 530  # for all parts together
NAMES = ("limits", "sft", "decode", "grpo", "dpo")
PART_SECONDS = {"limits": 40, "sft": 150, "decode": 110, "grpo": 110, "dpo": 80}
PEER_SECONDS = 60  # a part


@dataclass(frozen=True)
class Shape(work.Shape):
    """A Llama with grouped queries and tied embeddings."""

    kv_heads: int = 8

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def body_numbers(self) -> int:
        attention = 2 * self.width**2 + 2 * self.width * self.kv_heads * self.head_dim
        return self.layers * (attention + 3 * self.width * self.mlp_width)

    def cache_bytes(self, tokens: float) -> float:
        """Keys and values of so many tokens in bfloat16."""
        return 2.0 * 2 * self.layers * self.kv_heads * self.head_dim * tokens


@dataclass(frozen=True)
class Size:
    """How large everything is.

    Attributes:
      side: of the square products. copied: bytes. steps: timed updates. repeats: of any timing.
      prompt, new: tokens of decoding. groups, group, question, answer: of GRPO. pairs: of DPO.
    """

    shape: Shape
    attention: str
    side: int = 8192
    copied: int = 4 << 30
    steps: int = 5
    repeats: int = 3
    remats: tuple[str, ...] = ("dots", "none")
    batches: tuple[int, ...] = (1, 16, 128)
    prompt: int = 128
    new: int = 256
    groups: int = 8
    group: int = 8
    question: int = 128
    answer: int = 256
    pairs: int = 8


# Llama-3.2-1B's shape; https://huggingface.co/meta-llama/Llama-3.2-1B
FULL = Size(Shape(16, 2048, 32, 8192, 128_256, 2048, rows=8, steps=1), "cudnn")
REDUCED = Size(
    Shape(1, 32, 4, 64, 256, 64, rows=2, steps=1, kv_heads=2), "xla", side=128, copied=1 << 20,
    steps=1, repeats=1, remats=("dots",), batches=(2,), prompt=8, new=8, groups=2, group=2,
    question=8, answer=8, pairs=2,
)  # fmt: skip

Line = dict[str, Any]  # of the table: name, rate, unit and, where there are, bound and target


def limits(size: Size, found: dict[str, float]) -> Iterator[Line]:
    """What the card does at most: bfloat16 products with float32 sums, and copies."""
    import jax
    import jax.numpy as jnp

    keys = jax.random.split(jax.random.key(0), 2)  # random: zeros run faster than data does
    x, y = (jax.random.normal(k, (size.side, size.side), jnp.bfloat16) for k in keys)
    rate = 2.0 * size.side**3 / _seconds(jax.jit(jnp.matmul), x, y)
    yield {"name": "limit: bfloat16 products", "key": "flops", "rate": rate, "unit": "FLOP"}
    data = jax.random.normal(keys[0], (size.copied // 4,), jnp.float32)
    rate = 2.0 * size.copied / _seconds(jax.jit(jnp.negative), data)
    yield {"name": "limit: copy, read and written", "key": "bytes", "rate": rate, "unit": "B"}


def _seconds(function: Callable, *arrays: Any, calls: int = 10) -> float:
    """Of one call in a queue of them, so that dispatch is hidden: the median of seven queues."""
    import jax

    jax.block_until_ready(function(*arrays))
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        for _ in range(calls):
            out = function(*arrays)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - begun) / calls)
    return median(times)


def model_config(size: Size, **changes: Any):
    """The shape as a model of ours, computing in bfloat16 from float32 parameters."""
    from rlhf_jax.models import ModelConfig

    shape = size.shape
    fields: dict[str, Any] = {
        "vocab_size": shape.vocab_size, "layers": shape.layers, "width": shape.width,
        "heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim,
        "mlp_width": shape.mlp_width, "max_length": 2 * shape.context, "rope_theta": 500_000.0,
        "compute_dtype": "bfloat16", "remat": "dots", "attention": size.attention,
    }  # fmt: skip
    return ModelConfig(**fields | changes).validate()


def _updates(
    size: Size, config: Any, loss_fn: Callable, batches: list[dict]
) -> tuple[float, float | None]:
    """Seconds an update, AdamW with float32 state and clipping at 1: measured, and by the plan."""
    import jax

    from rlhf_jax.models import init
    from rlhf_jax.training.optimizer import OptimizerConfig, make_optimizer
    from rlhf_jax.training.state import init_state
    from rlhf_jax.training.step import make_step

    optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=1e-5, schedule="constant"), 10**6)
    step = make_step(loss_fn, optimizer, max_grad_norm=1.0)
    state = init_state(init(config, jax.random.key(0)), optimizer)
    placed = [jax.device_put(batch) for batch in batches]
    order = itertools.cycle(placed)
    planned = _planned(config, step.lower(state, placed[0]), batches[0]["tokens"].shape)
    for _ in range(2):
        state, metrics = step(state, next(order))
        float(metrics["train/loss"])
    times = []
    for _ in range(size.repeats):
        begun = time.perf_counter()
        for _ in range(size.steps):
            state, metrics = step(state, next(order))
        loss = float(metrics["train/loss"])
        times.append((time.perf_counter() - begun) / size.steps)
    if not 0 < loss < 100:
        raise RuntimeError(f"the loss is {loss}")
    return median(times), planned


def _planned(config: Any, lowered: Any, shape: tuple[int, ...]) -> float | None:
    """Seconds of an update of rows of that shape by `plan.estimates`; None on an unknown card."""
    import jax

    from rlhf_jax.plan.chips import CHIPS
    from rlhf_jax.plan.estimates import estimate
    from rlhf_jax.plan.steps import PASSES, Step

    words = set(re.split(r"\W+", jax.devices()[0].device_kind.lower()))
    cards = CHIPS if not words & {"pcie", "nvl"} else {}  # which are slower under the same name
    chip = next((chip for name, chip in cards.items() if chip.target and name in words), None)
    if chip is None:
        return None
    scores = 2 * shape[0] * shape[1] ** 2 * config.heads * config.head_dim * config.layers
    step = Step(
        "update", lambda: lowered, {}, math.prod(shape), 0.0, PASSES * scores, logits=0, calls=1
    )
    return estimate(step, chip, 1).seconds


def _batches(rows: dict[str, Any], each: int, count: int) -> list[dict]:
    """The first `count` batches of so many rows."""
    count = min(count, len(rows["tokens"]) // each)
    return [{k: x[i * each : (i + 1) * each] for k, x in rows.items()} for i in range(count)]


def sft(size: Size, found: dict[str, float]) -> Iterator[Line]:
    """Packed rows of uneven documents; the share is of FLOPs that tokens, not padding, need."""
    from rlhf_jax.data.packing import Document, pack_documents
    from rlhf_jax.models.fused_attention import check_attention
    from rlhf_jax.models.scoring import target_cross_entropy

    shape = size.shape
    check_attention(model_config(size), 2 * shape.context)  # a wrong kernel's speed is no result
    texts = work.sequences(8 * shape.rows, shape)
    documents = [Document(text, [0, *[1] * (len(text) - 1)]) for text in texts]
    rows, _ = pack_documents(documents, shape.context)
    batches = _batches(rows, shape.rows, 2)
    real = [_lengths(batch["segment_ids"]) for batch in batches]
    tokens = sum(map(sum, real)) / len(real)
    passes = [work.forward_flops(shape, 0, [length]) for each in real for length in each]
    flops = 3 * sum(passes) / len(real)
    for remat in size.remats:
        config = model_config(size, remat=remat)

        def loss_fn(params, batch, rng, config=config):
            return target_cross_entropy(config, params, batch)

        line = {"name": f"SFT, rows of {shape.context}, remat {remat}", "unit": "tokens"}
        line |= _rates(tokens, *_updates(size, config, loss_fn, batches))
        yield line | {"target": 0.55} | _bound(found, "flops", flops / tokens)


def _rates(count: float, seconds: float, planned: float | None) -> dict[str, float]:
    """What an update that works on so many did a second, and what the plan says it would."""
    return {"rate": count / seconds} | ({"planned": count / planned} if planned else {})


def _bound(found: dict[str, float], key: str, each: float) -> dict[str, float]:
    """The rate at which the card's limit is reached by what takes so much of it each."""
    return {"bound": found[key] / each} if key in found else {}


def _lengths(segment_ids: Any) -> list[int]:
    """Of the documents of packed rows."""
    import numpy as np

    return [int(n) for row in segment_ids for n in np.bincount(row)[1:] if n]


def decode(size: Size, found: dict[str, float]) -> Iterator[Line]:
    """New tokens beyond the first: bound by reading weights in bfloat16 and the cache once each."""
    import jax

    from rlhf_jax.models import init
    from rlhf_jax.sampling.arguments import Sampling
    from rlhf_jax.sampling.generate import generate

    shape, config = size.shape, model_config(size)
    params = init(config, jax.random.key(0))
    seeds = itertools.count()
    for batch in size.batches:
        prompts = work.full_rows(batch, shape)[:, : size.prompt].tolist()

        def seconds(new: int, prompts=prompts, batch=batch) -> float:
            begun = time.perf_counter()
            sampling = Sampling(new, batch_size=batch, cache_length=size.prompt + size.new)
            made = generate(config, params, prompts, sampling, seed=next(seeds))
            assert sum(len(each.tokens) for each in made) == batch * new
            return time.perf_counter() - begun

        seconds(2)
        times = [seconds(size.new) - seconds(1) for _ in range(size.repeats)]
        rate = batch * (size.new - 1) / median(times)
        held = batch * (size.prompt + size.new / 2)
        read = 2.0 * shape.matrix_numbers + shape.cache_bytes(held)
        line = {"name": f"decoding, batch {batch}", "rate": rate, "unit": "tokens"}
        target = {"target": 0.7} if batch == 1 else {}
        yield line | target | _bound(found, "bytes", read / batch)


def variety(tokens: list[int]) -> float:
    """A reward that costs nothing: the share of tokens that are different."""
    return len(set(tokens)) / max(1, len(tokens))


def grpo(size: Size, found: dict[str, float]) -> Iterator[Line]:
    """Sampling, scoring and one update of groups, β = 0.04; answers do not stop early."""
    import jax
    import numpy as np

    from rlhf_jax.data.records import Message, Prompt
    from rlhf_jax.models import init
    from rlhf_jax.models.scoring import target_statistics
    from rlhf_jax.rl.layout import Rollout, pack_rows
    from rlhf_jax.rl.on_policy import Task, first_state, iterate, make_trainer
    from rlhf_jax.sampling.arguments import Sampling
    from rlhf_jax.sampling.generate import generate
    from rlhf_jax.stages import defaults
    from rlhf_jax.tasks.prompts import PromptSet

    share = max(1, size.group // 2)
    length = size.question + share * size.answer
    rows_each = size.groups * size.group // share
    config = defaults.on_policy(
        "grpo",
        data={"row_length": length},
        batch={"rows": rows_each},
        rollout={"prompts": size.groups, "samples": size.group},
        kl={"coefficient": 0.04},
        train={"minibatches": 1},
        optimizer={"learning_rate": 1e-6, "schedule": "constant"},
    )
    model = model_config(size, max_length=max(2 * size.shape.context, length))
    questions = work.full_rows(64 * size.groups, size.shape)[:, : size.question].tolist()

    sampling = Sampling(
        size.answer,
        samples_per_prompt=size.group,
        batch_size=size.groups * size.group,
        cache_length=size.question + size.answer,
    )
    records = [Prompt(str(i), (Message("user", ""),)) for i in range(size.groups)]

    def rollout(params: Any, batch: Any, number: int) -> Rollout:
        asked = questions[number % 64 * size.groups :][: size.groups]
        made = generate(model, params, asked, sampling, seed=number)
        drawn = Rollout.of(PromptSet(records, asked), made, [""] * len(made), size.answer)
        rows = pack_rows(
            drawn,
            row_length=length,
            max_prompt=size.question,
            multiple=rows_each,
            shortest=size.answer,
        )
        return dataclasses.replace(
            drawn,
            scores=np.array([variety(c.tokens) for c in made]),
            weights=np.ones(len(made), np.float32),
            greedy_scores=np.zeros(size.groups),
            finished=np.ones(len(made), bool),
            rows=rows,
        )

    def statistics(params: Any, rows: Any) -> Any:
        return target_statistics(model, params, rows)

    task = Task(rollout=rollout, statistics=statistics, dtype="bfloat16")
    trainer = make_trainer(defaults.resolve(config), task, init(model, jax.random.key(0)))
    state = first_state(trainer)
    times = []
    for number in range(size.repeats + 1):
        begun = time.perf_counter()
        state, metrics, _ = iterate(trainer, state, {"row_ids": np.arange(size.groups)})
        jax.block_until_ready((state, metrics))
        if number:
            times.append(time.perf_counter() - begun)
    name = f"GRPO, {size.groups} x {size.group} answers of {size.answer}"
    yield {"name": name, "rate": 1 / median(times), "unit": "updates", "ratio": 2.0}


def dpo(size: Size, found: dict[str, float]) -> Iterator[Line]:
    """Pairs with one copy of their prompt, the reference's log-probs computed before."""
    import numpy as np

    from benchmarks.ours import dpo_loss
    from rlhf_jax.data.packing import Group, pack_groups

    shape, config = size.shape, model_config(size)
    groups = [
        Group(prompt, (chosen, rejected), i)
        for i, (prompt, chosen, rejected) in enumerate(work.pairs(4 * size.pairs, shape))
    ]
    rows, _ = pack_groups(groups, 2 * shape.context, branches=2)
    batches = _batches(rows, max(1, len(rows["tokens"]) // 4), 4)
    pairs = sum(float(batch["valid"].sum()) for batch in batches) / len(batches)
    batches = [b | {"reference": np.full(b["lengths"].shape, -9.0, np.float32)} for b in batches]

    loss_fn = dpo_loss(config, beta=0.001)  # of untrained sums of hundreds of nats
    rates = _rates(pairs, *_updates(size, config, loss_fn, batches))
    yield {"name": "DPO, shared prompts", "unit": "pairs"} | rates


PARTS = {"limits": limits, "sft": sft, "decode": decode, "grpo": grpo, "dpo": dpo}


def lines_of(name: str, size: Size, found: dict[str, float]) -> Iterator[Line]:
    """Those of one part, as they come; what goes wrong is the last of them."""
    try:
        yield from PARTS[name](size, found)
    except Exception as error:  # the other parts are still worth having
        text = (str(error).strip() or "no message").splitlines()[0]
        yield {"name": name, "failed": f"{type(error).__name__}: {text[:300]}"}


def lines_elsewhere(command: list[str], name: str, seconds: float) -> Iterator[Line]:
    """The JSON lines of a process of its own, whose GPU memory goes with it."""
    # Not the three quarters of the card's memory that JAX takes by default.
    settings = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | settings, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=seconds)
        failed = None
        if process.returncode:
            failed = (errors.strip() or f"exit code {process.returncode}").splitlines()[-1][:300]
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        failed = f"took more than {seconds:.0f} s"
    for line in out.splitlines():
        if line.startswith("{") and line.endswith("}"):  # a killed process may leave half a line
            yield json.loads(line)
    if failed:
        yield {"name": name, "failed": failed}


def table(lines: list[Line], peers: dict[str, Line]) -> list[str]:
    """Markdown lines."""
    rows = [
        "| work | ours | of the bound | target | transformers, TRL | ratio | target | of plan |",
        f"|{'---|' * 8}",
    ]
    for line in lines:
        if "failed" in line:
            rows.append(f"| {line['name']} | failed: {line['failed']} | | | | | | |")
            continue
        cells = [line["name"], _rate(line), *["–"] * 6]
        if "bound" in line:
            cells[2] = f"{line['rate'] / line['bound']:.0%}"
        if "target" in line:
            cells[3] = f"≥ {line['target']:.0%}"
        peer = peers.get(line["name"].partition(", remat")[0])
        if peer is not None:
            cells[4] = peer["failed"] if "failed" in peer else _rate(peer)
            if "rate" in peer:
                cells[5] = f"{line['rate'] / peer['rate']:.2f}"
        if "ratio" in line:
            cells[6] = f"≥ {line['ratio']:g}"
        if "planned" in line:
            cells[7] = f"{line['rate'] / line['planned']:.0%}"
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _rate(line: Line) -> str:
    for size, prefix in ((1e12, "T"), (1e9, "G")):
        if line["unit"] in ("FLOP", "B") and line["rate"] >= size:
            return f"{line['rate'] / size:,.1f} {prefix}{line['unit']}/s"
    return f"{line['rate']:,.4g} {line['unit']}/s"


def has_gpu() -> bool:
    """Whether JAX sees an NVIDIA GPU, asked in a process that then lets go of it."""
    code = "import jax; raise SystemExit(jax.default_backend() != 'gpu')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def measure(size: Size, *, reduced: bool, peer_python: str | None) -> tuple[list[Line], dict]:
    """(our lines, the peers' by name): parts one after the other while there is time."""
    deadline = time.monotonic() + SECONDS
    lines: list[Line] = []
    peers: dict[str, Line] = {}
    found: dict[str, float] = {}
    for name in NAMES:
        if reduced:
            made = lines_of(name, size, found)
        else:
            words = [f"--part={name}", f"--found={json.dumps(found)}"]
            left = min(PART_SECONDS[name], deadline - time.monotonic())
            command = [sys.executable, "-m", "benchmarks.gpu", *words]
            made = lines_elsewhere(command, name, max(1.0, left))
        for line in made:
            lines.append(line)
            found |= {line["key"]: line["rate"]} if "key" in line else {}
            print(table([line], {})[-1], flush=True)
    for name in NAMES[1:] if peer_python else ():
        command = [str(peer_python), "-m", "benchmarks.gpu_peers", name]
        left = min(PEER_SECONDS, deadline - time.monotonic())
        for line in lines_elsewhere(command + ["--reduced"] * reduced, name, max(1.0, left)):
            peers[line["name"]] = line
            print(f"peer: {line}", flush=True)
    return lines, peers


def main(argv: list[str] | None = None) -> int:
    """Runs one command line and returns the exit code: 0, or 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python")
    parser.add_argument("--reduced", action="store_true")
    parser.add_argument("--out", default="benchmarks-gpu.json")
    parser.add_argument("--part", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--found", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    size = REDUCED if given.reduced else FULL
    if given.part:
        for line in lines_of(given.part, size, given.found):
            print(json.dumps(line), flush=True)
        return 0
    if not given.reduced and not has_gpu():
        print("error: JAX sees no NVIDIA GPU here; --reduced runs anywhere", file=sys.stderr)
        return 2
    lines, peers = measure(size, reduced=given.reduced, peer_python=given.peer_python)
    print("\n".join(table(lines, peers)))
    document = {"size": dataclasses.asdict(size), "lines": lines, "peers": peers}
    Path(given.out).write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

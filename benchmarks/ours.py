"""Our side of a benchmark: python -m benchmarks.ours WORK SHAPE [--batch=N] [--bfloat16]."""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from benchmarks import work
from benchmarks.worker import Turns, serve
from rlhf_jax.cache import keep_compilations
from rlhf_jax.data.packing import Document, Group, pack_documents, pack_groups
from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.devices import split_cores
from rlhf_jax.hub.hub_tokenizer import HubTokenizer
from rlhf_jax.hub.tokenizer_settings import TokenizerSettings
from rlhf_jax.losses.preference import Pairs, Sigmoid, preference_loss
from rlhf_jax.losses.reward import bradley_terry
from rlhf_jax.malloc import give_back
from rlhf_jax.models import ModelConfig, init
from rlhf_jax.models.scoring import sequence_logprobs, sequence_scores, target_cross_entropy
from rlhf_jax.rl.judge import Judge
from rlhf_jax.rl.on_policy import first_state, iterate, make_trainer
from rlhf_jax.rl.rollouts import text_task
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import generate
from rlhf_jax.stages import defaults
from rlhf_jax.stages.policy import critic_params
from rlhf_jax.tasks.prompts import PromptSet
from rlhf_jax.training.optimizer import OptimizerConfig, make_optimizer
from rlhf_jax.training.saved_model import Model, save_model
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_step

Round = Callable[[], float]  # works off so many units


def model_config(shape: work.Shape, **changes) -> ModelConfig:
    """The shape as a model of ours."""
    fields = {
        "vocab_size": shape.vocab_size,
        "layers": shape.layers,
        "width": shape.width,
        "heads": shape.heads,
        "kv_heads": shape.heads,
        "head_dim": shape.width // shape.heads,
        "mlp_width": shape.mlp_width,
        "max_length": 2 * shape.context,
        "tied_embeddings": False,
    }
    return ModelConfig(**fields | changes).validate()


def training(
    config: ModelConfig, loss_fn: Callable, batches: list[dict], units: list[float], steps: int
) -> Round:
    """A round of updates with AdamW and clipping at 1; the batches go round."""
    optimizer, _ = make_optimizer(OptimizerConfig(learning_rate=1e-4, schedule="constant"), 10**6)
    step = make_step(loss_fn, optimizer, max_grad_norm=1.0)
    state = init_state(init(config, jax.random.key(0)), optimizer)
    order = itertools.cycle(range(len(batches)))

    def round_() -> float:
        nonlocal state
        done = 0.0
        for _ in range(steps):
            i = next(order)
            state, metrics = step(state, batches[i])
            done += units[i]
        jax.block_until_ready(metrics)
        return done

    return round_


def in_batches(rows: dict[str, np.ndarray], updates: float) -> list[dict[str, np.ndarray]]:
    """About `updates` batches of as many rows each, in a random order; rows left over are out."""
    count = len(rows["tokens"])
    size = max(1, round(count / updates))
    order = np.random.default_rng(0).permutation(count)[: count // size * size]
    parts = np.split(order, len(order) // size)
    return [{name: x[part] for name, x in rows.items()} for part in parts]


def tokens_of(batch: dict[str, np.ndarray]) -> float:
    """Those that are no padding."""
    return float(np.count_nonzero(batch["segment_ids"]))


def language(
    shape: work.Shape, tokens: list[list[int]], updates: float, steps: int, **changes
) -> Round:
    """Updates of a language model on packed sequences, every token a target."""
    config = model_config(shape, **changes)
    documents = [Document(each, [0, *[1] * (len(each) - 1)]) for each in tokens]
    rows, _ = pack_documents(documents, shape.context)
    batches = in_batches(rows, updates)

    def loss_fn(params, batch, rng):
        return target_cross_entropy(config, params, batch)

    return training(config, loss_fn, batches, [tokens_of(batch) for batch in batches], steps)


def pretrain(shape: work.Shape, **changes) -> Round:
    """Full rows."""
    rows = work.full_rows(shape.steps * shape.rows, shape).tolist()
    return language(shape, rows, shape.steps, shape.steps, **changes)


def sft(shape: work.Shape, *, full: bool = False, steps: int | None = None, **changes) -> Round:
    """Uneven sequences, packed: as many an update as the peer's rows hold on the average.

    With `full` an update has shape.rows packed rows, as a peer has that packs.
    """
    found = work.sequences(work.UPDATES * shape.rows, shape)
    rows = sum(map(len, found)) / shape.context
    updates = rows / shape.rows if full else work.UPDATES
    return language(shape, found, updates, steps or shape.steps, **changes)


def packed_pairs(shape: work.Shape) -> list[dict[str, np.ndarray]]:
    """Batches of about work.PAIRS pairs, a prompt shared by its two answers.

    Rows are no longer than the longest pair asks: what shares a row is compared in vain.
    """
    pairs = work.pairs(work.UPDATES * work.PAIRS, shape)
    groups = [Group(prompt, (a, b), i) for i, (prompt, a, b) in enumerate(pairs)]
    longest = max(len(prompt) + len(a) + len(b) for prompt, a, b in pairs)
    rows, _ = pack_groups(groups, -(-longest // 32) * 32, branches=2)
    return in_batches(rows, work.UPDATES)


def pairs_of(batch: dict[str, np.ndarray]) -> float:
    return float(batch["valid"].sum())


def dpo_loss(config: ModelConfig, beta: float) -> Callable:
    """Of packed pairs, with the reference's log-probs [B, P, 2] beside them."""

    def loss_fn(params, batch, rng):
        policy = sequence_logprobs(config, params, batch).reshape(-1, 2)
        theirs = batch["reference"].reshape(-1, 2)
        lengths = batch["lengths"].reshape(-1, 2)
        pairs = Pairs(*policy.T, *theirs.T, *lengths.T, batch["valid"].reshape(-1))
        return preference_loss(Sigmoid(beta), pairs)

    return loss_fn


def dpo(shape: work.Shape, **changes) -> Round:
    """The reference's log-probs come with the rows, as in our stage."""
    config = model_config(shape, **changes)
    reference = init(config, jax.random.key(1))
    score = jax.jit(partial(sequence_logprobs, config))
    batches = packed_pairs(shape)
    batches = [b | {"reference": np.asarray(score(reference, b))} for b in batches]
    loss_fn = dpo_loss(config, beta=0.1)
    return training(config, loss_fn, batches, [pairs_of(batch) for batch in batches], shape.steps)


def reward(shape: work.Shape, **changes) -> Round:
    """Bradley–Terry on the same pairs."""
    config = model_config(shape, head="scalar", **changes)
    batches = packed_pairs(shape)

    def loss_fn(params, batch, rng):
        scores = sequence_scores(config, params, batch).reshape(-1, 2)
        return bradley_terry(scores[:, 0], scores[:, 1], batch["valid"].reshape(-1))

    return training(config, loss_fn, batches, [pairs_of(batch) for batch in batches], shape.steps)


def generation(shape: work.Shape, *, batch: int = 1, **changes) -> Round:
    """New tokens of completions that do not stop, sampled at temperature 1."""
    config = model_config(shape, **changes)
    params = init(config, jax.random.key(0))
    prompts = work.full_rows(batch, shape)[:, : work.PROMPT].tolist()
    seeds, sampling = itertools.count(), Sampling(work.GENERATED, batch_size=batch)

    def round_() -> float:
        found = generate(config, params, prompts, sampling, seed=next(seeds))
        return float(sum(len(completion.tokens) for completion in found))

    return round_


def start_of(shape: work.Shape, **changes) -> Model:
    """A policy as it starts. Its answers are of full length, as the peer's."""
    config = model_config(shape, **changes)
    tokenizer = HubTokenizer(work.tokenizer_json(shape), TokenizerSettings("</s>", "<s>"))
    assert tokenizer.hash  # kept, as its file has it, before no id ends a reply any more
    tokenizer.ends = ()
    return Model(config, init(config, jax.random.key(0)), tokenizer)


def on_policy(shape: work.Shape, config: ConfigDict, policy: Model, judge: Judge) -> Round:
    """One iteration of the policy stage, on random prompts."""
    each = config.rollout.prompts
    rows = work.full_rows(64 * each, shape)[:, : work.QUESTION]
    words = [policy.tokenizer.decode(row) for row in rows]
    records = [Prompt(str(i), (Message("user", text),)) for i, text in enumerate(words)]
    prompts = PromptSet(records, rows.tolist())
    task = text_task(config, policy, judge, None)
    trainer = make_trainer(config, task, policy.params, critic_params(config, policy, judge))
    state = first_state(trainer)
    order = itertools.cycle(np.arange(len(rows), dtype=np.int32).reshape(-1, each))

    def round_() -> float:
        nonlocal state
        state, metrics, _ = iterate(trainer, state, prompts.take(next(order).tolist()))
        assert metrics["rollout/tokens"] == each * config.rollout.samples * work.ANSWER
        return 1.0

    return round_


def sampling(prompts: int, samples: int) -> dict[str, int]:
    return {
        "prompts": prompts,
        "samples": samples,
        "max_prompt_tokens": work.QUESTION,
        "max_new_tokens": work.ANSWER,
    }


def grpo(shape: work.Shape, **changes) -> Round:
    """β = 0.04, one update an iteration; a row holds a prompt and half of its answers."""
    config = defaults.on_policy(
        "grpo",
        data={"row_length": work.QUESTION + work.GROUP // 2 * work.ANSWER},
        rollout=sampling(work.GROUPS, work.GROUP),
        reward={"scorers": f"{work.__file__}:variety"},
        kl={"coefficient": 0.04},
        optimizer={"learning_rate": 1e-6, "schedule": "constant"},
    )
    options, policy = defaults.resolve(config), start_of(shape, **changes)
    return on_policy(shape, options, policy, Judge(options, {}, policy))


def ppo(shape: work.Shape, **changes) -> Round:
    """Reward model and critic of the policy's shape; EPOCHS updates an iteration."""
    rate = {"learning_rate": 1e-6, "schedule": "constant"}
    config = defaults.on_policy(
        "ppo",
        data={"row_length": 4 * (work.QUESTION + work.ANSWER)},
        rollout=sampling(work.GROUPS * work.GROUP, 1),
        reward={"normalize": False},
        train={"epochs": work.EPOCHS},
        optimizer=rate,
        critic=rate,
    )
    config.compute.compute_dtype = changes.get("compute_dtype", "float32")
    policy = start_of(shape, **changes)
    scorer = model_config(shape, head="scalar", **changes)
    folder = Path(tempfile.mkdtemp())
    save_model(folder, Model(scorer, init(scorer, jax.random.key(1)), policy.tokenizer))
    options = defaults.resolve(config)
    return on_policy(shape, options, policy, Judge(options, {"reward": folder}, policy))


WORKS: dict[str, Callable[..., Round]] = {
    "pretrain": pretrain,
    "sft": sft,
    "dpo": dpo,
    "reward": reward,
    "generate": generation,
    "grpo": grpo,
    "ppo": ppo,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=[*WORKS, "start"])
    parser.add_argument("shape", choices=work.SHAPES)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--unroll", type=int)
    parser.add_argument(
        "--full", action="store_true", help="SFT: as many rows as a peer that packs"
    )
    parser.add_argument("--kept", action="store_true", help="compilations, in `cache_dir()`")
    given = parser.parse_args()
    split_cores()  # as `main` does
    if given.kept:
        keep_compilations()
    turns, shape = Turns(), work.SHAPES[given.shape]
    dtype = "bfloat16" if given.bfloat16 else None
    options = {"compute_dtype": dtype, "unroll": given.unroll, "batch": given.batch}
    options = {name: value for name, value in options.items() if value is not None}
    if given.full:
        options["full"] = True
    versions = {name: version(name) for name in ("jax", "flax")}
    if given.work == "start":
        sft(shape, steps=1, **options)()
        turns.ready(**versions)
    else:
        serve(turns, WORKS[given.work](shape, **options), give_back, **versions)


if __name__ == "__main__":
    main()

"""The oracle's tasks: its world sampled and scored from a table of logits, or by a transformer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.config import Config
from rlhf_jax.data.batches import random_bits
from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.losses.cross_entropy import TokenStatistics
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.scoring import target_statistics, target_values
from rlhf_jax.oracle import exact_world as world
from rlhf_jax.rl.layout import Rollout, pack_rows
from rlhf_jax.rl.on_policy import Task
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import generate
from rlhf_jax.tasks.prompts import PromptSet

# The vocabulary of the transformer: actions 0 … 3 of the world are EOS, a, b, c.
PAD, BOS, EOS = 0, 1, 2
ALLOWED = np.array([False, False, True, True, True, True])
BIAS = np.where(ALLOWED, 0, -1e9).astype(np.float32)  # added to logits
PROMPTS = ((BOS, 3), (BOS, 4, 5), (BOS, 5, 3, 4), (BOS, 3, 3, 4, 5))


def table_task(config: Config) -> Task:
    """Returns a task whose policy is a table of logits [4 prompts, 40 prefixes, 4 actions]."""
    groups, each = config.rollout.prompts, config.rollout.samples
    prompts = np.repeat(np.arange(groups) % world.PROMPTS, each).astype(np.int32)
    count = len(prompts)

    def rollout(params: Any, batch: Mapping[str, Any], number: int) -> Rollout:
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        drawn = jax.device_get(draw(params["table"], prompts, key))
        greedy = np.zeros(groups)
        if config.advantage.name == "remax":
            best = jax.device_get(draw(params["table"], prompts[::each], None))
            greedy = lookup(prompts[::each], best["actions"], best["mask"])
        rows = {
            "prompts": prompts,
            "nodes": drawn["nodes"],
            "targets": drawn["actions"],
            "weights": drawn["mask"],
            "members": np.arange(count, dtype=np.int32)[:, None],
            "slots": np.broadcast_to(np.arange(world.MAX_TOKENS), (count, 1, world.MAX_TOKENS)),
            "mask": drawn["mask"][:, None],
        }
        scores = lookup(prompts, drawn["actions"], drawn["mask"])
        return Rollout(
            mask=drawn["mask"],
            behaviour_logprobs=drawn["logprobs"],
            finished=(drawn["mask"] * (drawn["actions"] == 0)).any(-1),
            scores=scores,
            weights=_weigh(config, scores),
            greedy_scores=greedy,
            rows=rows,
        )

    return Task(
        rollout=rollout,
        statistics=_compute_statistics,
        values=_look_up_values if config.advantage.name == "gae" else None,
    )


@jax.jit
def draw(table: jax.Array, prompts: jax.Array, key: jax.Array | None) -> dict[str, jax.Array]:
    """Draws responses to prompts: actions, nodes, mask, logprobs [N, 4]; greedy without a key."""
    count = len(prompts)

    def step(carry, t):
        node, alive = carry
        logits = table[prompts, node]
        if key is None:
            action = jnp.argmax(logits, -1)
        else:
            action = jax.random.categorical(jax.random.fold_in(key, t), logits)
        logprob = jax.nn.log_softmax(logits)[jnp.arange(count), action]
        out = {"actions": action, "nodes": node, "mask": alive, "logprobs": logprob * alive}
        following = jnp.asarray(_FOLLOWERS)[node, action]
        return (following, alive & (action != 0)), out

    start = jnp.zeros(count, jnp.int32), jnp.ones(count, bool)
    _, out = jax.lax.scan(step, start, jnp.arange(world.MAX_TOKENS))
    out = {name: x.swapaxes(0, 1) for name, x in out.items()}
    mask = out["mask"].astype(jnp.float32)
    actions = jnp.where(out["mask"], out["actions"], 0).astype(jnp.int32)
    return out | {"mask": mask, "actions": actions}


def _list_followers() -> np.ndarray:
    """Returns [40, 4] the node after an action at a node; 0 where there is none."""
    index = {prefix: i for i, prefix in enumerate(world.PREFIXES)}
    return np.array(
        [[index.get((*prefix, a), 0) if a else 0 for a in range(4)] for prefix in world.PREFIXES],
        np.int32,
    )


_FOLLOWERS = _list_followers()
_OUTCOME = {world.code(response): i for i, response in enumerate(world.RESPONSES)}


def lookup(prompts: np.ndarray, actions: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns [N] the true rewards of responses with actions [N, 4]."""
    return world.REWARDS[prompts, outcomes(actions, mask)]


def outcomes(actions: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns [N] which of the 121 responses each is, with actions [N, 4]."""
    codes = np.ones(len(actions), np.int64)
    for t in range(actions.shape[1]):
        codes = np.where(mask[:, t] > 0, 4 * codes + actions[:, t], codes)
    return np.array([_OUTCOME[code] for code in codes.tolist()])


def _weigh(config: Config, scores: np.ndarray) -> np.ndarray:
    """Returns [N] weights: 0 where `rollout.filter_zero_std` leaves out samples that score alike.

    Nothing takes their place: there are four prompts, and all are in the batch already.
    """
    groups = scores.reshape(-1, config.rollout.samples)
    dull = config.rollout.filter_zero_std & (np.ptp(groups, axis=1) == 0)
    return np.repeat(1 - dull.astype(np.float32), config.rollout.samples)


def _compute_statistics(params: Any, rows: Mapping[str, jax.Array]) -> TokenStatistics:
    logits = jnp.asarray(params["table"])[jnp.asarray(rows["prompts"])[:, None], rows["nodes"]]
    logsumexp = jax.nn.logsumexp(logits, -1)
    every = logits - logsumexp[..., None]
    targets = jnp.asarray(rows["targets"])[..., None]
    return TokenStatistics(
        logprobs=jnp.take_along_axis(every, targets, -1)[..., 0],
        logsumexp=logsumexp,
        mean_logit=logits.mean(-1),
        entropy=-(jnp.exp(every) * every).sum(-1),
        correct=(logits.argmax(-1) == targets[..., 0]).astype(jnp.float32),
    )


def _look_up_values(params: Any, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    values = params["table"][rows["prompts"][:, None], rows["nodes"]]
    return values, jnp.zeros(rows["members"].shape)


def letters_model() -> ModelConfig:
    """Returns a shape of two layers and width 32 over PAD, BOS, EOS, a, b, c."""
    return ModelConfig(
        vocab_size=6,
        layers=2,
        width=32,
        heads=2,
        kv_heads=2,
        head_dim=16,
        mlp_width=64,
        max_length=16,
        tied_embeddings=False,
        init_std=0.2,
    ).validate()


def letters_task(config: Config, shape: ModelConfig) -> Task:
    """Returns a task for a transformer: the engine samples; PAD and BOS are never drawn."""
    each = config.rollout.samples
    which = np.arange(config.rollout.prompts) % world.PROMPTS
    records = [Prompt(str(p), (Message("user", str(p)),)) for p in which]
    prompts = PromptSet(records, [PROMPTS[p] for p in which])
    sampling = Sampling(
        max_new_tokens=world.MAX_TOKENS,
        stop_ids=(EOS,),
        allowed_tokens=ALLOWED,
        samples_per_prompt=each,
        batch_size=config.rollout.slots,
        cache_length=16,
    )

    def statistics(params: Any, rows: Mapping[str, jax.Array]) -> TokenStatistics:
        return target_statistics(shape, params, rows, bias=jnp.asarray(BIAS))

    def rollout(params: Any, batch: Mapping[str, Any], number: int) -> Rollout:
        seed = int(random_bits([number], config.seed)[0] >> np.uint64(33))
        completions = generate(shape, params, prompts.tokens, sampling, seed=seed)
        drawn = Rollout.of(prompts, completions, [""] * len(completions), world.MAX_TOKENS)
        rows = pack_rows(
            drawn,
            row_length=config.data.row_length,
            max_prompt=config.rollout.max_prompt_tokens,
            multiple=config.batch.rows,
            shortest=8,
        )
        actions = np.zeros(drawn.mask.shape, np.int64)
        for n, completion in enumerate(completions):
            actions[n, : len(completion.tokens)] = np.array(completion.tokens) - EOS
        scores = lookup(np.repeat(which, each), actions, drawn.mask)
        return dataclasses.replace(
            drawn,
            scores=scores,
            weights=_weigh(config, scores),
            greedy_scores=np.zeros(len(which)),
            rows=rows,
        )

    values = partial(target_values, dataclasses.replace(shape, head="scalar"))
    return Task(
        rollout=rollout,
        statistics=statistics,
        values=values if config.advantage.name == "gae" else None,
    )


_statistics = jax.jit(target_statistics, static_argnums=0)


def enumerate_logprobs(shape: ModelConfig, params: Any) -> np.ndarray:
    """Scores all responses with a transformer: log π(response|prompt) [4, 121]."""
    longest = max(map(len, PROMPTS)) + world.MAX_TOKENS
    tokens = np.zeros((world.PROMPTS, len(world.RESPONSES), longest), np.int32)
    sources = np.zeros((*tokens.shape[:2], world.MAX_TOKENS), np.int32)
    for p, prompt in enumerate(PROMPTS):
        tokens[p, :, : len(prompt)] = prompt
        tokens[p, :, len(prompt) : len(prompt) + world.MAX_TOKENS] = world.TOKENS + EOS
        sources[p] = len(prompt) - 1 + np.arange(world.MAX_TOKENS)
    rows: dict[str, Any] = {
        "tokens": tokens.reshape(-1, longest),
        "positions": np.broadcast_to(np.arange(longest), (tokens.size // longest, longest)),
        "segment_ids": np.ones((tokens.size // longest, longest), np.int32),
        "sources": sources.reshape(-1, world.MAX_TOKENS),
        "targets": np.tile(world.TOKENS + EOS, (world.PROMPTS, 1)),
    }
    logprobs = _statistics(shape, params, rows, bias=jnp.asarray(BIAS)).logprobs
    summed = (np.float64(logprobs) * np.tile(world.MASK, (world.PROMPTS, 1))).sum(-1)
    return summed.reshape(world.PROMPTS, -1)

"""Trains the oracle's rows through the code that trains text, and computes where each ended."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from rlhf_jax.config import Config
from rlhf_jax.devices import training_devices
from rlhf_jax.evaluation.selection import best_of_n_law, kl_bound, kl_terms
from rlhf_jax.losses.preference import LOSSES, Pairs, preference_loss
from rlhf_jax.models import transformer
from rlhf_jax.oracle import exact_world as world
from rlhf_jax.oracle.oracle_rows import TABLE_OPTIMIZER, Row, make_row_config
from rlhf_jax.oracle.oracle_tasks import (
    draw,
    enumerate_logprobs,
    letters_model,
    letters_task,
    outcomes,
    table_task,
)
from rlhf_jax.oracle.verdicts import Measured, Outcome, Result, judge_best_of, locate
from rlhf_jax.rl.on_policy import (
    OnPolicyState,
    Trainer,
    first_state,
    iterate,
    make_trainer,
    score,
)
from rlhf_jax.stages.defaults import resolve
from rlhf_jax.stopping import stop_point
from rlhf_jax.training.mesh import make_mesh, placed, shard_batch
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_step

RULES = ((r".*", P()),)


def train_policy(row: Row, config: Config, seed: int = 0) -> Outcome:
    """Trains a row's policy on its samples and computes where it ended."""
    options = resolve(make_row_config(row, config, seed))
    valued = options.advantage.name == "gae"
    critic: Any = None
    if row.policy == "table":
        start: Any = {"table": jnp.asarray(world.REFERENCE, jnp.float32)}
        critic = {"table": jnp.zeros((world.PROMPTS, len(world.PREFIXES)))} if valued else None
        task, exact = table_task(options), _compute_logprobs
    else:
        shape = letters_model()
        start = transformer.init(shape, jax.random.key(seed + 1))
        if valued:
            scalar = dataclasses.replace(shape, head="scalar")
            critic = transformer.init(scalar, jax.random.key(seed + 2))
        task, exact = letters_task(options, shape), partial(enumerate_logprobs, shape)
    trainer = make_trainer(options, task, start, critic, mesh=_make_row_mesh(row), rules=RULES)
    state = first_state(trainer)
    for _ in range(options.train.steps):
        stop_point()
        state, *_ = iterate(trainer, state, {})
    logp, reference = exact(state.policy.params), exact(start)
    return dataclasses.replace(
        locate(logp, reference),
        measured=_measure(trainer, state, logp - reference),
        coefficient=float(state.kl_coefficient),
    )


def _measure(trainer: Trainer, state: OnPolicyState, ratios: np.ndarray) -> Measured:
    """Averages the trainer's own metrics of eight rollouts of the final policy.

    Samples that it leaves out of training count here: the policy does give those answers. `ratios`
    are log π/π_ref [4, 121]; a response is known by its reward, since no two are equal.
    """
    means: list[Any] = []
    values: list[Any] = []
    for number in range(8):
        stop_point()
        drawn = trainer.task.rollout(state.policy.params, {}, 10**6 + number)
        everyone = dataclasses.replace(drawn, weights=np.ones_like(drawn.weights))
        rollout = score(trainer, state, everyone)
        metrics = trainer.sample_metrics(rollout, state.kl_coefficient)
        means.append([metrics["objective/scores"], metrics["objective/kl"]])
        each = trainer.config.rollout.samples
        prompts = np.arange(len(rollout.scores)) // each % world.PROMPTS
        chosen = np.abs(world.REWARDS[prompts] - rollout.scores[:, None]).argmin(1)
        values.append([rollout.scores, ratios[prompts, chosen]])
    samples = np.concatenate(values, axis=1)
    reward, kl = np.array(means, np.float64).mean(0).tolist()
    covariance = np.cov(samples, ddof=1) / samples.shape[1]
    return Measured(reward, kl, covariance, float(samples[1].mean()))


def train_on_pairs(row: Row, config: Config) -> Outcome:
    """Minimises a preference loss over all pairs at once, weighted by their exact law.

    Each row of the batch is a prompt with all its pairs.
    """
    reference = world.logprobs(world.REFERENCE)
    mesh, loss = _make_row_mesh(row), LOSSES[row.algorithm](**row.changes["loss"])
    batch = {
        "prompts": np.arange(world.PROMPTS),
        "reference": reference.astype(np.float32),
        "law": world.pair_law(reference).astype(np.float32),
    }

    def pair(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (*values.shape, values.shape[1])
        chosen = jnp.broadcast_to(values[:, :, None], shape).ravel()
        return chosen, jnp.broadcast_to(values[:, None, :], shape).ravel()

    def loss_fn(params, batch, rng):
        every = jax.nn.log_softmax(params["table"][batch["prompts"]])[:, world.NODES, world.TOKENS]
        logp = (every * world.MASK).sum(-1)
        lengths = jnp.broadcast_to(jnp.asarray(world.LENGTHS, jnp.float32), logp.shape)
        pairs = Pairs(*pair(logp), *pair(batch["reference"]), *pair(lengths), batch["law"].ravel())
        return preference_loss(loss, pairs)

    steps = config.oracle.preference_steps
    optimizer, _ = make_optimizer(TABLE_OPTIMIZER | {"learning_rate": 0.1}, steps)
    step = make_step(loss_fn, optimizer, mesh=mesh, rules=RULES, microbatches=row.microbatches)
    start = placed(mesh, {"table": jnp.asarray(world.REFERENCE, jnp.float32)}, RULES)
    state, batch = init_state(start, optimizer, mesh=mesh, rules=RULES), shard_batch(mesh, batch)
    for _ in range(steps):
        stop_point()
        # Steps of several CPU devices that are under way together may wait for each other for ever.
        state, metrics = jax.block_until_ready(step(state, batch))
    outcome = locate(_compute_logprobs(state.params), reference)
    return dataclasses.replace(outcome, loss=float(metrics["train/loss"]))


def estimate_best_of(config: Config) -> Result:
    """Takes the best of 8 reference samples, many times, and holds it to its exact law.

    The outcome has the estimates of E r and KL, and the regret of the exact law.
    """
    n, samples = 8, 20_000  # how many to choose from, and how many are drawn for each prompt
    prompts = np.repeat(np.arange(world.PROMPTS), samples).astype(np.int32)
    table = jnp.asarray(world.REFERENCE, jnp.float32)
    drawn = jax.device_get(draw(table, prompts, jax.random.key(config.seed)))
    chosen = outcomes(drawn["actions"], drawn["mask"]).reshape(world.PROMPTS, -1)
    reference = world.logprobs(world.REFERENCE)
    pairs = zip(np.exp(reference), world.REWARDS, strict=True)
    law = np.stack([best_of_n_law(probs, rewards, n) for probs, rewards in pairs])
    exact = locate(np.log(law), reference)
    where = exact.reward, float((law * kl_terms(n, reference)).sum(1).mean())
    verdict, reward, kl = judge_best_of(chosen, law, where, n)
    outcome = dataclasses.replace(exact, reward=reward, kl=kl)
    return Result(outcome, where, f"of its law, KL ≤ {kl_bound(n):.4f}", verdict)


def _make_row_mesh(row: Row) -> Mesh | None:
    if row.devices == 1:
        return None
    return make_mesh({"data": row.devices}, training_devices()[: row.devices])


def _compute_logprobs(params: Any) -> np.ndarray:
    return world.logprobs(np.asarray(params["table"], np.float64))

"""The oracle: every algorithm on a world whose optimum is known, through the code that trains text.

Four prompts, 121 possible responses each (`oracle/enum121.py`); a policy is a table of logits or a
small transformer. What an algorithm reaches is computed by summing over all responses, and must be
where theory says: the optimum π_ref·exp(r/β)/Z for those that are unbiased, a known other place for
those that are not. What the trainer's metrics say of it must agree, and cannot lie above the
frontier of expected reward against KL: there, KL is measured too small.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from rlhf_jax.devices import training_devices
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.best_of_n import best_of_n_law, kl_bound, kl_terms
from rlhf_jax.losses.preference import LOSSES, preference_loss
from rlhf_jax.models import transformer
from rlhf_jax.oracle import enum121 as world
from rlhf_jax.oracle.judge import (
    Measured,
    Outcome,
    exact_outcome,
    expected,
    judge,
    judge_best_of,
)
from rlhf_jax.oracle.letters import (
    draw,
    enumerate_logprobs,
    letters_model,
    letters_task,
    outcomes,
    table_task,
)
from rlhf_jax.oracle.rows import (
    BEST_OF,
    PREFERENCE,
    ROWS,
    TABLE_OPTIMIZER,
    Row,
    row_config,
)
from rlhf_jax.report.report import write_report
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
from rlhf_jax.training.rundir import RunDirectory
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_step
from rlhf_jax.training.summary import write_evaluation

RULES = ((r".*", P()),)
_SPREAD = Lock()  # two programs that wait for each other on the same devices may wait for ever


@dataclass(frozen=True)
class Result:
    """What became of a row; expected is (E r, KL)."""

    outcome: Outcome
    expected: tuple[float, float]
    note: str
    verdict: str

    @property
    def line(self) -> str:
        o, (reward, kl) = self.outcome, self.expected
        return (
            f"E r {o.reward:7.4f}  KL {o.kl:7.4f}  regret {o.regret:8.5f}  "
            f"must be E r {reward:7.4f}, KL {kl:7.4f} ({self.note}): {self.verdict}"
        )


def run(config: ConfigDict, run: RunDirectory, parents: Mapping[str, Path]) -> dict[str, float]:
    """Runs every row, prints and plots where each landed; returns oracle/<row>/… metrics.

    Raises:
        UserError: an unknown row; no steps or threads.
        RuntimeError: a row did not land where theory says; the report is written all the same.
    """
    known = [*ROWS, *PREFERENCE, BEST_OF]
    here = len(training_devices())
    too_wide = [name for name in known if _devices(name) > here]
    wanted = list(dict.fromkeys(filter(None, map(str.strip, config.oracle.rows.split(",")))))
    if not wanted:
        wanted = [name for name in known if name not in too_wide]
        if too_wide:
            print(f"for more devices than there are here: {', '.join(too_wide)}", flush=True)
    for name in wanted:
        if name not in known:
            raise UserError(f"oracle.rows: there is no row {name!r}; there are: {', '.join(known)}")
        if name in too_wide:
            wide = f"{_devices(name)} devices to train on, of which there are {here}"
            raise UserError(f"oracle.rows: {name!r} needs {wide}")
    results: dict[str, Result] = {}
    with ThreadPoolExecutor(config.oracle.threads) as pool:  # most of a row's time is compiling
        for name, result in zip(wanted, pool.map(partial(_result, config), wanted), strict=True):
            results[name] = result
            print(f"{name:{max(map(len, wanted))}}  {result.line}", flush=True)
    write_evaluation(run.path, [_table(results)], [_figure(results)])
    metrics: dict[str, float] = {}
    for name, result in results.items():
        metrics |= {
            f"oracle/{name}/reward": result.outcome.reward,
            f"oracle/{name}/kl": result.outcome.kl,
            f"oracle/{name}/regret": result.outcome.regret,
            f"oracle/{name}/ok": float(result.verdict == "ok"),
        }
    wrong = [f"{name}: {r.verdict}" for name, r in results.items() if r.verdict != "ok"]
    if wrong:
        write_report(run.path, {"stage": "oracle", "metrics": metrics})
        raise RuntimeError(f"{len(wrong)} of {len(results)} rows failed: {'; '.join(wrong)}")
    return metrics


def _devices(name: str) -> int:
    return 1 if name == BEST_OF else (ROWS | PREFERENCE)[name].devices


def _result(config: ConfigDict, name: str) -> Result:
    if name == BEST_OF:
        return best_of_row(config)
    row = (ROWS | PREFERENCE)[name]
    train = partial(run_row, seed=config.seed) if name in ROWS else run_preference
    with _SPREAD if row.devices > 1 else nullcontext():
        outcome = train(row, config)
    return Result(outcome, expected(row, outcome), row.note, judge(row, outcome))


def run_row(row: Row, config: ConfigDict, seed: int = 0) -> Outcome:
    """Trains one row's policy and measures exactly where it ended."""
    made = resolve(row_config(row, config, seed))
    valued = made.advantage.name == "gae"
    critic: Any = None
    if row.policy == "table":
        start: Any = {"table": jnp.asarray(world.REFERENCE, jnp.float32)}
        critic = {"table": jnp.zeros((world.PROMPTS, len(world.PREFIXES)))} if valued else None
        task, exact = table_task(made), _table_logprobs
    else:
        shape = letters_model()
        start = transformer.init(shape, jax.random.key(seed + 1))
        if valued:
            scalar = dataclasses.replace(shape, head="scalar")
            critic = transformer.init(scalar, jax.random.key(seed + 2))
        task, exact = letters_task(made, shape), partial(enumerate_logprobs, shape)
    trainer = make_trainer(made, task, start, critic, mesh=_mesh(row), rules=RULES)
    state = first_state(trainer)
    for _ in range(made.train.steps):
        stop_point()
        state, *_ = iterate(trainer, state, {})
    logp, reference = exact(state.policy.params), exact(start)
    return dataclasses.replace(
        exact_outcome(logp, reference),
        measured=_measure(trainer, state, logp - reference),
        coefficient=float(state.kl_coefficient),
    )


def _measure(
    trainer: Trainer, state: OnPolicyState, ratios: np.ndarray, count: int = 8
) -> Measured:
    """What the trainer's own metrics say of `count` rollouts of the final policy.

    Also what it leaves out of training counts here: the policy does give those answers. `ratios`
    are log π/π_ref [4, 121]; a response is known by its reward, of which no two are equal.
    """
    means: list[Any] = []
    every: list[Any] = []
    for number in range(count):
        stop_point()
        drawn = trainer.task.rollout(state.policy.params, {}, 10**6 + number)
        everyone = dataclasses.replace(drawn, weights=np.ones_like(drawn.weights))
        rollout = score(trainer, state, everyone)
        metrics = trainer.sample_metrics(rollout, state.kl_coefficient)
        means.append([metrics["objective/scores"], metrics["objective/kl"]])
        each = trainer.config.rollout.samples
        prompts = np.arange(len(rollout.scores)) // each % world.PROMPTS
        chosen = np.abs(world.REWARDS[prompts] - rollout.scores[:, None]).argmin(1)
        every.append([rollout.scores, ratios[prompts, chosen]])
    values = np.concatenate(every, axis=1)
    reward, kl = np.array(means, np.float64).mean(0).tolist()
    covariance = np.cov(values, ddof=1) / values.shape[1]
    return Measured(reward, kl, covariance, float(values[1].mean()))


def run_preference(row: Row, config: ConfigDict) -> Outcome:
    """Minimises a preference loss over all pairs at once, weighted by their exact law.

    A row of the batch is a prompt with all its pairs.
    """
    reference = world.logprobs(world.REFERENCE)
    mesh, loss = _mesh(row), LOSSES[row.algorithm](**row.changes["loss"])
    batch = {
        "prompts": np.arange(world.PROMPTS),
        "reference": reference.astype(np.float32),
        "law": world.pair_law(reference).astype(np.float32),
    }

    def pairs(values):
        shape = (*values.shape, values.shape[1])
        chosen = jnp.broadcast_to(values[:, :, None], shape).ravel()
        return chosen, jnp.broadcast_to(values[:, None, :], shape).ravel()

    def loss_fn(params, batch, rng):
        every = jax.nn.log_softmax(params["table"][batch["prompts"]])[:, world.NODES, world.TOKENS]
        logp = (every * world.MASK).sum(-1)
        lengths = jnp.broadcast_to(jnp.asarray(world.LENGTHS, jnp.float32), logp.shape)
        chosen_lengths, rejected_lengths = pairs(lengths)
        return preference_loss(
            loss,
            *pairs(logp),
            *pairs(batch["reference"]),
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
            weights=batch["law"].ravel(),
        )

    steps = config.oracle.preference_steps
    optimizer, _ = make_optimizer(TABLE_OPTIMIZER | {"learning_rate": 0.1}, steps)
    step = make_step(loss_fn, optimizer, mesh=mesh, rules=RULES, microbatches=row.microbatches)
    start = placed(mesh, {"table": jnp.asarray(world.REFERENCE, jnp.float32)}, RULES)
    state, batch = init_state(start, optimizer, mesh=mesh, rules=RULES), shard_batch(mesh, batch)
    for _ in range(steps):
        stop_point()
        # Steps of several CPU devices that are under way together may wait for each other for ever.
        state, metrics = jax.block_until_ready(step(state, batch))
    found = exact_outcome(_table_logprobs(state.params), reference)
    return dataclasses.replace(found, loss=float(metrics["train/loss"]))


def _mesh(row: Row) -> Mesh | None:
    if row.devices == 1:
        return None
    return make_mesh({"data": row.devices}, training_devices()[: row.devices])


def best_of_row(config: ConfigDict, n: int = 8, samples: int = 20_000) -> Result:
    """The best of eight reference samples: estimates from many draws, against the exact law.

    The outcome shows the estimates of E r and KL, and the regret of the exact law.
    """
    prompts = np.repeat(np.arange(world.PROMPTS), samples).astype(np.int32)
    table = jnp.asarray(world.REFERENCE, jnp.float32)
    drawn = jax.device_get(draw(table, prompts, jax.random.key(config.seed)))
    chosen = outcomes(drawn["actions"], drawn["mask"]).reshape(world.PROMPTS, -1)
    reference = world.logprobs(world.REFERENCE)
    pairs = zip(np.exp(reference), world.REWARDS, strict=True)
    law = np.stack([best_of_n_law(probs, rewards, n) for probs, rewards in pairs])
    exact = exact_outcome(np.log(law), reference)
    where = exact.reward, float((law * kl_terms(n, reference)).sum(1).mean())
    verdict, reward, kl = judge_best_of(chosen, law, where, n)
    outcome = dataclasses.replace(exact, reward=reward, kl=kl)
    return Result(outcome, where, f"of its law, KL ≤ {kl_bound(n):.4f}", verdict)


def _table_logprobs(params: Any) -> np.ndarray:
    return world.logprobs(np.asarray(params["table"], np.float64))


def _table(results: Mapping[str, Result]) -> dict[str, Any]:
    columns = [
        "algorithm",
        "E[r]",
        "KL",
        "regret",
        "E[r] expected",
        "KL expected",
        "where",
        "verdict",
    ]
    rows = [
        [name, r.outcome.reward, r.outcome.kl, r.outcome.regret, *r.expected, r.note, r.verdict]
        for name, r in results.items()
    ]
    return {"title": "Where each algorithm landed", "columns": columns, "rows": rows}


def _figure(results: Mapping[str, Result]) -> dict[str, Any]:
    """The rows that share the table's reference: a transformer's frontier is another."""
    betas = np.geomspace(0.12, 50, 60)
    reference = world.logprobs(world.REFERENCE)
    best = [world.optimum(beta) for beta in betas]
    return {
        "kind": "oracle",
        "title": "Expected reward against KL, and the exact frontier",
        "points": {
            name: {
                "kl": result.outcome.kl,
                "reward": result.outcome.reward,
                "expected_kl": result.expected[1],
                "expected_reward": result.expected[0],
            }
            for name, result in results.items()
            if name not in ROWS or ROWS[name].policy == "table"
        },
        "exact": {
            "kl": [world.kl(p, reference) for p in best],
            "reward": [world.expected_reward(p) for p in best],
        },
    }

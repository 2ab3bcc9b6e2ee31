"""The oracle: every algorithm on a world whose optimum is known, through the code that trains text.

Four prompts, 121 possible responses each (`data/enum121.py`); a policy is a table of logits or a
small transformer. What an algorithm reaches is measured by summing over all responses, and must be
where theory says: the optimum π_ref·exp(r/β)/Z for those that are unbiased, a known other place for
those that are not. Nothing can lie above the frontier of expected reward against KL.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from rlhf_jax.data import enum121 as world
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.best_of_n import best_of_n, kl_bound
from rlhf_jax.losses.preference import preference_loss
from rlhf_jax.models import transformer
from rlhf_jax.stages import defaults
from rlhf_jax.stages.common import write_evaluation
from rlhf_jax.stages.letters import (
    draw,
    enumerate_logprobs,
    letters_model,
    letters_task,
    lookup,
    table_task,
)
from rlhf_jax.training.on_policy import OnPolicyState, Task, make_iteration
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.rundir import RunDirectory
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_step

BETA = 0.5
SEQUENCES = 512  # sampled an iteration
RULES = ((r".*", P()),)
TABLE_OPTIMIZER = {
    "learning_rate": 0.03,
    "b2": 0.99,
    "eps": 1e-5,
    "max_grad_norm": 1e9,
    "schedule": "wsd",
    "decay_fraction": 0.5,
    "final_fraction": 0.0,
}


@dataclass(frozen=True)
class Row:
    """An algorithm, and where it must land.

    Attributes:
      algorithm: of `defaults.ALGORITHMS`. changes: sections of its config laid over it.
      reward, kl: expected at the end (E r, nats a sequence); None: those of the optimum for β.
      tolerance: of reward and kl. regret: the most allowed, for those that reach the optimum.
      policy: "table" or "transformer". note: what is special, for the table.
    """

    algorithm: str
    changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    reward: float | None = None
    kl: float | None = None
    tolerance: tuple[float, float] = (0.02, 0.04)
    regret: float | None = 0.005
    policy: str = "table"
    note: str = "the optimum"


@dataclass(frozen=True)
class Outcome:
    """Where an algorithm landed, exactly: E r, KL to the reference, regret β·KL(π‖π*), all in nats
    but the reward; the coefficient of KL at the end; what the run itself measured last."""

    reward: float
    kl: float
    regret: float
    coefficient: float = BETA
    measured: tuple[float, float] | None = None  # (scores, kl) over `samples` sequences
    errors: tuple[float, float] = (0.0, 0.0)  # standard errors of those


def _in_reward(samples: int, **loss: Any) -> dict[str, Any]:
    """KL in the reward as k1, `samples` a prompt, two epochs so that ratios leave 1."""
    return {
        "train": {"epochs": 2},
        "kl": {"placement": "reward", "estimator": "k1"},
        "rollout": {"samples": samples},
        "loss": loss,
    }


def _k2(level: str) -> dict[str, Any]:
    return {"kl": {"placement": "loss", "estimator": "k2", "level": level}}


_BIASED: dict[str, Any] = {"tolerance": (0.02, 0.05), "regret": None}
ROWS: dict[str, Row] = {
    "reinforce": Row("reinforce"),
    "reinforce_pp": Row("reinforce_pp"),
    "rloo": Row("rloo", {"rollout": {"samples": 4}}),
    "remax": Row("remax"),
    "ppo": Row("ppo", {"train": {"epochs": 4}}),
    "k2_per_sequence": Row("rloo", {"rollout": {"samples": 4}, **_k2("sequence")}),
    "k2_per_token": Row(
        *("rloo", {"rollout": {"samples": 4}, **_k2("token")}, 0.62346, 0.89529),
        **_BIASED,
        note="another objective",
    ),
    "grpo": Row(
        *("grpo", {"rollout": {"samples": 8}}, 0.72, 1.30),
        **_BIASED,
        note="β·σ of each group",
    ),
    "grpo_kl_in_reward": Row("grpo", _in_reward(8)),
    "dr_grpo": Row(
        *("dr_grpo", {"rollout": {"samples": 8}}, 0.4761, 0.6345),
        **_BIASED,
        note="forward KL, β·G/(G−1)",
    ),
    "dr_grpo_kl_in_reward": Row("dr_grpo", _in_reward(64)),
    "dapo": Row("dapo", _in_reward(16)),
    "gspo": Row("gspo", _in_reward(16)),
    "cispo": Row("cispo", _in_reward(16)),
    "sapo": Row("rloo", _in_reward(4, name="sapo")),
    "gmpo": Row("rloo", _in_reward(4, name="gmpo")),
    "adaptive_kl": Row(
        "rloo",
        {
            "rollout": {"samples": 4},
            "kl": {"coefficient": 0.2, "target": 0.7373, "horizon": 10_000.0},
        },
        regret=None,
        note="β settles at 0.50",
    ),
    "rloo_transformer": Row("rloo", {"rollout": {"samples": 4}}, policy="transformer", regret=0.02),
    "ppo_transformer": Row("ppo", {"train": {"epochs": 2}}, policy="transformer", regret=0.02),
}


# What became of a row: where it landed, (E r, KL) expected, a note, the verdict.
Result = tuple[Outcome, tuple[float, float], str, str]
BEST_OF = "best_of_8"


def run(config: ConfigDict, run: RunDirectory, parents: Mapping[str, Path]) -> dict[str, float]:
    """Runs every row, prints and plots where each landed; returns oracle/<row>/… metrics.

    Raises:
        RuntimeError: a row did not land where theory says, or lies above the frontier.
    """
    wanted = list(filter(None, config.oracle.rows.split(","))) or [*ROWS, *PREFERENCE, BEST_OF]
    unknown = [name for name in wanted if name not in (*ROWS, *PREFERENCE, BEST_OF)]
    if unknown:
        known = ", ".join([*ROWS, *PREFERENCE, BEST_OF])
        raise UserError(f"oracle.rows: there is no row {unknown[0]!r}; there are: {known}")
    results: dict[str, Result] = {}
    with ThreadPoolExecutor(config.oracle.threads) as pool:  # most of a row's time is compiling
        for name, result in zip(wanted, pool.map(partial(_result, config), wanted), strict=True):
            outcome, _, note, verdict = results[name] = result
            print(
                f"{name:24s} E r {outcome.reward:7.4f}  KL {outcome.kl:7.4f}  "
                f"regret {outcome.regret:8.5f}  {note}: {verdict}",
                flush=True,
            )
    write_evaluation(run.path, [_table(results)], [_figure(results)])
    metrics: dict[str, float] = {}
    for name, (outcome, _, _, verdict) in results.items():
        metrics |= {
            f"oracle/{name}/reward": outcome.reward,
            f"oracle/{name}/kl": outcome.kl,
            f"oracle/{name}/regret": outcome.regret,
            f"oracle/{name}/ok": float(verdict == "ok"),
        }
    wrong = [name for name, result in results.items() if result[3] != "ok"]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(results)} rows failed: {', '.join(wrong)}")
    return metrics


def _result(config: ConfigDict, name: str) -> Result:
    if name in ROWS:
        outcome = run_row(ROWS[name], config)
        return outcome, *_expected(ROWS[name]), judge(ROWS[name], outcome)
    return preference_row(name, config) if name in PREFERENCE else best_of_row(config)


def row_config(row: Row, config: ConfigDict, seed: int = 0) -> ConfigDict:
    """The ordinary config of the policy stage for a row."""
    each = row.changes.get("rollout", {}).get("samples", 1)
    table = row.policy == "table"
    steps = config.oracle.table_steps if table else config.oracle.transformer_steps
    sections: dict[str, dict[str, Any]] = {
        "rollout": {
            "prompts": (SEQUENCES if table else SEQUENCES // 2) // each,
            "max_new_tokens": world.MAX_TOKENS,
            "max_prompt_tokens": 5,
            "slots": 256,
        },
        "data": {"row_length": 64},
        "batch": {"rows": 8},
        "kl": {"coefficient": BETA, "exact_rows": 0},
        "optimizer": dict(TABLE_OPTIMIZER),
        "train": {"steps": steps},
    }
    if not table:
        sections["optimizer"] |= {"learning_rate": 3e-3, "max_grad_norm": 1.0}
    for name, values in row.changes.items():
        sections[name] = sections.get(name, {}) | dict(values)
    if row.algorithm == "ppo":
        sections["critic"] = dict(sections["optimizer"])
    made = defaults.on_policy(row.algorithm, **sections)
    made.seed = seed
    return made


def run_row(row: Row, config: ConfigDict, seed: int = 0) -> Outcome:
    """Trains one row's policy and measures exactly where it ended."""
    made = row_config(row, config, seed)
    if row.policy == "table":
        start = {"table": jnp.asarray(world.REFERENCE, jnp.float32)}
        critic = {"table": jnp.zeros((world.PROMPTS, len(world.PREFIXES)))}
        task, exact = table_task(made), lambda params: _table_logprobs(params)
    else:
        shape = letters_model()
        start = transformer.init(shape, jax.random.key(seed + 1))
        critic = transformer.init(
            dataclasses.replace(shape, head="scalar"), jax.random.key(seed + 2)
        )
        task, exact = letters_task(made, shape), partial(enumerate_logprobs, shape)
    iteration = make_iteration(made, task, start, rules=RULES)
    state = iteration.init(start, critic if task.values is not None else None)
    reference = exact(start)
    for _ in range(made.train.steps):
        state, _ = iteration.step(state, {})
    return _outcome(made, task, state, start, exact(state.policy.params), reference)


def _outcome(
    config: ConfigDict, task: Task, state: OnPolicyState, start: Any, logp, reference
) -> Outcome:
    beta, best = BETA, world.tilt(reference, world.REWARDS / BETA)
    value = world.expected_reward(best) - beta * world.kl(best, reference)
    reward, kl = world.expected_reward(logp), world.kl(logp, reference)
    scores, divergences = [], []
    logprobs = jax.jit(lambda params, rows: task.statistics(params, rows).logprobs)
    for number in range(8):  # what a run would report, from fresh samples
        rollouts = task.rollout(state.policy.params, {}, 10**6 + number)
        gap = logprobs(state.policy.params, rollouts.rows) - logprobs(start, rollouts.rows)
        gap = np.where(rollouts.rows["weights"] > 0, gap, 0)
        scores.append(rollouts.scores)
        divergences.append(gap.sum() / len(rollouts.scores))
    every = np.concatenate(scores)
    return Outcome(
        reward=reward,
        kl=kl,
        regret=value - (reward - beta * kl),
        coefficient=float(state.kl_coefficient),
        measured=(float(every.mean()), float(np.mean(divergences))),
        errors=(
            float(every.std() / np.sqrt(len(every))),
            float(np.std(divergences) / np.sqrt(len(divergences))),
        ),
    )


def _expected(row: Row) -> tuple[tuple[float, float], str]:
    reference = world.logprobs(world.REFERENCE)
    best = world.optimum(BETA)
    where = (
        world.expected_reward(best) if row.reward is None else row.reward,
        world.kl(best, reference) if row.kl is None else row.kl,
    )
    return where, row.note


def judge(row: Row, outcome: Outcome) -> str:
    """ "ok", or what is wrong."""
    if row.policy == "table" and outcome.reward > world.frontier(outcome.kl) + 1e-6:
        return "above the frontier"
    if outcome.measured is not None:
        for name, exact, seen, error in zip(
            ("reward", "KL"),
            (outcome.reward, outcome.kl),
            outcome.measured,
            outcome.errors,
            strict=True,
        ):
            if abs(seen - exact) > 4 * max(error, 1e-3):
                return f"{name} measured as {seen:.4f}, is {exact:.4f}"
    if row.regret is not None and outcome.regret > row.regret:
        return f"regret over {row.regret}"
    if row.algorithm == "rloo" and "target" in row.changes.get("kl", {}):
        return "ok" if abs(outcome.coefficient - BETA) < 0.03 else f"β = {outcome.coefficient:.3f}"
    if row.policy == "table":
        (reward, kl), _ = _expected(row)
        if abs(outcome.reward - reward) > row.tolerance[0]:
            return f"reward should be {reward:.3f}"
        if abs(outcome.kl - kl) > row.tolerance[1]:
            return f"KL should be {kl:.3f}"
    return "ok"


# Losses on pairs: options, and E r and KL of the optimum of their exact population.
PREFERENCE: dict[str, tuple[str, dict[str, Any], float, float]] = {
    "dpo": ("sigmoid", {"beta": BETA}, 0.5585, 0.7373),
    "ipo": ("ipo", {"beta": 0.1}, 0.5396, 0.7102),
}


def preference_row(name: str, config: ConfigDict) -> Result:
    """Minimises a preference loss over all pairs at once, weighted by their exact law."""
    loss, options, reward, kl = PREFERENCE[name]
    reference = world.logprobs(world.REFERENCE)
    law = jnp.asarray(world.pair_law(reference).ravel(), jnp.float32)
    shape = (*reference.shape, reference.shape[1])

    def pairs(values):
        chosen = jnp.broadcast_to(values[:, :, None], shape).ravel()
        return chosen, jnp.broadcast_to(values[:, None, :], shape).ravel()

    lengths = pairs(jnp.asarray(np.tile(world.LENGTHS, (world.PROMPTS, 1)), jnp.float32))

    def loss_fn(params, batch, rng):
        every = jax.nn.log_softmax(params["table"])[:, world.NODES, world.TOKENS]
        logp = (every * world.MASK).sum(-1)
        return preference_loss(
            loss,
            *pairs(logp),
            *pairs(jnp.asarray(reference, jnp.float32)),
            chosen_lengths=lengths[0],
            rejected_lengths=lengths[1],
            weights=law,
            **options,
        )

    steps = config.oracle.preference_steps
    optimizer, _ = make_optimizer(TABLE_OPTIMIZER | {"learning_rate": 0.1}, steps)
    step = make_step(loss_fn, optimizer)
    state = init_state({"table": jnp.asarray(world.REFERENCE, jnp.float32)}, optimizer)
    for _ in range(steps):
        state, _ = step(state, {"row_ids": jnp.zeros(1, jnp.int32)})
    logp = _table_logprobs(state.params)
    outcome = _exact_outcome(logp, reference)
    row = Row("", reward=reward, kl=kl, regret=None, note="the loss's own optimum")
    return outcome, (reward, kl), row.note, judge(row, outcome)


def best_of_row(config: ConfigDict, n: int = 8, samples: int = 20_000) -> Result:
    """The best of eight reference samples, estimated from many, against the exact law."""
    prompts = np.repeat(np.arange(world.PROMPTS), samples).astype(np.int32)
    table = jnp.asarray(world.REFERENCE, jnp.float32)
    drawn = jax.device_get(draw(table, prompts, jax.random.key(config.seed)))
    scores = lookup(prompts, drawn["actions"], drawn["mask"]).reshape(world.PROMPTS, -1)
    law, reference = np.log(world.best_of_n_law(n)), world.logprobs(world.REFERENCE)
    estimated = float(best_of_n(scores, scores, n).mean())
    parts = scores.reshape(world.PROMPTS, 20, -1).swapaxes(0, 1)
    error = np.std([best_of_n(part, part, n).mean() for part in parts]) / np.sqrt(len(parts))
    exact = _exact_outcome(law, reference)
    outcome = dataclasses.replace(exact, reward=estimated)
    off = abs(estimated - exact.reward) > 4 * error
    verdict = f"should be {exact.reward:.4f} ± {error:.4f}" if off else "ok"
    if exact.kl > kl_bound(n):
        verdict = "KL over its bound"
    return outcome, (exact.reward, exact.kl), f"its exact law, KL ≤ {kl_bound(n):.3f}", verdict


def _table_logprobs(params: Any) -> np.ndarray:
    return world.logprobs(np.asarray(params["table"], np.float64))


def _exact_outcome(logp: np.ndarray, reference: np.ndarray) -> Outcome:
    best = world.optimum(BETA)
    value = world.expected_reward(best) - BETA * world.kl(best, reference)
    reward, kl = world.expected_reward(logp), world.kl(logp, reference)
    return Outcome(reward, kl, value - (reward - BETA * kl))


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
        [name, o.reward, o.kl, o.regret, *expected, note, verdict]
        for name, (o, expected, note, verdict) in results.items()
    ]
    return {"title": "Where each algorithm landed", "columns": columns, "rows": rows}


def _figure(results: Mapping[str, Result]) -> dict[str, Any]:
    betas = np.geomspace(0.12, 50, 60)
    reference = world.logprobs(world.REFERENCE)
    best = [world.optimum(beta) for beta in betas]
    return {
        "kind": "oracle",
        "title": "Expected reward against KL, and the exact frontier",
        "points": {
            name: {
                "kl": o.kl,
                "reward": o.reward,
                "expected_kl": kl,
                "expected_reward": reward,
            }
            for name, (o, (reward, kl), _, _) in results.items()
        },
        "exact": {
            "kl": [world.kl(p, reference) for p in best],
            "reward": [world.expected_reward(p) for p in best],
        },
    }

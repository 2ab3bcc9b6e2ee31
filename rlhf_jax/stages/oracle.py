"""The oracle: every algorithm on a world whose optimum is known, through the code that trains text.

Four prompts, 121 possible responses each (`data/enum121.py`); a policy is a table of logits or a
small transformer. What an algorithm reaches is computed by summing over all responses, and must be
where theory says: the optimum π_ref·exp(r/β)/Z for those that are unbiased, a known other place for
those that are not. What the trainer's metrics say of it must agree, and cannot lie above the
frontier of expected reward against KL: there, KL is measured too small.
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
from scipy.special import chdtrc

from rlhf_jax.data import enum121 as world
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.best_of_n import (
    best_of_n,
    best_of_n_law,
    kl_bound,
    kl_estimate,
    kl_terms,
    win_bound,
)
from rlhf_jax.evaluation.report import write_report
from rlhf_jax.losses.preference import preference_loss
from rlhf_jax.models import transformer
from rlhf_jax.stages import defaults
from rlhf_jax.stages.common import write_evaluation
from rlhf_jax.stages.letters import (
    draw,
    enumerate_logprobs,
    letters_model,
    letters_task,
    outcomes,
    table_task,
)
from rlhf_jax.training.objectives import Sampled, advantages
from rlhf_jax.training.on_policy import OnPolicyState, Rollouts, Task, make_iteration, select
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.rundir import RunDirectory
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_step

BETA = 0.5
SEQUENCES = 512  # sampled an iteration
ERRORS = 4  # standard errors that what was measured may be off
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
      algorithm: of `defaults.ALGORITHMS`, or a loss of `losses/preference.py`.
      changes: sections of its config laid over it.
      reward, kl: expected at the end (E r, nats a sequence); None: those of the optimum for β.
      tolerance: of reward and kl. regret: the most allowed, for those that reach the optimum.
      coefficient, loss: expected at the end, ± 0.03 and ± 1e-4; None: any.
      policy: "table" or "transformer". note: what is special, for the table.
    """

    algorithm: str
    changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    reward: float | None = None
    kl: float | None = None
    tolerance: tuple[float, float] = (0.02, 0.04)
    regret: float | None = 0.005
    coefficient: float | None = None
    loss: float | None = None
    policy: str = "table"
    note: str = "the optimum"


@dataclass(frozen=True)
class Measured:
    """What the trainer's metrics say of fresh samples: mean score, KL, covariance of these two.

    `same` is what KL comes to on the very same samples, by the exact log-probabilities of whole
    responses: without sampling error, so that it shows a mistake too small for standard errors.
    """

    reward: float
    kl: float
    covariance: np.ndarray  # [2, 2], of the means
    same: float


@dataclass(frozen=True)
class Outcome:
    """Where an algorithm landed, exactly: E r, KL to the reference, regret β·KL(π‖π*), all in nats
    but the reward.

    Attributes:
      reward, kl, regret: as above.
      optimum: (E r, KL) of the reference's own π*.
      reference: its log-probabilities [4, 121].
      measured: by sampling, where a trainer did.
      coefficient: of KL, at the end. loss: of the last update, for losses on pairs.
    """

    reward: float
    kl: float
    regret: float
    optimum: tuple[float, float]
    reference: np.ndarray
    measured: Measured | None = None
    coefficient: float = BETA
    loss: float | None = None


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
_TRANSFORMER: dict[str, Any] = {
    "tolerance": (0.05, 0.1),
    "regret": 0.02,
    "policy": "transformer",
    "note": "the optimum of its own reference",
}
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
    "dapo": Row(
        *("dapo", _in_reward(4)),
        note="KL in reward, so that it has a known optimum",
    ),
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
        coefficient=BETA,
        note="β settles at 0.50",
    ),
    "rloo_transformer": Row("rloo", {"rollout": {"samples": 4}}, **_TRANSFORMER),
    "ppo_transformer": Row("ppo", {"train": {"epochs": 2}}, **_TRANSFORMER),
}
# Losses on pairs, and the optimum of their exact population.
PREFERENCE: dict[str, Row] = {
    "dpo": Row(
        *("sigmoid", {"loss": {"beta": BETA}}),
        loss=0.614803,
        note="the optimum, at Bayes' loss",
    ),
    "ipo": Row(
        *("ipo", {"loss": {"beta": 0.1}}, 0.5396, 0.7102),
        regret=None,
        note="the loss's own optimum",
    ),
}
BEST_OF = "best_of_8"


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
    wanted = list(dict.fromkeys(filter(None, map(str.strip, config.oracle.rows.split(",")))))
    wanted = wanted or known
    for name in wanted:
        if name not in known:
            raise UserError(f"oracle.rows: there is no row {name!r}; there are: {', '.join(known)}")
    for name in ("table_steps", "transformer_steps", "preference_steps", "threads"):
        if config.oracle[name] < 1:
            raise UserError(f"oracle.{name} = {config.oracle[name]} must be at least 1")
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


def _result(config: ConfigDict, name: str) -> Result:
    if name == BEST_OF:
        return best_of_row(config)
    if name in ROWS:
        row = ROWS[name]
        outcome = run_row(row, config, config.seed)
    else:
        row = PREFERENCE[name]
        outcome = run_preference(row, config)
    return Result(outcome, expected(row, outcome), row.note, judge(row, outcome))


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
    for _ in range(made.train.steps):
        state, _ = iteration.step(state, {})
    logp, reference = exact(state.policy.params), exact(start)
    return dataclasses.replace(
        _exact_outcome(logp, reference),
        measured=_measure(made, task, state, start, logp - reference),
        coefficient=float(state.kl_coefficient),
    )


def _measure(
    config: ConfigDict,
    task: Task,
    state: OnPolicyState,
    reference: Any,
    ratios: np.ndarray,
    count: int = 8,
) -> Measured:
    """What the trainer's own metrics say of `count` rollouts of the final policy.

    Also what it leaves out of training counts here: the policy does give those answers. `ratios`
    are log π/π_ref [4, 121]; a response is known by its reward, of which no two are equal.
    """

    def score(params, reference, rows):
        return [select(task.statistics(p, rows).logprobs, rows) for p in (params, reference)]

    score, prepare = jax.jit(score), jax.jit(partial(advantages, config))
    means: list[Any] = []
    every: list[Any] = []
    for number in range(count):
        rollouts = task.rollout(state.policy.params, {}, 10**6 + number)
        sampled = _sampled(rollouts, *score(state.policy.params, reference, rollouts.rows))
        _, metrics = prepare(sampled, state.kl_coefficient)
        means.append([metrics["objective/scores"], metrics["objective/kl"]])
        prompts = np.arange(len(rollouts.scores)) // config.rollout.samples % world.PROMPTS
        chosen = np.abs(world.REWARDS[prompts] - rollouts.scores[:, None]).argmin(1)
        every.append([rollouts.scores, ratios[prompts, chosen]])
    values = np.concatenate(every, axis=1)
    reward, kl = np.array(means, np.float64).mean(0).tolist()
    covariance = np.cov(values, ddof=1) / values.shape[1]
    return Measured(reward, kl, covariance, float(values[1].mean()))


def _sampled(rollouts: Rollouts, logprobs: jax.Array, ref_logprobs: jax.Array) -> Sampled:
    """The rollout, and log-probs [R·S, T] of its rows, as the trainer puts them together."""
    members = rollouts.rows["members"].ravel()
    order = np.flatnonzero(members >= 0)[np.argsort(members[members >= 0])]
    return Sampled(
        scores=rollouts.scores.astype(np.float32),
        weights=np.ones_like(rollouts.weights),
        finished=rollouts.finished,
        mask=rollouts.mask,
        logprobs=np.asarray(logprobs)[order],
        ref_logprobs=np.asarray(ref_logprobs)[order],
        values=np.zeros_like(rollouts.mask),
        last_values=np.zeros(len(rollouts.mask), np.float32),
        greedy_scores=rollouts.greedy_scores.astype(np.float32),
    )


def expected(row: Row, outcome: Outcome) -> tuple[float, float]:
    """(E r, KL) where the row must land."""
    reward, kl = outcome.optimum
    return (reward if row.reward is None else row.reward, kl if row.kl is None else row.kl)


def judge(row: Row, outcome: Outcome) -> str:
    """ "ok", or what is wrong."""
    # No policy's exact point lies above: this guards the oracle's own sums.
    if outcome.reward > world.frontier(outcome.kl, outcome.reference) + 1e-6:
        return "above the frontier: the oracle itself is wrong"
    measured = outcome.measured
    if measured is not None:
        if _above_frontier(measured, outcome.reference):
            return f"measured above the frontier: E r {measured.reward:.4f}, KL {measured.kl:.4f}"
        errors = np.sqrt(np.diag(measured.covariance))
        if abs(measured.reward - outcome.reward) > ERRORS * errors[0]:
            return f"reward measured as {measured.reward:.4f}, is {outcome.reward:.4f}"
        if abs(measured.kl - outcome.kl) > ERRORS * errors[1]:
            return f"KL measured as {measured.kl:.4f}, is {outcome.kl:.4f}"
        if abs(measured.kl - measured.same) > 1e-3:
            return f"KL measured as {measured.kl:.4f}, is {measured.same:.4f} on those samples"
    if row.regret is not None and outcome.regret > row.regret:
        return f"regret over {row.regret}"
    if row.coefficient is not None and abs(outcome.coefficient - row.coefficient) > 0.03:
        return f"β = {outcome.coefficient:.3f}, should be {row.coefficient}"
    if row.loss is not None and (outcome.loss is None or abs(outcome.loss - row.loss) > 1e-4):
        return f"loss = {outcome.loss}, should be {row.loss}"
    reward, kl = expected(row, outcome)
    if abs(outcome.reward - reward) > row.tolerance[0]:
        return f"reward should be {reward:.3f}"
    if abs(outcome.kl - kl) > row.tolerance[1]:
        return f"KL should be {kl:.3f}"
    return "ok"


def _above_frontier(measured: Measured, reference: np.ndarray) -> bool:
    """Whether E r − β·KL as measured exceeds what any policy has, for the frontier's slope β there.

    A tangent bounds the whole curve, so a few standard errors off its point it is as good, and is
    not infinitely steep where KL was measured as 0.
    """
    error = np.sqrt(measured.covariance[1, 1])
    beta = world.temperature(max(measured.kl, 0) + ERRORS * error, reference)
    best = world.tilt(reference, world.REWARDS / beta)
    most = world.expected_reward(best) - beta * world.kl(best, reference)
    slope = np.array([1, -beta])
    error = np.sqrt(slope @ measured.covariance @ slope)
    return measured.reward - beta * measured.kl > most + ERRORS * error


def run_preference(row: Row, config: ConfigDict) -> Outcome:
    """Minimises a preference loss over all pairs at once, weighted by their exact law."""
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
            row.algorithm,
            *pairs(logp),
            *pairs(jnp.asarray(reference, jnp.float32)),
            chosen_lengths=lengths[0],
            rejected_lengths=lengths[1],
            weights=law,
            **row.changes["loss"],
        )

    steps = config.oracle.preference_steps
    optimizer, _ = make_optimizer(TABLE_OPTIMIZER | {"learning_rate": 0.1}, steps)
    step = make_step(loss_fn, optimizer)
    state = init_state({"table": jnp.asarray(world.REFERENCE, jnp.float32)}, optimizer)
    for _ in range(steps):
        state, metrics = step(state, {"row_ids": jnp.zeros(1, jnp.int32)})
    found = _exact_outcome(_table_logprobs(state.params), reference)
    return dataclasses.replace(found, loss=float(metrics["train/loss"]))


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
    exact = _exact_outcome(np.log(law), reference)
    where = exact.reward, float((law * kl_terms(n, reference)).sum(1).mean())
    verdict, reward, kl = judge_best_of(chosen, law, where, n)
    outcome = dataclasses.replace(exact, reward=reward, kl=kl)
    return Result(outcome, where, f"of its law, KL ≤ {kl_bound(n):.4f}", verdict)


def judge_best_of(
    chosen: np.ndarray, law: np.ndarray, where: tuple[float, float], n: int
) -> tuple[str, float, float]:
    """(verdict, E r, KL) of best-of-n from reference samples `chosen` [4, N], as estimated.

    Args:
        chosen: which of the 121 responses each sample is.
        law: [4, 121] of the best of n.
        where: expected E r, and expected estimate of KL.
        n: samples to choose from.
    """
    count = chosen.shape[1] // n * n
    reference = world.logprobs(world.REFERENCE)
    scores = np.take_along_axis(world.REWARDS, chosen, axis=1)
    groups = scores[:, :count].reshape(world.PROMPTS, -1, n)
    first = groups.argmax(-1) + np.arange(0, count, n)
    best = np.take_along_axis(chosen, first, axis=1)

    reward = float(best_of_n(scores, scores, n).mean())
    parts = np.split(scores[:, : count // 20 * 20], 20, axis=1)
    error = _error([best_of_n(part, part, n).mean() for part in parts])
    terms = kl_terms(n, np.take_along_axis(reference, best, axis=1))
    kl = kl_estimate(n, np.take_along_axis(reference, best, axis=1))
    tops, others = groups.max(-1), np.roll(groups[:, :, 0], 1, axis=1)  # of other groups
    wins = (tops > others) + (tops == others) / 2
    likely = _chi_square(best, law)
    verdict = "ok"
    if likely <= 1e-3:
        verdict = f"not its law, p = {likely:.1e}"
    elif abs(reward - where[0]) > ERRORS * error:
        verdict = f"reward should be {where[0]:.4f} ± {error:.4f}"
    elif wins.mean() > win_bound(n) + ERRORS * _error(wins):
        verdict = f"wins {wins.mean():.4f}, more than {win_bound(n):.4f}"
    elif kl > kl_bound(n):
        verdict = f"KL over {kl_bound(n):.4f}"
    elif abs(kl - where[1]) > ERRORS * _error(terms):
        verdict = f"KL should be {where[1]:.4f}"
    return verdict, reward, kl


def _chi_square(chosen: np.ndarray, law: np.ndarray) -> float:
    """p of outcomes [4, N] under their law [4, 121]; the rare of a prompt count as one."""
    statistic, freedom = 0.0, 0
    for found, probs in zip(chosen, law, strict=True):
        counts, wanted = np.bincount(found, minlength=len(probs)), len(found) * probs
        rare = wanted < 5
        if wanted[rare].sum() < 5:
            rare |= wanted == wanted[~rare].min()
        counts = np.append(counts[~rare], counts[rare].sum())
        wanted = np.append(wanted[~rare], wanted[rare].sum())
        statistic += float(((counts - wanted) ** 2 / wanted).sum())
        freedom += len(wanted) - 1
    return float(chdtrc(freedom, statistic))


def _error(values: Any) -> float:
    """Standard error of the mean."""
    return float(np.std(values, ddof=1) / np.sqrt(np.size(values)))


def _table_logprobs(params: Any) -> np.ndarray:
    return world.logprobs(np.asarray(params["table"], np.float64))


def _exact_outcome(logp: np.ndarray, reference: np.ndarray) -> Outcome:
    best = world.tilt(reference, world.REWARDS / BETA)
    optimum = world.expected_reward(best), world.kl(best, reference)
    reward, kl = world.expected_reward(logp), world.kl(logp, reference)
    regret = (optimum[0] - BETA * optimum[1]) - (reward - BETA * kl)
    return Outcome(reward, kl, regret, optimum, reference)


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

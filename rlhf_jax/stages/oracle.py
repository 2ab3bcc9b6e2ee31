"""The oracle: every algorithm on a world whose optimum is known, through the code that trains text.

Four prompts, 121 possible responses each (`data/enum121.py`); a policy is a table of logits or a
small transformer. What an algorithm reaches is measured by summing over all responses, and must be
where theory says: the optimum π_ref·exp(r/β)/Z for those that are unbiased, a known other place for
those that are not. Nothing can lie above the frontier of expected reward against KL.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
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
from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.evaluation.best_of_n import best_of_n, kl_bound
from rlhf_jax.losses.cross_entropy import TokenStatistics
from rlhf_jax.losses.preference import preference_loss
from rlhf_jax.models import transformer
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.scoring import target_statistics, target_values
from rlhf_jax.sampling.generate import generate
from rlhf_jax.stages import defaults
from rlhf_jax.stages.common import write_evaluation
from rlhf_jax.stages.rollouts import PromptSet, Samples, pack_samples
from rlhf_jax.training.on_policy import OnPolicyState, Rollouts, Task, make_iteration
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
# The vocabulary of the transformer: actions 0 … 3 of the world are EOS, a, b, c.
PAD, BOS, EOS = 0, 1, 2
ALLOWED = np.array([False, False, True, True, True, True])
PROMPTS = ((BOS, 3), (BOS, 4, 5), (BOS, 5, 3, 4), (BOS, 3, 3, 4, 5))


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
    """KL in the reward as k1, `samples` a prompt."""
    return {
        "kl": {"placement": "reward", "estimator": "k1"},
        "rollout": {"samples": samples},
        "loss": loss,
    }


def _k2(level: str) -> dict[str, Any]:
    return {"kl": {"placement": "loss", "estimator": "k2", "level": level}}


_BIASED = {"tolerance": (0.02, 0.05), "regret": None}
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
    "reinforce_transformer": Row("reinforce", policy="transformer", regret=0.02),
}


def run(config: ConfigDict, run: RunDirectory, parents: Mapping[str, Path]) -> dict[str, float]:
    """Runs every row, prints and plots where each landed; returns oracle/<row>/… metrics.

    Raises:
        RuntimeError: a row did not land where theory says, or lies above the frontier.
    """
    wanted = list(filter(None, config.oracle.rows.split(","))) or [*ROWS, *PREFERENCE, "best_of_8"]
    results: dict[str, tuple[Outcome, tuple[float, float], str, str]] = {}
    for name in wanted:
        if name in ROWS:
            outcome = run_row(ROWS[name], config)
            results[name] = (outcome, *_expected(ROWS[name]), judge(ROWS[name], outcome))
        elif name in PREFERENCE:
            results[name] = preference_row(name, config)
        else:
            results[name] = best_of_row(config)
        outcome, _, note, verdict = results[name]
        print(
            f"{name:24s} E r {outcome.reward:7.4f}  KL {outcome.kl:7.4f}  "
            f"regret {outcome.regret:8.5f}  {note}: {verdict}",
            flush=True,
        )
    write_evaluation(run.path, [_table(results)], [_figure(results)])
    metrics = {}
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
        "batch": {"rows": 32},
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
        task, exact = table_task(made), lambda params: world.logprobs(np.float64(params["table"]))
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
    for number in range(8):  # what a run would report, from fresh samples
        rollouts = task.rollout(state.policy.params, {}, 10**6 + number)
        ours = task.statistics(state.policy.params, rollouts.rows).logprobs
        theirs = task.statistics(start, rollouts.rows).logprobs
        gap = np.where(rollouts.rows["weights"] > 0, ours - theirs, 0)
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


def table_task(config: ConfigDict) -> Task:
    """Sampling from, and scoring by, a table of logits [4 prompts, 40 prefixes, 4 actions]."""
    groups, each = config.rollout.prompts, config.rollout.samples
    prompts = np.repeat(np.arange(groups) % world.PROMPTS, each).astype(np.int32)
    count = len(prompts)

    def rollout(params: Any, batch: Mapping[str, Any], number: int) -> Rollouts:
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        drawn = jax.device_get(_draw(params["table"], prompts, key))
        greedy = np.zeros(groups)
        if config.advantage.name == "remax":
            found = jax.device_get(_draw(params["table"], prompts[::each], None))
            greedy = _lookup(prompts[::each], found["actions"], found["mask"])
        rows = {
            "prompts": prompts,
            "nodes": drawn["nodes"],
            "targets": drawn["actions"],
            "weights": drawn["mask"],
            "members": np.arange(count, dtype=np.int32)[:, None],
            "slots": np.broadcast_to(np.arange(world.MAX_TOKENS), (count, 1, world.MAX_TOKENS)),
            "mask": drawn["mask"][:, None],
        }
        ended = (drawn["mask"] * (drawn["actions"] == 0)).any(-1)
        return Rollouts(
            rows=rows,
            mask=drawn["mask"],
            logprobs=drawn["logprobs"],
            scores=_lookup(prompts, drawn["actions"], drawn["mask"]),
            weights=np.ones(count, np.float32),
            finished=ended,
            greedy_scores=greedy,
            metrics={},
            version=number,
        )

    return Task(
        rollout=rollout,
        statistics=_table_statistics,
        values=_table_values if config.advantage.name == "gae" else None,
    )


@jax.jit
def _draw(table: jax.Array, prompts: jax.Array, key: jax.Array | None) -> dict[str, jax.Array]:
    """One response to each prompt: actions, nodes, mask and logprobs [N, 4]; greedy without a key."""
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
        following = jnp.asarray(_FOLLOWING)[node, action]
        return (following, alive & (action != 0)), out

    start = jnp.zeros(count, jnp.int32), jnp.ones(count, bool)
    _, out = jax.lax.scan(step, start, jnp.arange(world.MAX_TOKENS))
    out = {name: x.swapaxes(0, 1) for name, x in out.items()}
    mask = out["mask"].astype(jnp.float32)
    actions = jnp.where(out["mask"], out["actions"], 0).astype(jnp.int32)
    return out | {"mask": mask, "actions": actions}


def _following() -> np.ndarray:
    """[40, 4] the node after an action at a node; 0 where there is none."""
    index = {prefix: i for i, prefix in enumerate(world.PREFIXES)}
    return np.array(
        [[index.get((*prefix, a), 0) if a else 0 for a in range(4)] for prefix in world.PREFIXES],
        np.int32,
    )


_FOLLOWING = _following()
_OUTCOME = {world.code(response): i for i, response in enumerate(world.RESPONSES)}


def _lookup(prompts: np.ndarray, actions: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[N] true rewards of responses: actions [N, 4]."""
    codes = np.ones(len(actions), np.int64)
    for t in range(actions.shape[1]):
        codes = np.where(mask[:, t] > 0, 4 * codes + actions[:, t], codes)
    outcomes = np.array([_OUTCOME[code] for code in codes.tolist()])
    return world.REWARDS[prompts, outcomes]


def _table_statistics(params: Any, rows: Mapping[str, jax.Array]) -> TokenStatistics:
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


def _table_values(params: Any, rows: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    values = params["table"][rows["prompts"][:, None], rows["nodes"]]
    return values, jnp.zeros(rows["members"].shape)


def letters_model() -> ModelConfig:
    """A transformer of two layers and width 32 over PAD, BOS, EOS, a, b, c."""
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


def letters_task(config: ConfigDict, shape: ModelConfig) -> Task:
    """The same world for a transformer: the engine samples, packed rows train, PAD and BOS banned."""
    each = config.rollout.samples
    which = np.arange(config.rollout.prompts) % world.PROMPTS
    records = [Prompt(str(p), (Message("user", str(p)),)) for p in which]
    prompts = PromptSet(records, [PROMPTS[p] for p in which])
    bias = jnp.where(jnp.asarray(ALLOWED), 0.0, -1e9)

    def statistics(params: Any, rows: Mapping[str, jax.Array]) -> TokenStatistics:
        return target_statistics(shape, params, rows, bias=bias)

    def rollout(params: Any, batch: Mapping[str, Any], number: int) -> Rollouts:
        completions = generate(
            shape,
            params,
            prompts.tokens,
            max_new_tokens=world.MAX_TOKENS,
            seed=config.seed * 10**7 + number,
            stop_ids=(EOS,),
            allowed_tokens=ALLOWED,
            samples_per_prompt=each,
            batch_size=config.rollout.slots,
            cache_length=16,
        )
        rows = pack_samples(
            Samples(prompts, completions, [""] * len(completions)),
            row_length=config.data.row_length,
            max_prompt=config.rollout.max_prompt_tokens,
            max_new=world.MAX_TOKENS,
            multiple=config.batch.rows,
        )
        tokens = np.zeros((len(completions), world.MAX_TOKENS), np.int64)
        mask, logprobs = np.zeros((2, *tokens.shape), np.float32)
        for i, completion in enumerate(completions):
            length = len(completion.tokens)
            tokens[i, :length], mask[i, :length] = completion.tokens, 1
            logprobs[i, :length] = completion.logprobs
        return Rollouts(
            rows=rows,
            mask=mask,
            logprobs=logprobs,
            scores=_lookup(np.repeat(which, each), tokens - EOS, mask),
            weights=np.ones(len(completions), np.float32),
            finished=np.array([c.finished for c in completions]),
            greedy_scores=np.zeros(len(which)),
            metrics={},
            version=number,
        )

    values = partial(target_values, dataclasses.replace(shape, head="scalar"))
    return Task(
        rollout=rollout,
        statistics=statistics,
        values=values if config.advantage.name == "gae" else None,
    )


def enumerate_logprobs(shape: ModelConfig, params: Any) -> np.ndarray:
    """log π(response|prompt) [4, 121] of a transformer, all responses scored."""
    longest = max(map(len, PROMPTS)) + world.MAX_TOKENS
    tokens = np.zeros((world.PROMPTS, len(world.RESPONSES), longest), np.int32)
    sources = np.zeros((*tokens.shape[:2], world.MAX_TOKENS), np.int32)
    for p, prompt in enumerate(PROMPTS):
        tokens[p, :, : len(prompt)] = prompt
        tokens[p, :, len(prompt) : len(prompt) + world.MAX_TOKENS] = world.TOKENS + EOS
        sources[p] = len(prompt) - 1 + np.arange(world.MAX_TOKENS)
    rows = {
        "tokens": tokens.reshape(-1, longest),
        "positions": np.broadcast_to(np.arange(longest), (tokens.size // longest, longest)),
        "segment_ids": np.ones((tokens.size // longest, longest), np.int32),
        "sources": sources.reshape(-1, world.MAX_TOKENS),
        "targets": np.tile(world.TOKENS + EOS, (world.PROMPTS, 1)),
    }
    bias = jnp.where(jnp.asarray(ALLOWED), 0.0, -1e9)
    logprobs = target_statistics(shape, params, rows, bias=bias).logprobs
    summed = (np.float64(logprobs) * np.tile(world.MASK, (world.PROMPTS, 1))).sum(-1)
    return summed.reshape(world.PROMPTS, -1)


# Losses on pairs: options, and E r and KL of the optimum of their exact population.
PREFERENCE: dict[str, tuple[str, dict[str, Any], float, float]] = {
    "dpo": ("sigmoid", {"beta": BETA}, 0.5585, 0.7373),
    "ipo": ("ipo", {"beta": 0.1}, 0.5396, 0.7102),
}


def preference_row(name: str, config: ConfigDict):
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
        state, _ = step(state, {"row_ids": np.zeros(1, np.int32)})
    logp = world.logprobs(np.float64(state.params["table"]))
    outcome = _exact_outcome(logp, reference)
    row = Row("", reward=reward, kl=kl, regret=None, note="the loss's own optimum")
    return outcome, (reward, kl), row.note, judge(row, outcome)


def best_of_row(config: ConfigDict, n: int = 8, samples: int = 20_000):
    """The best of eight reference samples, estimated from many, against the exact law."""
    prompts = np.repeat(np.arange(world.PROMPTS), samples).astype(np.int32)
    table = jnp.asarray(world.REFERENCE, jnp.float32)
    drawn = jax.device_get(_draw(table, prompts, jax.random.key(config.seed)))
    scores = _lookup(prompts, drawn["actions"], drawn["mask"]).reshape(world.PROMPTS, -1)
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


def _exact_outcome(logp: np.ndarray, reference: np.ndarray) -> Outcome:
    best = world.optimum(BETA)
    value = world.expected_reward(best) - BETA * world.kl(best, reference)
    reward, kl = world.expected_reward(logp), world.kl(logp, reference)
    return Outcome(reward, kl, value - (reward - BETA * kl))


Results = Mapping[str, tuple[Outcome, tuple[float, float], str, str]]


def _table(results: Results) -> dict[str, Any]:
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


def _figure(results: Results) -> dict[str, Any]:
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

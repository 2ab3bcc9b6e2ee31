"""Text rollouts: prompts → sampled answers → rewards, and the rows a policy is trained on.

An answer is never made of text again: the tokens that were sampled are the tokens that are scored
and trained.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.data.batches import pad_rows, random_bits
from rlhf_jax.data.conversation import Tokenizer
from rlhf_jax.data.packing import Arrays, Group, pack_groups
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.held_out_answers import sample
from rlhf_jax.evaluation.row_passes import map_rows
from rlhf_jax.files import write_json
from rlhf_jax.losses.advantages import zero_variance
from rlhf_jax.losses.checks import check_choice
from rlhf_jax.models.scoring import (
    target_cross_entropy,
    target_kl,
    target_statistics,
    target_values,
)
from rlhf_jax.rewards.ensemble import (
    Normalization,
    combine_members,
    member_scores,
    same_config,
    stack_members,
)
from rlhf_jax.rewards.scorers import Scores, TextScorers, parse_rewards
from rlhf_jax.rewards.ties import Ties
from rlhf_jax.rl.objectives import shape_scores
from rlhf_jax.rl.on_policy import Rollouts, Task
from rlhf_jax.sampling.generate import Completion
from rlhf_jax.tasks.prompts import PromptSet, prompts_within
from rlhf_jax.tasks.sources import read_records
from rlhf_jax.training.mesh import batch_shards, mesh_of, step_tokens
from rlhf_jax.training.metrics import Metrics
from rlhf_jax.training.saved_model import Model, load_model

SHORTEST = 16  # tokens a sequence: a row has places for no more of them than fit at that length


@dataclass(frozen=True)
class Samples:
    """Answers to P prompts, G to each, those of a prompt together: N = P·G."""

    prompts: PromptSet
    completions: Sequence[Completion]
    texts: Sequence[str]

    @property
    def each(self) -> int:
        return len(self.completions) // len(self.prompts.records)

    def take(self, prompts: Sequence[int]) -> Samples:
        """The answers to some of the prompts."""
        chosen = [i * self.each + k for i in prompts for k in range(self.each)]
        return Samples(
            self.prompts.take(prompts),
            [self.completions[n] for n in chosen],
            [self.texts[n] for n in chosen],
        )

    @staticmethod
    def joined(parts: Sequence[Samples]) -> Samples:
        """All of them, in order."""
        return Samples(
            PromptSet.joined([part.prompts for part in parts]),
            [c for part in parts for c in part.completions],
            [t for part in parts for t in part.texts],
        )


def read_prompts(config: ConfigDict, tokenizer: Tokenizer, source: str, split: str) -> PromptSet:
    """The prompts of a source that leave room for an answer; the others are counted."""
    limit = config.rollout.max_prompt_tokens
    records = read_records(config, source, "prompt", split)
    why = f"left out, longer than rollout.max_prompt_tokens = {limit}"
    prompts = prompts_within(limit, f"{source} ({split}) prompts", records, tokenizer, why)
    if not prompts.records:
        raise UserError(
            f"none of the {len(records)} prompts of {source!r} has at most "
            f"rollout.max_prompt_tokens = {limit} tokens"
        )
    return prompts


def truncation(config: ConfigDict) -> dict[str, Any]:
    """Those of rollout.top_k, top_p and min_p that leave tokens out."""
    everything = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return {k: config.rollout[k] for k, value in everything.items() if config.rollout[k] != value}


def sample_answers(
    config: ConfigDict,
    model: Model,
    prompts: PromptSet,
    *,
    samples: int,
    seed: int,
    temperature: float | None = None,
    ids: Sequence[int] | None = None,
) -> Samples:
    """`samples` answers to each prompt by the engine, by default drawn as the rollout says.

    With a `temperature` they are drawn at that one, from the whole distribution. `ids` name the
    prompts in the random numbers, by default their place.
    """
    rollout = config.rollout
    truncated = {}
    if temperature is None:
        temperature, truncated = rollout.temperature, truncation(config)
    completions, texts = sample(
        model,
        prompts.tokens,
        max_new_tokens=rollout.max_new_tokens,
        seed=seed,
        temperature=temperature,
        samples_per_prompt=samples,
        prompt_ids=ids,
        batch_size=rollout.slots,
        cache_length=rollout.max_prompt_tokens + rollout.max_new_tokens,
        **truncated,
    )
    return Samples(prompts, completions, texts)


def pack_samples(
    samples: Samples,
    *,
    row_length: int,
    max_prompt: int,
    max_new: int,
    multiple: int,
    shortest: int = SHORTEST,
) -> Arrays:
    """Rows of prompts with as many of their answers as always fit one, all of one shape.

    Beside the arrays of `pack_groups`, members [R, S] and slots, mask [R, S, T]: see `Rollouts`.
    """
    each = samples.each
    fitting = [
        k for k in range(1, each + 1) if each % k == 0 and max_prompt + k * max_new <= row_length
    ]
    if not fitting:
        raise UserError(
            f"data.row_length = {row_length} is less than rollout.max_prompt_tokens = {max_prompt} "
            f"and rollout.max_new_tokens = {max_new} together"
        )
    share = fitting[-1]
    groups = [
        Group(
            samples.prompts.tokens[first // each],
            tuple(samples.completions[n].tokens for n in range(first, first + share)),
            first // share,
        )
        for first in range(0, len(samples.completions), share)
    ]
    most = max(1, row_length // (shortest * share))
    rows, _ = pack_groups(groups, row_length, branches=share, most=most)
    rows = pad_rows(rows, rows=multiple, slots=row_length, groups=most)
    count = len(rows["valid"])
    lengths = rows["lengths"].reshape(count, -1)
    first = np.cumsum(lengths, axis=1) - lengths
    span = np.arange(max_new)
    mask = span < lengths[..., None]
    branch = np.arange(share)
    members = np.where(
        rows["valid"][..., None] > 0, rows["example_ids"][..., None] * share + branch, -1
    )
    return rows | {
        "members": members.reshape(count, -1).astype(np.int32),
        "slots": np.where(mask, first[..., None] + span, 0).astype(np.int32),
        "mask": mask.astype(np.float32),
    }


class Judge:
    """Rewards of answers: a weighted sum of named scorers, reward models among them.

    Use as a context manager: a user's reward function runs in a process of its own. A reward that
    gives everything one score, or all answers to a prompt, is warned of by `ties`. Why responses
    were left out with `reward.on_error=mask`, first of a kind and how many, is kept in
    reward_failures.json of the directory `run`; what is done again after a restart counts again.

    Raises:
        UserError: a scorer that does not exist, a reward model with another tokenizer or without
            the statistics to normalise its scores.
    """

    def __init__(
        self,
        config: ConfigDict,
        parents: Mapping[str, Path],
        policy: Model,
        run: Path | None = None,
    ):
        reward = config.reward
        self._config = config
        self.weights = parse_rewards(reward.scorers)
        paths = [path for role, path in parents.items() if role.startswith("reward")]
        models = [load_model(path, mesh=mesh_of(config), **config.compute) for path in paths]
        self._members: Any = None
        self._normalizations: list[Normalization] = []
        for path, model in zip(paths, models, strict=True):
            if model.config.head != "scalar":
                raise UserError(f"init.reward: {path} is not a reward model but a language model")
            if model.tokenizer.hash != policy.tokenizer.hash:
                raise UserError(f"{path} has another tokenizer than the policy")
        same_config([model.config for model in models], [str(path) for path in paths])
        if "model" in self.weights:
            for path, model in zip(paths, models, strict=True):
                if reward.normalize and model.normalization is None:
                    raise UserError(
                        f"{path} was saved without the statistics of its scores: train it anew, or "
                        "set reward.normalize = False"
                    )
            self._members = stack_members([model.params for model in models])
            self._score = jax.jit(partial(member_scores, models[0].config))
            self._normalizations = [
                Normalization(*model.normalization)
                if reward.normalize and model.normalization
                else Normalization(0.0, 1.0)
                for model in models
            ]
        self.models = models
        self.ties = Ties()
        self._first_score: float | None = None
        self._texts = TextScorers(
            self.weights,
            pattern=reward.pattern,
            timeout_seconds=reward.timeout_seconds,
            on_error=reward.on_error,
        )
        self._failures = None if run is None else run / "reward_failures.json"
        if self._failures is not None:
            self._texts.failed |= _read_failures(self._failures)

    def __enter__(self) -> Judge:
        self._texts.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._texts.__exit__(*error)
        if error[0] in (None, UserError):  # what ties may have led to
            self.ties.close()

    def score(self, samples: Samples, rows: Arrays) -> Scores:
        """Scores [N] of the samples; `rows` are those packed from them."""
        given = {}
        if self._members is not None:
            given["model"] = self._model_scores(rows)
        prompts = [p for p in samples.prompts.records for _ in range(samples.each)]
        lengths = [len(c.tokens) for c in samples.completions]
        scores = self._texts.score(prompts, samples.texts, lengths=lengths, given=given)
        self._compare(scores, samples.each)
        if scores.failures and self._failures is not None:
            write_json(self._failures, self._texts.failed)
        return scores

    def _compare(self, scores: Scores, each: int) -> None:
        """Tells `ties` of the scores, among all there were and among those of one prompt."""
        valid = scores.valid.reshape(-1, each)
        groups = [s[v] for s, v in zip(scores.total.reshape(-1, each), valid, strict=True)]
        found = np.concatenate(groups)
        if len(found):
            first = self._first_score = found[0] if self._first_score is None else self._first_score
            self.ties.add(f"answers score {first:g}", len(found), bool((found != first).any()))
        groups = [group for group in groups if len(group) > 1]
        if groups:
            count, apart = sum(map(len, groups)), any(np.ptp(group) > 0 for group in groups)
            self.ties.add("answers score as the others to their prompt", count, apart)

    def _model_scores(self, rows: Arrays) -> np.ndarray:
        config, packed = self._config.reward, {k: rows[k] for k in _READ_BY_MODELS}

        def by_row(params, batch):
            return self._score(params, batch).swapaxes(0, 1)  # rows first: [B, members, P, K]

        found = map_rows(by_row, self._members, packed, step_tokens(self._config), "rewards")
        flat = found.swapaxes(0, 1).reshape(found.shape[1], -1)
        members = rows["members"].ravel()
        scores = np.empty((len(flat), int(members.max()) + 1))
        scores[:, members[members >= 0]] = flat[:, members >= 0]
        normal = [n.apply(s) for n, s in zip(self._normalizations, scores, strict=True)]
        return np.asarray(combine_members(np.stack(normal), config.ensemble, config.ensemble_k))


def _read_failures(path: Path) -> dict[str, dict[str, Any]]:
    """What an earlier process of the run has kept; nothing of a damaged file."""
    try:
        kept = json.loads(path.read_text()).items()
        return {why: {"first": x["first"], "count": int(x["count"])} for why, x in kept}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


_READ_BY_MODELS = (
    *("tokens", "positions", "segment_ids", "branch_ids", "sources", "targets", "weights"),
    *("row_ids", "last", "lengths", "valid", "example_ids", "sequences"),
)


def text_task(
    config: ConfigDict,
    policy: Model,
    prompts: PromptSet,
    judge: Judge,
    mesh: Any,
    texts: Any = None,
) -> Task:
    """What `on_policy.make_iteration` trains on: answers to the prompts of a batch's row_ids.

    `texts`, a data set of packed raw text, is the pre-training mix (PPO-ptx of InstructGPT,
    https://arxiv.org/abs/2203.02155): every update takes its next batch.
    """
    temperature = config.rollout.temperature
    value_shape = dataclasses.replace(policy.config, head="scalar")

    def rollout(params: Any, batch: Mapping[str, np.ndarray], number: int) -> Rollouts:
        model = dataclasses.replace(policy, params=params)
        greedy = config.advantage.name == "remax"
        rows = batch["row_ids"]
        return text_rollout(config, model, prompts, rows, judge, mesh, number, greedy=greedy)

    def text_rows(update: int) -> Arrays:
        return {f"ptx/{name}": array for name, array in texts[update].items()}

    def text_loss(params: Any, batch: Mapping[str, jax.Array]):
        rows = {k.removeprefix("ptx/"): v for k, v in batch.items() if k.startswith("ptx/")}
        total, _ = target_cross_entropy(policy.config, params, rows)
        return total, {"loss/ptx": total}

    return Task(
        rollout=rollout,
        statistics=partial(_statistics, policy.config, temperature),
        values=partial(target_values, value_shape) if config.advantage.name == "gae" else None,
        exact_kl=partial(target_kl, policy.config, temperature=temperature)
        if config.kl.exact_rows
        else None,
        dtype=policy.config.compute_dtype,
        extra_rows=text_rows if texts is not None else None,
        extra_loss=text_loss if texts is not None else None,
    )


def _statistics(shape, temperature, params, batch):
    return target_statistics(shape, params, batch, temperature=temperature)


def text_rollout(
    config: ConfigDict,
    model: Model,
    prompts: PromptSet,
    chosen: np.ndarray,
    judge: Judge,
    mesh: Any,
    number: int,
    *,
    greedy: bool = False,
) -> Rollouts:
    """Samples, scores and packs one iteration's answers: rollout.prompts × rollout.samples.

    With `rollout.filter_zero_std`, prompts whose answers all score the same are left out, and the
    next of the batch take their place while there are any (dynamic sampling as in DAPO,
    https://arxiv.org/abs/2503.14476; `rollout.resample` batches at most). They are judged by what
    is trained: the shaped scores of the answers that count. `greedy`: also score the greedy answer
    to each prompt, ReMax's baseline.
    """
    rollout = config.rollout
    wanted, each = rollout.prompts, rollout.samples
    (seed,) = random_bits([number], config.seed) >> np.uint64(33)
    pack = partial(
        pack_samples,
        row_length=config.data.row_length,
        max_prompt=rollout.max_prompt_tokens,
        max_new=rollout.max_new_tokens,
        multiple=row_multiple(config, mesh),
    )
    draw = partial(_draw, config, model, prompts, chosen, judge, pack, int(seed), greedy)
    drawn = [draw(0)]
    while sum(len(d.useful) for d in drawn) < wanted and len(drawn) <= rollout.resample:
        drawn.append(draw(len(drawn)))
    useful = [(block, i) for block, d in enumerate(drawn) for i in d.useful]
    spare = [(block, i) for block, d in enumerate(drawn) for i in range(wanted)]
    spare = [place for place in spare if place not in set(useful)]
    groups = sorted((useful + spare)[:wanted])
    samples, rows = drawn[0].samples, drawn[0].rows
    places = [block * wanted + i for block, i in groups]
    if len(drawn) > 1:
        samples = Samples.joined([d.samples for d in drawn]).take(places)
        rows = pack(samples)
    order = np.concatenate([np.arange(each) + place * each for place in places])
    total = np.concatenate([d.scores.total for d in drawn])[order]
    weights = np.concatenate([d.counted for d in drawn])[order]
    weights &= np.repeat([group in set(useful) for group in groups], each)
    uniform, judged = (sum(x) for x in zip(*((d.uniform, d.judged) for d in drawn), strict=True))
    failures = sum(sum(d.scores.failures.values()) + d.greedy_failures for d in drawn)
    metrics = _reward_metrics([d.scores for d in drawn]) | {
        "rewards/failures": (failures, 1.0),
        "rollout/tokens": (sum(len(c.tokens) for d in drawn for c in d.samples.completions), 1.0),
        "rollout/blocks": (len(drawn), 1.0),
        "rollout/zero_std_groups": (uniform, 1.0),
    }
    if each > 1:  # of all that were judged, those left out too
        metrics["frac_reward_zero_std"] = uniform / max(judged, 1), judged
        if not weights.any():  # all that were judged were dropped, because it is 0
            metrics["reward_std"] = 0.0, judged
    finished, lengths = _ends(samples)
    scores = np.where(weights, np.nan_to_num(total), 0.0)
    return Rollouts(
        rows=rows,
        mask=padded([np.ones(len(c.tokens)) for c in samples.completions], rollout.max_new_tokens),
        logprobs=padded([c.logprobs for c in samples.completions], rollout.max_new_tokens),
        scores=scores,
        weights=weights.astype(np.float32),
        finished=finished,
        greedy_scores=np.concatenate([d.greedy_scores for d in drawn])[places],
        metrics=Metrics.of_pairs(metrics),
        version=number,
        samples=samples,
        shaped_scores=np.asarray(shape_scores(config, scores, finished, lengths)),
    )


class _Drawn(NamedTuple):
    """The answers to one block of prompts: `useful` are the prompts to train on."""

    samples: Samples
    rows: Arrays
    scores: Scores
    counted: np.ndarray  # [N] bool, the answers that may be trained on
    greedy_scores: np.ndarray  # [P], zeros where nobody asked
    greedy_failures: int
    useful: list[int]
    judged: int  # prompts with an answer that counts
    uniform: int  # of them, those whose answers that count all score the same


def _draw(
    config, model, prompts, chosen, judge, pack, seed: int, greedy: bool, block: int
) -> _Drawn:
    """Samples and scores block `block` of the chosen prompts."""
    wanted, each = config.rollout.prompts, config.rollout.samples
    places = range(block * wanted, (block + 1) * wanted)
    block_prompts = prompts.take([int(i) for i in chosen[places.start : places.stop]])
    samples = sample_answers(config, model, block_prompts, samples=each, seed=seed, ids=places)
    rows = pack(samples)
    scores = judge.score(samples, rows)
    counted = scores.valid.copy()
    finished, lengths = _ends(samples)
    check_choice("rollout.truncated", config.rollout.truncated, ("keep", "mask"))
    if config.rollout.truncated == "mask":
        counted &= finished
    greedy_scores, greedy_failures = np.zeros(wanted), 0
    if greedy:
        found = _greedy_scores(config, model, block_prompts, judge, pack)
        greedy_scores, greedy_failures = np.nan_to_num(found.total), sum(found.failures.values())
        counted &= np.repeat(found.valid, each)
    shaped = shape_scores(config, np.nan_to_num(scores.total), finished, lengths)
    groups = counted.reshape(-1, each)
    same = np.asarray(zero_variance(jnp.asarray(shaped).reshape(groups.shape), groups))
    useful = np.flatnonzero(~same) if config.rollout.filter_zero_std else np.arange(wanted)
    judged = groups.any(1)
    uniform = int((same & judged).sum()) if each > 1 else 0
    return _Drawn(
        samples,
        rows,
        scores,
        counted,
        greedy_scores,
        greedy_failures,
        useful.tolist(),
        int(judged.sum()),
        uniform,
    )


def _ends(samples: Samples) -> tuple[np.ndarray, np.ndarray]:
    """[N] of the answers: whether they ended by themselves, and their tokens."""
    answers = samples.completions
    return np.array([c.finished for c in answers]), np.array([len(c.tokens) for c in answers])


def _reward_metrics(scored: Sequence[Scores]) -> dict[str, tuple[float, float]]:
    """Means and spreads of all that was scored, also what is not trained on, and its number."""
    metrics: dict[str, tuple[float, float]] = {}
    columns = {name: [s.components[name] for s in scored] for name in scored[0].components}
    for name, parts in (columns | {"total": [s.total for s in scored]}).items():
        values = np.concatenate(parts)
        values = values[np.isfinite(values)]
        if len(values):
            metrics[f"rewards/{name}/mean"] = float(values.mean()), len(values)
            metrics[f"rewards/{name}/std"] = float(values.std()), len(values)
    return metrics


def row_multiple(config: ConfigDict, mesh: Any) -> int:
    """What an iteration's rows are a multiple of, so that few shapes are compiled."""
    part = config.batch.rows
    if part % (config.batch.microbatches * batch_shards(mesh)):
        raise UserError(
            f"batch.rows = {part} does not split into batch.microbatches = "
            f"{config.batch.microbatches} over {batch_shards(mesh)} devices"
        )
    return part * config.train.minibatches


def _greedy_scores(config, model, prompts, judge, pack) -> Scores:
    """[P] scores of the greedy answers."""
    greedy = sample_answers(config, model, prompts, samples=1, seed=0, temperature=0.0)
    return judge.score(greedy, pack(greedy))


def padded(values: Sequence[np.ndarray], length: int) -> np.ndarray:
    """f32 [N, length] of values shorter than that."""
    padded = np.zeros((len(values), length), np.float32)
    for row, value in zip(padded, values, strict=True):
        row[: len(value)] = value
    return padded

"""The judge of a rollout: a weighted sum of named scorers, reward models among them."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlhf_jax import hosts
from rlhf_jax.config import Config
from rlhf_jax.console import FEW
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.row_passes import map_rows
from rlhf_jax.files import write_json
from rlhf_jax.rewards.ensemble import (
    Normalization,
    combine_members,
    member_scores,
    same_config,
    stack_members,
)
from rlhf_jax.rewards.scorers import Scores, TextScorers, parse_rewards
from rlhf_jax.rl.layout import Rollout, from_rows
from rlhf_jax.training.mesh import step_tokens
from rlhf_jax.training.saved_model import Model, load_like

_READ_BY_MODELS = (
    *("tokens", "positions", "segment_ids", "branch_ids", "sources", "targets", "weights"),
    *("row_ids", "last", "lengths", "valid", "example_ids", "sequences"),
)


class Judge:
    """Rewards of answers: a weighted sum of named scorers, reward models among them.

    Use as a context manager: a user's reward function runs in a process of its own, and beside the
    first of several hosts alone, which tells the others what it said. A reward that gives the same
    score to everything, or to all answers to a prompt, is warned of by `ties`. Why responses were
    left out with `reward.on_error=mask`, first of a kind and how many, is kept in
    reward_failures.json of the directory `run`; what is done again after a restart counts again.

    Raises:
        UserError: a scorer that does not exist, a reward model with another tokenizer or without
            the statistics to normalise its scores.
    """

    def __init__(
        self,
        config: Config,
        parents: Mapping[str, Path],
        policy: Model,
        run: Path | None = None,
    ):
        reward = config.reward
        self._config = config
        self.weights = parse_rewards(reward.scorers)
        self.models = _load_reward_models(config, parents, policy, "model" in self.weights)
        self._members: Any = None
        self._normalizations: list[Normalization] = []
        if "model" in self.weights:
            self._members = stack_members([model.params for model in self.models])
            self._score = jax.jit(partial(_scores_by_row, self.models[0].config))
            self._normalizations = [
                Normalization(*model.normalization)
                if reward.normalize and model.normalization
                else Normalization(0.0, 1.0)
                for model in self.models
            ]
        self.ties = Ties()
        self._first_score: float | None = None
        self._texts: TextScorers | None = None
        self._failures = None if run is None else run / "reward_failures.json"
        hosts.by_first(self._start)

    def _start(self) -> None:
        reward = self._config.reward
        self._texts = TextScorers(
            self.weights,
            pattern=reward.pattern,
            timeout_seconds=reward.timeout_seconds,
            on_error=reward.on_error,
        )
        if self._failures is not None:
            self._texts.failed |= _read_failures(self._failures)

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *error) -> None:
        if self._texts is not None:
            self._texts.close()
        if error[0] in (None, UserError):  # what ties may have led to
            self.ties.close()

    def score(self, rollout: Rollout) -> Scores:
        """Scores [N] of the answers; a reward model reads the rows of the rollout.

        "environment" is the sum of the rewards of the answer's trajectory.
        """
        given = {} if self._members is None else {"model": self._model_scores(rollout.rows)}
        if "environment" in self.weights:
            given["environment"] = np.array([sum(each.rewards) for each in rollout.trajectories])
        prompts = [record for record in rollout.prompts.records for _ in range(rollout.each)]
        lengths = rollout.lengths.astype(int)
        with hosts.telling() as said:
            if self._texts is not None:
                scores = self._texts.score(prompts, rollout.texts, lengths=lengths, given=given)
                if scores.failures and self._failures is not None:
                    write_json(self._failures, self._texts.failed)
                said.append(scores.to_json())
        scores = Scores.from_json(said[0])
        if rollout.trajectories:  # one whose environment failed is left out, whatever it scores
            played = np.array([not each.fault for each in rollout.trajectories])
            total = np.where(played, scores.total, np.nan)
            scores = dataclasses.replace(scores, total=total, valid=scores.valid & played)
        self._add_to_ties(scores, rollout.each)
        return scores

    def _add_to_ties(self, scores: Scores, each: int) -> None:
        """Tells `ties` of the scores, among all there were and among those of one prompt."""
        valid = scores.valid.reshape(-1, each)
        groups = [s[v] for s, v in zip(scores.total.reshape(-1, each), valid, strict=True)]
        together = np.concatenate(groups)
        if len(together):
            if self._first_score is None:
                self._first_score = together[0]
            apart = bool((together != self._first_score).any())
            self.ties.add(f"answers score {self._first_score:g}", len(together), apart)
        groups = [group for group in groups if len(group) > 1]
        if groups:
            count, apart = sum(map(len, groups)), any(np.ptp(group) > 0 for group in groups)
            self.ties.add("answers score as the others to their prompt", count, apart)

    def _model_scores(self, rows: Mapping[str, np.ndarray]) -> np.ndarray:
        """[N] scores of the reward models, each on its normal scale, combined."""
        config, packed = self._config.reward, {name: rows[name] for name in _READ_BY_MODELS}
        by_row = map_rows(
            self._score, self._members, packed, step_tokens(self._config), "rewards"
        )  # [R, members, P, K]
        by_row = by_row.reshape(*by_row.shape[:2], -1).swapaxes(1, 2)
        scores = from_rows(by_row.astype(np.float64), rows["members"]).T
        normal = [n.apply(s) for n, s in zip(self._normalizations, scores, strict=True)]
        return np.asarray(combine_members(np.stack(normal), config.ensemble, config.ensemble_k))


class Ties:
    """Warns, once, that a reward has judged nothing but ties so far: it tells nothing apart.

    It does so once FEW answers have been judged, or at `close` if there were fewer.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._apart: set[str] = set()
        self._said = False

    def add(self, what: str, count: int, apart: bool) -> None:
        """Counts answers that were judged, which `what` calls ties, unless some are `apart`."""
        self._counts[what] = self._counts.get(what, 0) + count
        if apart:
            self._apart.add(what)
        self._say(FEW)

    def close(self) -> None:
        """Warns of the ties so far, since there will be no more answers."""
        self._say(2)

    def _say(self, least: int) -> None:
        for what, count in self._counts.items():
            if count >= least and what not in self._apart and not self._said:
                self._said = True
                logging.warning(
                    "reward: all %s %s so far: ties teach nothing; see reward.scorers",
                    f"{count:,}", what,
                )  # fmt: skip


def _scores_by_row(shape, members, rows) -> jax.Array:
    return member_scores(shape, members, rows).swapaxes(0, 1)


def _load_reward_models(
    config: Config, parents: Mapping[str, Path], policy: Model, scored: bool
) -> list[Model]:
    """Loads the models of init.reward…, which must fit the policy and one another.

    If answers are to be `scored` by them on a normal scale, each must have the statistics for it.
    """
    paths = [path for role, path in parents.items() if role.startswith("reward")]
    models = []
    for path in paths:
        model = load_like(config, path)
        models.append(model)
        if model.config.head != "scalar":
            raise UserError(f"init.reward: {path} is not a reward model but a language model")
        if model.tokenizer.hash != policy.tokenizer.hash:
            raise UserError(f"{path} has another tokenizer than the policy")
        if scored and config.reward.normalize and model.normalization is None:
            raise UserError(
                f"{path} was saved without the statistics of its scores: train it anew, or "
                "set reward.normalize = False"
            )
    same_config([model.config for model in models], [str(path) for path in paths])
    return models


def _read_failures(path: Path) -> dict[str, dict[str, Any]]:
    """Reads the failures that an earlier process of the run wrote; none of a damaged file."""
    try:
        failures = json.loads(path.read_text()).items()
        return {why: {"first": x["first"], "count": int(x["count"])} for why, x in failures}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}

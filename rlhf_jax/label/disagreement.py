"""How far reward models disagree on which of two answers is better: where a vote teaches most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from scipy.special import expit

from rlhf_jax.data.batches import pad_rows
from rlhf_jax.data.packing import Group, pack_groups
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.row_passes import in_record_order, map_rows
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.rewards.ensemble import Members, member_scores, same_config, stack_members
from rlhf_jax.training.saved_model import load_model

_TOKENS = 8192  # of a forward pass


@dataclass(frozen=True)
class Ensemble:
    """Reward models of one config, as `rewards.ensemble` has them."""

    config: ModelConfig
    members: Members

    @classmethod
    def load(cls, paths: Sequence[str], tokenizer_hash: str) -> Ensemble:
        """The reward models of finished runs.

        Raises:
            UserError: there are fewer than two, one is none, or they do not fit together.
        """
        if len(paths) < 2:
            raise UserError("--rewards: two reward models or more can disagree, one can't: a,b,…")
        models = [load_model(path) for path in paths]
        for path, model in zip(paths, models, strict=True):
            if model.config.head != "scalar":
                raise UserError(f"--rewards: {path} is not a reward model but a language model")
            if model.tokenizer.hash != tokenizer_hash:
                raise UserError(f"--rewards: {path} has another tokenizer than what answers")
        same_config([model.config for model in models], paths)
        return cls(models[0].config, stack_members([model.params for model in models]))

    def disagreements(self, groups: Sequence[Group]) -> np.ndarray:
        """[N] nats, `disagreement` on the two branches of each group, numbered from 0 on."""
        longest = max(group.size for group in groups)
        rows, _ = pack_groups(groups, -(-longest // 64) * 64, branches=2, most=1)
        rows = pad_rows(rows, rows=1, slots=64, groups=1)
        by_row = map_rows(partial(_scores, self.config), self.members, rows, _TOKENS)
        members = range(by_row.shape[1])  # [R, members, 1, 2]
        scores = np.stack([in_record_order(by_row[:, member], rows) for member in members])
        return disagreement(scores[..., 0] - scores[..., 1])


def disagreement(margins: np.ndarray) -> np.ndarray:
    """The mutual information of a vote and of which member is right: [K, N] → [N] f64, nats.

    H(mean p) − mean H(p) over K members, p = σ(margin): BALD of "Bayesian Active Learning for
    Classification and Preference Learning", https://arxiv.org/abs/1112.5745.
    """
    p = expit(margins.astype(np.float64))
    return _entropy(p.mean(axis=0)) - _entropy(p).mean(axis=0)


def _entropy(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return -p * np.log(p) - (1 - p) * np.log1p(-p)


@partial(jax.jit, static_argnums=0)
def _scores(config: ModelConfig, members: Members, rows: Any) -> jax.Array:
    return member_scores(config, members, rows).swapaxes(0, 1)

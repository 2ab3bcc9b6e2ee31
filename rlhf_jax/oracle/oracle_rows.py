"""The oracle's rows: every algorithm, its config on the world enum-121, and where it must land."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.config import Config
from rlhf_jax.oracle import exact_world as world
from rlhf_jax.stages import defaults

BETA = 0.5
SEQUENCES = 512  # sampled per iteration
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
      algorithm: of `defaults.ALGORITHMS`, or a loss of `losses/preference.py` for "pairs".
      changes: sections laid over its config.
      reward, kl: expected at the end (E r; nats per sequence); None: those of the optimum for β.
      tolerance: of reward and kl.
      regret: the most allowed, for algorithms that reach the optimum; None: any.
      coefficient, loss: expected at the end, ± 0.03 and ± 1e-4; None: any.
      policy: "table" or "transformer", trained on its samples, or "pairs", a table trained on the
        exact population of pairs.
      note: the place where it must land, in words.
      microbatches, devices: what every batch is split over.
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
    microbatches: int = 1
    devices: int = 1


def _put_kl_in_reward(samples: int, **loss: Any) -> dict[str, Any]:
    """Returns changes: KL in the reward as k1, and two epochs so that ratios leave 1."""
    return {
        "train": {"epochs": 2},
        "kl": {"placement": "reward", "estimator": "k1"},
        "rollout": {"samples": samples},
        "loss": loss,
    }


def _penalise_k2(level: str) -> dict[str, Any]:
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
    "k2_per_sequence": Row("rloo", {"rollout": {"samples": 4}, **_penalise_k2("sequence")}),
    "k2_per_token": Row(
        "rloo",
        {"rollout": {"samples": 4}, **_penalise_k2("token")},
        reward=0.62346,
        kl=0.89529,
        **_BIASED,
        note="another objective",
    ),
    "grpo": Row(
        "grpo", {"rollout": {"samples": 8}}, 0.72, 1.30, **_BIASED, note="β·σ of each group"
    ),
    "grpo_kl_in_reward": Row("grpo", _put_kl_in_reward(8)),
    "dr_grpo": Row(
        "dr_grpo",
        {"rollout": {"samples": 8}},
        reward=0.4761,
        kl=0.6345,
        **_BIASED,
        note="forward KL, β·G/(G−1)",
    ),
    "dr_grpo_kl_in_reward": Row("dr_grpo", _put_kl_in_reward(64)),
    "dapo": Row("dapo", _put_kl_in_reward(4), note="KL in reward, so that it has a known optimum"),
    "gspo": Row("gspo", _put_kl_in_reward(16)),
    "cispo": Row("cispo", _put_kl_in_reward(16)),
    "sapo": Row("rloo", _put_kl_in_reward(4, name="sapo")),
    "gmpo": Row("rloo", _put_kl_in_reward(4, name="gmpo")),
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


def _split(*names: str) -> dict[str, Row]:
    """Returns rows once more under names of their own: how a batch is split changes nothing."""
    kinds: dict[str, Any] = {"four_parts": {"microbatches": 4}, "two_devices": {"devices": 2}}
    return {
        f"{name}_{kind}": dataclasses.replace(ROWS[name], **split, note=f"{ROWS[name].note}, split")
        for name in names
        for kind, split in kinds.items()
    }


# One of each kind is split: a policy alone, with a critic, a transformer, pairs.
ROWS |= _split("rloo", "ppo", "rloo_transformer")
# Losses on pairs, and the optimum of their exact population.
ROWS["dpo"] = Row(
    "sigmoid",
    {"loss": {"beta": BETA}},
    loss=0.614803,
    policy="pairs",
    note="the optimum, at Bayes' loss",
)
ROWS["ipo"] = Row(
    "ipo",
    {"loss": {"beta": 0.1}},
    reward=0.5396,
    kl=0.7102,
    regret=None,
    policy="pairs",
    note="the loss's own optimum",
)
ROWS |= _split("dpo")
BEST_OF = "best_of_8"  # a further row, which trains nothing


def make_row_config(row: Row, config: Config, seed: int = 0) -> ConfigDict:
    """Returns the ordinary config of the policy stage for a row that samples."""
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
        "batch": {"rows": 8, "microbatches": row.microbatches},
        "kl": {"coefficient": BETA},
        "optimizer": dict(TABLE_OPTIMIZER),
        "train": {"steps": steps},
    }
    if not table:
        sections["optimizer"] |= {"learning_rate": 3e-3, "max_grad_norm": 1.0}
    for name, values in row.changes.items():
        sections[name] = sections.get(name, {}) | dict(values)
    if row.algorithm == "ppo":
        own = ("learning_rate", "schedule")
        sections["critic"] = {name: sections["optimizer"][name] for name in own}
    row_config = defaults.on_policy(row.algorithm, **sections)
    row_config.seed = seed
    return row_config

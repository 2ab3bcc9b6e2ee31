"""The options of on-policy stages: how answers are drawn and judged, and what is made of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from rlhf_jax.config import Only, option, variants
from rlhf_jax.losses.advantages import BASELINES, SCALES
from rlhf_jax.losses.policy import AGGREGATIONS, LEVELS, OBJECTIVES, Objective
from rlhf_jax.losses.shaping import EOS_MODES, ESTIMATORS
from rlhf_jax.own_code import load_function
from rlhf_jax.rewards.costs import COSTS
from rlhf_jax.rewards.ensemble import COMBINATIONS
from rlhf_jax.rl.objectives import ADVANTAGES, PLACEMENTS
from rlhf_jax.training.optimizer import OptimizerConfig

NO_FILE = Only("file", ("",), told="file empty")
_GROUP = Only("name", ("group",))
_GAE = Only("advantage.name", ("gae",))  # the one that has a critic
_MODEL = Only("scorers", containing=("model",))
_COST = Only("cost")
_PROCESS = Only("scorers", containing=(".py:", "regex", "math"))  # each in one of its own


@dataclass(frozen=True)
class SamplingOptions:
    """How answers to prompts are drawn."""

    max_prompt_tokens: int = option(128, least=1)  # longer prompts are left out and counted
    # Of an answer, its end included, and all that an environment answers in it.
    max_new_tokens: int = option(48, least=1)
    # best_of_n draws its curves at temperature 1 whatever this says, since their KL bound holds
    # only there.
    temperature: float = 1.0
    slots: int = option(64, least=1)  # answers decoded together

    def validate(self) -> None:
        """Raises ValueError for a temperature that no softmax has."""
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"rollout.temperature = {self.temperature} must be above 0")


@dataclass(frozen=True)
class Truncation:
    """Which tokens are never drawn; the policy stage trains the whole distribution and has none."""

    top_k: int = option(0, least=0)  # all but so many likely ones; 0: none
    top_p: float = option(1.0, within="(0, 1]")  # those beyond so much probability
    min_p: float = option(0.0, within="[0, 1]")  # those below this share of the likeliest's


@dataclass(frozen=True)
class RolloutOptions(SamplingOptions):
    """The samples of an iteration."""

    prompts: int = option(64, least=1)  # per iteration
    samples: int = option(1, least=1)  # per prompt
    # Answers that did not end: their score is lowered by the penalty, or is −penalty.
    missing_eos: str = option("none", choices=EOS_MODES)
    # In units of the scores.
    missing_eos_penalty: float = option(
        1.0, within="[0, inf)", only=Only("missing_eos", ("subtract", "replace"))
    )
    truncated: str = option("keep", choices=("keep", "mask"))  # "mask": those are not trained on
    # Tokens below max_new_tokens, of all that it bounds, that are punished softly (DAPO).
    overlong_buffer: int = 0
    filter_zero_std: bool = False  # leave out prompts whose answers all score the same
    # Further batches of prompts to replace those.
    resample: int = option(0, least=0, only=Only("filter_zero_std"))

    def validate(self) -> None:
        """Raises ValueError for fields that contradict each other."""
        super().validate()
        if not 0 <= self.overlong_buffer <= self.max_new_tokens:
            raise ValueError(
                f"rollout.overlong_buffer = {self.overlong_buffer} must be between 0 and "
                f"rollout.max_new_tokens = {self.max_new_tokens}"
            )
        if self.filter_zero_std and self.samples < 2:
            raise ValueError(
                "rollout.filter_zero_std needs rollout.samples of 2 or more: one answer to a "
                "prompt has no spread"
            )
        if self.truncated == "mask" and self.missing_eos != "none":
            raise ValueError(
                f"rollout.missing_eos = {self.missing_eos!r} would punish the very answers that "
                "rollout.truncated = 'mask' leaves out; set one of them"
            )


@dataclass(frozen=True)
class PolicyRolloutOptions(RolloutOptions):
    """The samples of an iteration of the policy stage."""

    # What an environment answers; "train", an ablation: the loss, the KL, the entropy and the
    # critic take it as if the policy had drawn it; lengths and rollout/… stay of what was drawn.
    given: str = option("mask", choices=("mask", "train"))


@dataclass(frozen=True)
class OnlineRolloutOptions(Truncation, RolloutOptions):
    """The samples of an iteration of the online_preference stage."""


@dataclass(frozen=True)
class BestOfNOptions(Truncation, SamplingOptions):
    """How the best_of_n stage samples.

    Only answers that ended are trained on; the curves count all.
    """


@dataclass(frozen=True)
class RewardOptions:
    """The judge of answers."""

    scorers: str = "model=1"  # see rewards/scorers.py
    # Scores of reward models, by the mean and deviation of their scores of the reference's answers.
    normalize: bool = option(True, only=_MODEL)
    # Of several reward models.
    ensemble: str = option(
        "mean", choices=COMBINATIONS, only=Only("init.members", told="init.reward_1")
    )
    ensemble_k: float = option(  # deviations
        1.0, within="[0, inf)", only=Only("ensemble", ("mean_minus_std",))
    )
    pattern: str = option("", only=Only("scorers", containing=("regex",)))  # of that scorer
    # What an answer without a score does, whichever scorer has none; "mask": it is left out and
    # counted.
    on_error: str = option("fail", choices=("fail", "mask"))
    timeout_seconds: float = option(60.0, within="(0, inf)", only=_PROCESS)  # per call


@dataclass(frozen=True)
class KlOptions:
    """The cost of distance from the reference."""

    # Per nat; where the placement is "none", the KL is measured only.
    coefficient: float = option(0.05, within="[0, inf)")
    placement: str = option("reward", choices=PLACEMENTS)  # "reward", "loss" or "none"
    estimator: str = option("k1", choices=ESTIMATORS)  # k1, k2, k3: losses/shaping.py
    # Of "sequence" or "token" log-ratios.
    level: str = option("sequence", choices=LEVELS, only=Only("placement", ("loss",)))
    # Times the ratio of the token or the sequence, whose gradient then counts too; with k3 only.
    importance: bool = option(False, only=Only("placement", ("loss",)))
    target: float = 0.0  # nats per sequence, for the adaptive controller; 0: a fixed coefficient
    horizon: float = option(10_000.0, only=Only("target"))  # sequences

    def validate(self) -> None:
        """Raises ValueError for fields that contradict each other."""
        if self.placement == "loss" and self.estimator == "k1":
            raise ValueError(
                "kl.estimator = 'k1' in the loss has no gradient on average and would regularise "
                "nothing; use k2 or k3 there, or kl.placement = 'reward'"
            )
        if self.placement == "loss" and self.importance and self.estimator != "k3":
            raise ValueError(
                f"kl.importance = True with kl.estimator = {self.estimator!r} has not the KL's "
                "gradient; use k3 with it, or k2 without"
            )
        if self.target < 0 or self.horizon <= 0 or (self.target and self.placement == "none"):
            raise ValueError(
                f"kl.target = {self.target} with kl.horizon = {self.horizon} and kl.placement = "
                f"{self.placement!r}: a target is positive, with a horizon above 0 and a KL that "
                "is paid"
            )
        if self.target and not self.coefficient:
            raise ValueError(
                f"kl.target = {self.target} with kl.coefficient = 0: the controller multiplies the "
                "coefficient, which would stay 0; start from one above 0"
            )


@dataclass(frozen=True)
class LagrangeOptions:
    """A limit on the mean cost of answers: their scores are lowered by λ·cost, and λ adapts."""

    cost: str = option("", choices=("", *COSTS))  # of rewards/costs.py; "": there is no limit
    # Of the mean over the answers that can have the cost.
    limit: float = option(0.05, within="[0, inf)", only=_COST)
    rate: float = option(0.5, within="(0, inf)", only=_COST)  # η of λ
    start: float = option(1.0, within="[0, inf)", only=_COST)  # λ before the first iteration
    # κ: an iteration's own answers are charged λ + κ·(cost − limit), so that λ swings less.
    damping: float = option(0.0, within="[0, inf)", only=_COST)


@dataclass(frozen=True)
class AdvantageOptions:
    """How rewards become the factors of log-probs: losses/advantages.py."""

    # gae, reward_to_go, group, remax
    name: str = option("gae", choices=tuple(ADVANTAGES), only=NO_FILE)
    file: str = ""  # "mine.py:centred": a function of yours in the place of one by name
    # Discount per token.
    gamma: float = option(1.0, within="[0, 1]", only=Only("name", ("gae", "reward_to_go")))
    # How far the critic's errors carry: 1 trusts rewards alone, 0 the next value alone.
    lam: float = option(0.95, within="[0, 1]", only=Only("name", ("gae",)))
    # An answer that was cut off is worth its last value, not 0.
    bootstrap: bool = option(False, only=Only("name", ("gae",)))
    baseline: str = option("mean", choices=BASELINES, only=_GROUP)  # none, mean, leave_one_out
    scale: str = option("none", choices=SCALES, only=_GROUP)  # none, group, batch
    whiten: bool = False  # to mean 0 and deviation 1 over all tokens

    def settled(self) -> AdvantageOptions:
        """These options, of no name where there is a file; UserError for one that is none."""
        if self.file:
            load_function(self.file, "advantage.file")
        return dataclasses.replace(self, name="") if self.file else self


@dataclass(frozen=True)
class PolicyOptions:
    """The loss: an objective of losses/policy.py, and terms beside it."""

    name: str = option("ppo", only=NO_FILE)  # one of `OBJECTIVES`
    objective: Any = field(default=None, metadata=variants(OBJECTIVES, Objective))
    file: str = ""  # "mine.py:clipped": a function of yours in the place of one by name
    aggregation: str = option("token_mean", choices=AGGREGATIONS)  # of tokens' losses
    entropy_coefficient: float = option(0.0, within="[0, inf)")  # of the bonus, per nat
    # Corrects for the sampler's log-probs, by token or by sequence.
    importance: str = option("none", choices=("none", *LEVELS))
    # The largest weight, beyond which it is cut or its tokens are masked.
    importance_cap: float = option(2.0, within="(0, inf)", only=Only("importance", LEVELS))
    importance_mode: str = option(  # what the cap does
        "truncate", choices=("truncate", "mask"), only=Only("importance", LEVELS)
    )
    # Of the loss of data.ptx, mixed in.
    ptx_coefficient: float = option(0.0, within="[0, inf)", only=Only("data.ptx"))


@dataclass(frozen=True)
class CriticOptions:
    """How the critic is trained; in all else as the policy is, by the section optimizer."""

    learning_rate: float = option(1e-3, within="[0, inf)", only=_GAE)  # the peak
    schedule: str = option("cosine", only=_GAE)  # as of the policy's: training/optimizer.py
    # Of a value's change; 0: no clip.
    value_clip: float = option(0.2, within="[0, inf)", only=_GAE)

    def optimizer(self, policy: OptimizerConfig) -> OptimizerConfig:
        """The critic's optimizer, from the policy's."""
        return dataclasses.replace(policy, learning_rate=self.learning_rate, schedule=self.schedule)

"""Policy-gradient objectives, one small class each, reached by name; value and KL losses.

Layout: [N, T] is N sampled sequences of T response slots, mask nonzero on the real tokens. Notation
of every docstring: lp = log π(token) in nats, d = lp − lp_old, r = e^d, A the advantage, |y| real
tokens, sg = no gradient. Log-ratios are clamped to ±20 before the exponential.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.losses.checks import (
    check_choice,
    check_options,
    check_rank,
    check_same_shape,
    within,
)
from rlhf_jax.losses.reductions import Reduction, keep_weighted, weighted_sum
from rlhf_jax.losses.shaping import kl_estimate

Loss = tuple[Reduction, dict[str, Reduction]]
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_mean_token_mean", "constant")
LEVELS = ("token", "sequence")
MAX_LOG_RATIO = 20.0


class Tokens(NamedTuple):
    """What a policy loss is computed from: all fields [N, T].

    Objectives see 0 wherever the mask is 0, and a mask of 0 and 1.

    Attributes:
      logprobs, old_logprobs: nats, of the policy now and when the update began, both at the
        sampling temperature.
      advantages: of the tokens.
      mask: nonzero on response tokens including EOS; all else there is ignored.
    """

    logprobs: jax.Array
    old_logprobs: jax.Array
    advantages: jax.Array
    mask: jax.Array

    @property
    def differences(self) -> jax.Array:
        """d = lp − lp_old."""
        return self.logprobs - self.old_logprobs

    @property
    def lengths(self) -> jax.Array:
        """|y| [N, 1], at least 1."""
        return jnp.maximum(jnp.sum(self.mask, axis=1, keepdims=True), 1)

    @property
    def ratios(self) -> jax.Array:
        """r [N, T]."""
        return jnp.exp(_clamp(self.differences))


class Objected(NamedTuple):
    """The result of an objective for each token.

    Attributes:
      values: [N, T], the tokens' losses.
      below, above: bool [N, T], where the objective's clip changes a token because its ratio is
        below or above the range; None for an objective that has no clip.
    """

    values: jax.Array
    below: jax.Array | None = None
    above: jax.Array | None = None


@dataclass(frozen=True)
class Objective:
    """A policy objective: a frozen dataclass whose fields are its options."""

    def __post_init__(self) -> None:
        """Raises ValueError for an option outside its range."""
        check_options(self)

    def __call__(self, tokens: Tokens) -> Objected:
        """The losses of the tokens, and which of them the clip changes."""
        raise NotImplementedError


@dataclass(frozen=True)
class PolicyGradient(Objective):
    """REINFORCE: −A·lp. https://doi.org/10.1007/BF00992696. For samples of the policy itself."""

    def __call__(self, tokens: Tokens) -> Objected:
        return Objected(-tokens.advantages * tokens.logprobs)


@dataclass(frozen=True)
class Ppo(Objective):
    """PPO: −min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A). https://arxiv.org/abs/1707.06347.

    dual_clip c > 1: where A < 0 at most −c·A (https://arxiv.org/abs/1912.09729; 3).
    delta > 1 + clip_high: r ← min(r, delta) in the first term (https://arxiv.org/abs/2505.07291).
    """

    clip_low: float = within("[0, 1]", 0.2)
    clip_high: float = within("[0, inf)", 0.2)
    dual_clip: float | None = within("(1, inf)", None)
    delta: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delta is not None and self.delta <= 1 + self.clip_high:
            raise ValueError(f"delta must be in (1 + clip_high, inf), got {self.delta}")

    def __call__(self, tokens: Tokens) -> Objected:
        advantages, ratio = tokens.advantages, tokens.ratios
        clipped = _clipped(advantages, ratio, self.clip_low, self.clip_high, self.delta)
        if self.dual_clip is None:
            return clipped
        most = jnp.minimum(clipped.values, -self.dual_clip * advantages)
        return clipped._replace(values=jnp.where(advantages < 0, most, clipped.values))


@dataclass(frozen=True)
class PpoSequence(Objective):
    """PPO on whole responses: −min(ρ·A, clip(ρ, 1 − clip_low, 1 + clip_high)·A) / |y|, ρ = e^Σd.

    RLOO's, https://arxiv.org/abs/2402.14740: the response is the action. Every token holds its
    share, so that "sequence_mean" is the mean over responses.
    """

    clip_low: float = within("[0, 1]", 0.2)
    clip_high: float = within("[0, inf)", 0.2)

    def __call__(self, tokens: Tokens) -> Objected:
        ratio = jnp.exp(_clamp(jnp.sum(tokens.differences, axis=1, keepdims=True)))
        clipped = _clipped(tokens.advantages, ratio, self.clip_low, self.clip_high)
        return clipped._replace(values=clipped.values / tokens.lengths)


@dataclass(frozen=True)
class Gspo(Objective):
    """GSPO: −min(s·A, clip(s, 1 − clip_low, 1 + clip_high)·A), s = e^(Σd/|y|).

    https://arxiv.org/abs/2507.18071; "sequence_mean_token_mean" there. differentiable "sequence"
    differentiates s, "token" is GSPO-token, s_t = sg(s)·e^(lp − sg(lp)): the same value, and the
    same gradient where A is one number per sequence.
    """

    clip_low: float = within("[0, 1]", 3e-4)
    clip_high: float = within("[0, inf)", 4e-4)
    differentiable: str = "sequence"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("differentiable", self.differentiable, LEVELS)

    def __call__(self, tokens: Tokens) -> Objected:
        total = jnp.sum(tokens.differences, axis=1, keepdims=True)
        ratio = jnp.exp(_clamp(total / tokens.lengths))
        if self.differentiable == "token":
            own = jnp.exp(tokens.logprobs - jax.lax.stop_gradient(tokens.logprobs))
            ratio = jax.lax.stop_gradient(ratio) * own
        return _clipped(tokens.advantages, ratio, self.clip_low, self.clip_high)


@dataclass(frozen=True)
class Cispo(Objective):
    """CISPO: −sg(c)·A·lp, where no token loses its gradient. https://arxiv.org/abs/2506.13585.

    clip "absolute": c = min(r, clip_high); "upper": c = min(r, 1 + clip_high); "both":
    c = clip(r, 1 − clip_low, 1 + clip_high), the only one with clip_low (None = 0.2). It clips
    whatever the sign of A.
    """

    clip_high: float = within("(0, inf)", 5.0)
    clip_low: float | None = within("[0, 1]", None)
    clip: str = "absolute"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("clip", self.clip, ("absolute", "upper", "both"))
        if self.clip != "both" and self.clip_low is not None:
            raise ValueError(f"the option clip_low is only for clip 'both', not {self.clip!r}")

    def __call__(self, tokens: Tokens) -> Objected:
        ratio, some = tokens.ratios, tokens.advantages != 0
        high = self.clip_high if self.clip == "absolute" else 1 + self.clip_high
        low = -jnp.inf
        if self.clip == "both":
            low = 1 - (0.2 if self.clip_low is None else self.clip_low)
        weight = jax.lax.stop_gradient(jnp.clip(ratio, low, high))
        values = -weight * tokens.advantages * tokens.logprobs
        return Objected(values, (ratio < low) & some, (ratio > high) & some)


@dataclass(frozen=True)
class Sapo(Objective):
    """SAPO: −A·σ(τ(r − 1))·4/τ, τ by the sign of A: a soft gate for the clip.

    https://arxiv.org/abs/2511.20347. A = 0 counts as negative.
    """

    tau_positive: float = within("(0, inf)", 1.0)
    tau_negative: float = within("(0, inf)", 1.05)

    def __call__(self, tokens: Tokens) -> Objected:
        tau = jnp.where(tokens.advantages > 0, self.tau_positive, self.tau_negative)
        gate = jax.nn.sigmoid(tau * (tokens.ratios - 1))
        return Objected(-tokens.advantages * gate * 4 / tau)


@dataclass(frozen=True)
class Gmpo(Objective):
    """GMPO: −A·(Π_t c_t)^(1/|y|), the geometric mean of clipped ratios.

    https://arxiv.org/abs/2507.20673; "sequence_mean_token_mean" there. Clipped in logs:
    log c = min(d, clip_high) where A > 0, max(d, −clip_low) where A < 0, else d.
    """

    clip_low: float = within("[0, inf)", 0.4)
    clip_high: float = within("[0, inf)", 0.4)

    def __call__(self, tokens: Tokens) -> Objected:
        d, advantages = _clamp(tokens.differences), tokens.advantages
        below = (advantages < 0) & (d < -self.clip_low)
        above = (advantages > 0) & (d > self.clip_high)
        clipped = jnp.where(above, self.clip_high, jnp.where(below, -self.clip_low, d))
        mean = jnp.sum(clipped, axis=1, keepdims=True) / tokens.lengths
        return Objected(-advantages * jnp.exp(mean), below, above)


OBJECTIVES: dict[str, type[Objective]] = {
    "policy_gradient": PolicyGradient,
    "ppo": Ppo,
    "ppo_sequence": PpoSequence,
    "gspo": Gspo,
    "cispo": Cispo,
    "sapo": Sapo,
    "gmpo": Gmpo,
}


def policy_loss(
    objective: Objective,
    tokens: Tokens,
    *,
    aggregation: str = "token_mean",
    constant: float | None = None,
    sequence_weights: jax.Array | None = None,
    importance: jax.Array | None = None,
) -> Loss:
    """A policy objective over N sequences.

    Args:
      objective: one of OBJECTIVES, whose docstring has the equation, the paper and the options.
      tokens: of which only logprobs gets a gradient.
      aggregation, constant, sequence_weights: see `aggregate`.
      importance: [N, T] factors of the tokens' losses, without gradient (see `importance_weights`).

    Returns:
      (total, weight); metrics loss and, as means over tokens weighted by sequence, policy/ratio
      (r), policy/ratio_excess (r − 1) and policy/ratio_excess_square ((r − 1)²), from which the
      variance of ratios near 1 is exact in float32, unlike from r²; policy/approxkl (½d²) and
      policy/approxkl_k3 (r − 1 − d), estimates of KL(old‖π); policy/clipfrac, the share of tokens
      that the objective's clip changes, split into policy/clipfrac_low and policy/clipfrac_high by
      the side on which the ratio leaves the range. An objective without a clip reports none of the
      three.
    """
    check_rank("logprobs", tokens.logprobs, 2)
    check_same_shape(**tokens._asdict(), importance=importance)
    *arrays, mask = tokens
    weights = _token_weights(mask, sequence_weights)
    cleaned = keep_weighted(weights, *arrays, importance)
    logprobs, old_logprobs, advantages, importance = cleaned
    tokens = Tokens(
        logprobs,
        *jax.lax.stop_gradient((old_logprobs, advantages)),
        mask=(weights != 0).astype(logprobs.dtype),
    )
    values, below, above = objective(tokens)
    if importance is not None:
        values = values * jax.lax.stop_gradient(importance)
    loss = aggregate(
        values, mask, aggregation, constant=constant, sequence_weights=sequence_weights
    )
    ratio, d = tokens.ratios, _clamp(tokens.differences)
    excess = jnp.expm1(d)
    metrics = {
        "policy/ratio": ratio,
        "policy/ratio_excess": excess,
        "policy/ratio_excess_square": excess**2,
        "policy/approxkl": d**2 / 2,
        "policy/approxkl_k3": excess - d,
    }
    if below is not None and above is not None:
        metrics |= {
            "policy/clipfrac": below | above,
            "policy/clipfrac_low": below,
            "policy/clipfrac_high": above,
        }
    return loss, {"loss": loss} | _token_means(metrics, weights)


def aggregate(
    values: jax.Array,
    mask: jax.Array,
    mode: str,
    *,
    constant: float | None = None,
    sequence_weights: jax.Array | None = None,
) -> Reduction:
    """The sum of tokens' values and the weight that makes it a mean; w is the sequence weight.

    "token_mean": (Σᵢ wᵢ·Σ_t v, Σᵢ wᵢ·|yᵢ|), as in DAPO, https://arxiv.org/abs/2503.14476.
    "sequence_mean": (Σᵢ wᵢ·Σ_t v, Σᵢ wᵢ): the policy gradient of whole responses.
    "sequence_mean_token_mean": (Σᵢ wᵢ·Σ_t v/|yᵢ|, Σᵢ wᵢ), as in GRPO,
    https://arxiv.org/abs/2402.03300; long responses weigh less per token.
    "constant": (Σᵢ wᵢ·Σ_t v, constant·Σᵢ wᵢ), as in Dr. GRPO, https://arxiv.org/abs/2503.20783,
    with the most tokens a response may have.

    Args:
      values, mask: [N, T]; values where the mask is 0 are ignored, even a NaN.
      constant: tokens, with (and only with) the mode "constant".
      sequence_weights: [N], None = 1. A sequence without tokens never counts.
    """
    check_rank("values", values, 2)
    check_same_shape(values=values, mask=mask)
    check_choice("aggregation", mode, AGGREGATIONS)
    if constant is not None and mode != "constant":
        raise ValueError(f"a constant is only for aggregation 'constant', not {mode!r}")
    weights = _token_weights(mask, sequence_weights)
    if mode == "token_mean":
        return weighted_sum(values, weights)
    # Of a row of equal weights the largest is the weight, and of a row without tokens 0.
    sequences = jnp.sum(jnp.max(weights, axis=1))
    if mode == "sequence_mean_token_mean":
        lengths = jnp.maximum(jnp.sum(mask != 0, axis=1), 1)
        weights = weights / lengths[:, None]
    total, _ = weighted_sum(values, weights)
    if mode == "constant":
        if constant is None:
            raise ValueError("aggregation 'constant' needs the constant to divide by")
        sequences = constant * sequences
    return total, sequences.astype(total.dtype)


def value_loss(
    values: jax.Array,
    old_values: jax.Array,
    returns: jax.Array,
    mask: jax.Array,
    *,
    clip: float | None = 0.2,
    sequence_weights: jax.Array | None = None,
) -> Loss:
    """½·max((V − R)², (clip(V, V_old ± clip) − R)²); ½·(V − R)² where clip is None.

    The clip of https://arxiv.org/abs/2005.12729.

    Args:
      values, old_values, returns, mask: [N, T]; only values gets a gradient.
      sequence_weights: [N], None = 1.

    Returns:
      (total, weight) over tokens; metrics loss and, as means over tokens weighted by sequence,
      value/mean (V) and value/clipfrac (the clipped error is the larger).
    """
    check_rank("values", values, 2)
    check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    weights = _token_weights(mask, sequence_weights)
    values, old_values, returns = keep_weighted(weights, values, old_values, returns)
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    error = clipped = (values - returns) ** 2
    if clip is not None:
        if clip <= 0:
            raise ValueError(f"clip must be in (0, inf), got {clip}")
        near = old_values + jnp.clip(values - old_values, -clip, clip)
        clipped = (near - returns) ** 2
    loss = weighted_sum(jnp.maximum(error, clipped) / 2, weights)
    metrics = {"value/clipfrac": clipped > error, "value/mean": values}
    return loss, {"loss": loss} | _token_means(metrics, weights)


def kl_loss(
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    mask: jax.Array,
    *,
    estimator: str = "k2",
    level: str = "sequence",
    old_logprobs: jax.Array | None = None,
) -> jax.Array:
    """KL(π‖ref) of samples of π as tokens' losses, whose `aggregate` is the KL term.

    level "sequence" estimates from the summed log-ratio Σ_t (lp − lp_ref), and puts 1/|y| of that
    on each token; "token" estimates token by token (see `kl_estimate`). Of the expected gradients:

    k2 by sequence is that of KL(π‖ref), exactly; the term to choose. k2 by token leaves out what
    a token does to the KL of those after it. k3, at either level, is that of the forward KL, of
    another optimum. k1 has none, E[∇lp] = 0: it belongs in the rewards (`token_rewards`), where it
    is exact. k3 times the ratio of its level, whose gradient then counts too
    (https://arxiv.org/abs/2512.02556), has in expectation the gradient of k2 at the same level.

    Args:
      logprobs, ref_logprobs, mask: [N, T]; no gradient to ref_logprobs.
      old_logprobs: [N, T] of the policy that sampled, without gradient: every estimate is
        multiplied by its ratio to them, by token or by sequence as the level is. None: by 1.

    Returns:
      [N, T] nats, 0 where the mask is.
    """
    check_rank("logprobs", logprobs, 2)
    check_same_shape(
        logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask, old_logprobs=old_logprobs
    )
    check_choice("level", level, LEVELS)
    logprobs, *others = keep_weighted(mask, logprobs, ref_logprobs, old_logprobs)
    ref_logprobs, old_logprobs = jax.lax.stop_gradient(others)
    if level == "token":
        values = kl_estimate(logprobs, ref_logprobs, estimator)
    else:
        total, ref_total = (jnp.sum(x, axis=1, keepdims=True) for x in (logprobs, ref_logprobs))
        lengths = jnp.maximum(jnp.sum(mask != 0, axis=1, keepdims=True), 1)
        values = kl_estimate(total, ref_total, estimator) / lengths
    if old_logprobs is not None:
        difference = logprobs - old_logprobs
        if level == "sequence":
            difference = jnp.sum(difference, axis=1, keepdims=True)
        values = values * jnp.exp(_clamp(difference))
    return jnp.where(mask != 0, values, 0)


def importance_weights(
    logprobs: jax.Array,
    behaviour_logprobs: jax.Array,
    mask: jax.Array,
    *,
    level: str = "token",
    cap: float | None = 2.0,
    mode: str = "truncate",
) -> jax.Array:
    """Weights π/μ of samples of another policy μ: w = e^(lp − lp_μ) of tokens, e^Σ of sequences.

    By sequence and without a cap the weighted gradient is unbiased; by token it is not. Truncated:
    https://arxiv.org/abs/1802.01561 and, for a sampler that rounds differently,
    https://fengyao.notion.site/off-policy-rl.

    Args:
      logprobs, behaviour_logprobs, mask: [N, T] nats.
      mode: "truncate": w ← min(w, cap); "mask": w ← 0 above the cap.
      cap: None = none.

    Returns:
      [N, T] without gradient, 0 where the mask is.
    """
    check_rank("logprobs", logprobs, 2)
    check_same_shape(logprobs=logprobs, behaviour_logprobs=behaviour_logprobs, mask=mask)
    check_choice("level", level, LEVELS)
    check_choice("mode", mode, ("truncate", "mask"))
    logprobs, behaviour_logprobs = keep_weighted(mask, logprobs, behaviour_logprobs)
    difference = logprobs - behaviour_logprobs
    if level == "sequence":
        difference = jnp.sum(difference, axis=1, keepdims=True)
    weights = jnp.exp(_clamp(difference))
    if cap is not None:
        weights = jnp.where(weights > cap, cap if mode == "truncate" else 0, weights)
    return jax.lax.stop_gradient(jnp.where(mask != 0, weights, 0))


def _clamp(difference: jax.Array) -> jax.Array:
    return jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def _clipped(
    advantages: jax.Array,
    ratio: jax.Array,
    clip_low: float,
    clip_high: float,
    delta: float | None = None,
) -> Objected:
    """PPO's clipped objective of advantages [N, T] and a ratio [N, T] or [N, 1]."""
    below = (advantages < 0) & (ratio < 1 - clip_low)
    above = (advantages > 0) & (ratio > 1 + clip_high)
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    if delta is not None:
        ratio = jnp.minimum(ratio, delta)
    return Objected(-jnp.minimum(ratio * advantages, clipped * advantages), below, above)


def _token_weights(mask: jax.Array, sequence_weights: jax.Array | None) -> jax.Array:
    """[N, T]: the sequence's weight on real tokens, 0 elsewhere."""
    if sequence_weights is None:
        return (mask != 0).astype(jnp.promote_types(mask.dtype, jnp.float32))
    check_same_shape(sequence_weights=sequence_weights, first_slots=mask[:, 0])
    weights = sequence_weights.astype(jnp.promote_types(sequence_weights.dtype, jnp.float32))
    return jnp.where(mask != 0, weights[:, None], 0)


def _token_means(metrics: dict[str, jax.Array], weights: jax.Array) -> dict[str, Reduction]:
    return {
        name: weighted_sum(jax.lax.stop_gradient(value), weights) for name, value in metrics.items()
    }

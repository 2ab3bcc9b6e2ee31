"""Policy-gradient objectives, one small function each, reached by name; value and KL losses.

Layout: [N, T] is N sampled sequences of T response slots, mask nonzero on the real tokens. Notation
of every docstring: lp = log π(token) in nats, d = lp − lp_old, r = e^d, A the advantage, |y| real
tokens, sg = no gradient. Log-ratios are clamped to ±20 before the exponential.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.losses.checks import check_choice, check_range, check_rank, check_same_shape
from rlhf_jax.losses.reductions import Reduction, keep_weighted, weighted_sum
from rlhf_jax.losses.shaping import kl_estimate

Loss = tuple[Reduction, dict[str, Reduction]]
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_mean_token_mean", "constant")
LEVELS = ("token", "sequence")
MAX_LOG_RATIO = 20.0


class Tokens(NamedTuple):
    """What objectives see, all fields [N, T] and 0 where the mask is; the mask is 0 or 1."""

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


def policy_gradient(tokens: Tokens) -> jax.Array:
    """REINFORCE: −A·lp. https://doi.org/10.1007/BF00992696. For samples of the policy itself."""
    return -tokens.advantages * tokens.logprobs


def ppo(tokens: Tokens, *, clip_low=0.2, clip_high=0.2, dual_clip=None, delta=None) -> jax.Array:
    """PPO: −min(r·A, clip(r, 1 − clip_low, 1 + clip_high)·A). https://arxiv.org/abs/1707.06347.

    dual_clip c > 1: where A < 0 at most −c·A (https://arxiv.org/abs/1912.09729; 3).
    delta > 1 + clip_high: r ← min(r, delta) in the first term (https://arxiv.org/abs/2505.07291).
    """
    return _clipped(tokens, _token_ratio(tokens), clip_low, clip_high, dual_clip, delta)


def ppo_sequence(tokens: Tokens, *, clip_low=0.2, clip_high=0.2) -> jax.Array:
    """PPO on whole responses: −min(ρ·A, clip(ρ, 1 − clip_low, 1 + clip_high)·A) / |y|, ρ = e^Σd.

    RLOO's, https://arxiv.org/abs/2402.14740: the response is the action. Every token holds its
    share, so that "sequence_mean" is the mean over responses.
    """
    return _clipped(tokens, _sequence_ratio(tokens), clip_low, clip_high) / tokens.lengths


def gspo(tokens: Tokens, *, clip_low=3e-4, clip_high=4e-4, differentiable="sequence") -> jax.Array:
    """GSPO: −min(s·A, clip(s, 1 − clip_low, 1 + clip_high)·A), s = e^(Σd/|y|).

    https://arxiv.org/abs/2507.18071; "sequence_mean_token_mean" there. differentiable "sequence"
    differentiates s, "token" is GSPO-token, s_t = sg(s)·e^(lp − sg(lp)): the same value, and the
    same gradient where A is one number per sequence.
    """
    check_choice("differentiable", differentiable, LEVELS)
    ratio = _mean_ratio(tokens)
    if differentiable == "token":
        ratio = jax.lax.stop_gradient(ratio) * jnp.exp(
            tokens.logprobs - jax.lax.stop_gradient(tokens.logprobs)
        )
    return _clipped(tokens, ratio, clip_low, clip_high)


def cispo(tokens: Tokens, *, clip_high=5.0, clip_low=None, clip="absolute") -> jax.Array:
    """CISPO: −sg(c)·A·lp, where no token loses its gradient. https://arxiv.org/abs/2506.13585.

    clip "absolute": c = min(r, clip_high); "upper": c = min(r, 1 + clip_high); "both":
    c = clip(r, 1 − clip_low, 1 + clip_high), the only one with clip_low (None = 0.2).
    """
    low, high = _cispo_bounds(clip_high=clip_high, clip_low=clip_low, clip=clip)
    weight = jax.lax.stop_gradient(jnp.clip(_token_ratio(tokens), low, high))
    return -weight * tokens.advantages * tokens.logprobs


def sapo(tokens: Tokens, *, tau_positive=1.0, tau_negative=1.05) -> jax.Array:
    """SAPO: −A·σ(τ(r − 1))·4/τ, τ by the sign of A: a soft gate for the clip.

    https://arxiv.org/abs/2511.20347. A = 0 counts as negative.
    """
    tau = jnp.where(tokens.advantages > 0, tau_positive, tau_negative)
    return -tokens.advantages * jax.nn.sigmoid(tau * (_token_ratio(tokens) - 1)) * 4 / tau


def gmpo(tokens: Tokens, *, clip_low=0.4, clip_high=0.4) -> jax.Array:
    """GMPO: −A·(Π_t c_t)^(1/|y|), the geometric mean of clipped ratios.

    https://arxiv.org/abs/2507.20673; "sequence_mean_token_mean" there. Clipped in logs:
    log c = min(d, clip_high) where A > 0, max(d, −clip_low) where A < 0, else d.
    """
    d, advantages = _clamp(tokens.differences), tokens.advantages
    clipped = jnp.where(advantages > 0, jnp.minimum(d, clip_high), d)
    clipped = jnp.where(advantages < 0, jnp.maximum(d, -clip_low), clipped)
    mean = jnp.sum(clipped, axis=1, keepdims=True) / tokens.lengths
    return -advantages * jnp.exp(mean)


OBJECTIVES: dict[str, Callable[..., jax.Array]] = {
    "policy_gradient": policy_gradient,
    "ppo": ppo,
    "ppo_sequence": ppo_sequence,
    "gspo": gspo,
    "cispo": cispo,
    "sapo": sapo,
    "gmpo": gmpo,
}


def policy_loss(
    name: str,
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    *,
    aggregation: str = "token_mean",
    constant: float | None = None,
    sequence_weights: jax.Array | None = None,
    importance: jax.Array | None = None,
    **options: Any,
) -> Loss:
    """The policy objective called `name` over N sequences.

    Args:
      name: one of OBJECTIVES; the function of that name has the equation, paper and options.
      logprobs, old_logprobs: [N, T] nats, of the policy now and when the update began, both at the
        sampling temperature. advantages: [N, T]. Only logprobs gets a gradient.
      mask: [N, T], nonzero on response tokens including EOS; all else there is ignored.
      aggregation, constant, sequence_weights: see `aggregate`.
      importance: [N, T] factors of the tokens' losses, without gradient (see `importance_weights`).
      options: of the named objective; None means its default.

    Returns:
      (total, weight); metrics loss and, as means over tokens weighted by sequence, policy/ratio (r)
      and policy/ratio_square (r²); policy/approxkl (½d²) and policy/approxkl_k3 (r − 1 − d),
      estimates of KL(old‖π); policy/clipfrac, the share of tokens that the objective's clip
      changes, split into policy/clipfrac_low (A < 0, ratio below) and policy/clipfrac_high (A > 0,
      ratio above), by the objective's own ratio. cispo clips whatever the sign of A. An objective
      without a clip, policy_gradient or sapo, reports none of the three.

    Raises:
      ValueError: an unknown name, or an option the objective does not have.
    """
    options = {key: value for key, value in options.items() if value is not None}
    check_policy_options(name, options)
    check_rank("logprobs", logprobs, 2)
    check_same_shape(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        importance=importance,
    )
    weights = _token_weights(mask, sequence_weights)
    cleaned = keep_weighted(weights, logprobs, old_logprobs, advantages, importance)
    logprobs, old_logprobs, advantages, importance = cleaned
    tokens = Tokens(
        logprobs,
        jax.lax.stop_gradient(old_logprobs),
        jax.lax.stop_gradient(advantages),
        (weights != 0).astype(logprobs.dtype),
    )
    values = OBJECTIVES[name](tokens, **options)
    if importance is not None:
        values = values * jax.lax.stop_gradient(importance)
    loss = aggregate(
        values, mask, aggregation, constant=constant, sequence_weights=sequence_weights
    )

    ratio, d = _token_ratio(tokens), _clamp(tokens.differences)
    metrics = {
        "policy/ratio": ratio,
        "policy/ratio_square": ratio**2,
        "policy/approxkl": d**2 / 2,
        "policy/approxkl_k3": jnp.expm1(d) - d,
    }
    if sides := _clip_fractions(name, tokens, options):
        below, above = sides
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
    aggregation: str = "token_mean",
    constant: float | None = None,
    sequence_weights: jax.Array | None = None,
) -> Loss:
    """½·max((V − R)², (clip(V, V_old ± clip) − R)²); ½·(V − R)² where clip is None.

    The clip of https://arxiv.org/abs/2005.12729.

    Args:
      values, old_values, returns, mask: [N, T]; only values gets a gradient.
      aggregation, constant, sequence_weights: see `aggregate`.

    Returns:
      (total, weight); metrics loss and, as means over tokens weighted by sequence, value/clipfrac
      (the clipped error is the larger), value/mean (V), value/error_square ((V − R)²),
      returns/mean and returns/square. The explained variance is 1 − Var(R − V)/Var(R).
    """
    check_rank("values", values, 2)
    check_same_shape(values=values, old_values=old_values, returns=returns, mask=mask)
    weights = _token_weights(mask, sequence_weights)
    values, old_values, returns = keep_weighted(weights, values, old_values, returns)
    old_values, returns = jax.lax.stop_gradient((old_values, returns))
    error = clipped = (values - returns) ** 2
    if clip is not None:
        check_range("clip", clip, clip > 0, "(0, inf)")
        near = old_values + jnp.clip(values - old_values, -clip, clip)
        clipped = (near - returns) ** 2
    loss = aggregate(
        jnp.maximum(error, clipped) / 2,
        mask,
        aggregation,
        constant=constant,
        sequence_weights=sequence_weights,
    )
    metrics = {
        "value/clipfrac": clipped > error,
        "value/mean": values,
        "value/error_square": error,
        "returns/mean": returns,
        "returns/square": returns**2,
    }
    return loss, {"loss": loss} | _token_means(metrics, weights)


def kl_loss(
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    mask: jax.Array,
    *,
    estimator: str = "k2",
    level: str = "sequence",
    importance: jax.Array | None = None,
) -> jax.Array:
    """KL(π‖ref) of samples of π as tokens' losses, whose `aggregate` is the KL term.

    level "sequence" estimates from the summed log-ratio Σ_t (lp − lp_ref), and puts 1/|y| of that
    on each token; "token" estimates token by token (see `kl_estimate`). Of the expected gradients:

    k2 by sequence is that of KL(π‖ref), exactly; the term to choose. k2 by token leaves out what
    a token does to the KL of those after it, and so does k3 by token times the ratio π/sg(π) as
    importance, with its gradient (https://arxiv.org/abs/2512.02556): in expectation they are one.
    k3, at either level, is that of the forward KL, of another optimum. k1 has none, E[∇lp] = 0: it
    belongs in the rewards (`token_rewards`), where it is exact.

    Args:
      logprobs, ref_logprobs, mask: [N, T]; no gradient to ref_logprobs.
      importance: [N, T] factors of the tokens' terms, differentiated.

    Returns:
      [N, T] nats, 0 where the mask is.
    """
    check_rank("logprobs", logprobs, 2)
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask, importance=importance)
    check_choice("level", level, LEVELS)
    logprobs, ref_logprobs, importance = keep_weighted(mask, logprobs, ref_logprobs, importance)
    ref_logprobs = jax.lax.stop_gradient(ref_logprobs)
    if level == "token":
        values = kl_estimate(logprobs, ref_logprobs, estimator)
    else:
        total, ref_total = (jnp.sum(x, axis=1, keepdims=True) for x in (logprobs, ref_logprobs))
        lengths = jnp.maximum(jnp.sum(mask != 0, axis=1, keepdims=True), 1)
        values = kl_estimate(total, ref_total, estimator) / lengths
    if importance is not None:
        values = values * importance
    return jnp.where(mask != 0, values, 0)


def importance_weights(
    logprobs: jax.Array,
    behaviour_logprobs: jax.Array,
    mask: jax.Array,
    *,
    level: str = "token",
    cap: float | None = 2.0,
    mode: str = "truncate",
    floor: float = 0.0,
) -> jax.Array:
    """Weights π/μ of samples of another policy μ: w = e^(lp − lp_μ) of tokens, e^Σ of sequences.

    By sequence and without a cap the weighted gradient is unbiased; by token it is not. Truncated:
    https://arxiv.org/abs/1802.01561 and, for a sampler that rounds differently,
    https://fengyao.notion.site/off-policy-rl.

    Args:
      logprobs, behaviour_logprobs, mask: [N, T] nats.
      mode: "truncate": w ← clip(w, floor, cap); "mask": w ← 0 outside [floor, cap].
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
    high = jnp.inf if cap is None else cap
    if mode == "truncate":
        weights = jnp.clip(weights, floor, high)
    else:
        weights = jnp.where((weights >= floor) & (weights <= high), weights, 0)
    return jax.lax.stop_gradient(jnp.where(mask != 0, weights, 0))


def policy_options(name: str) -> dict[str, Any]:
    """Names and defaults of the options of the policy objective called `name`."""
    if name not in OBJECTIVES:
        hint, known = _nearest(name, OBJECTIVES), ", ".join(OBJECTIVES)
        raise ValueError(f"unknown policy objective {name!r}{hint}; known: {known}")
    parameters = inspect.signature(OBJECTIVES[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.name != "tokens"}


def check_policy_options(name: str, options: Mapping[str, Any]) -> None:
    """ValueError for an unknown objective, or an option that the objective would ignore."""
    known = policy_options(name)
    for option in sorted(set(options) - set(known)):
        hint, listed = _nearest(option, known), ", ".join(known) or "none"
        raise ValueError(
            f"the policy objective {name!r} has no option {option}{hint}; its options: {listed}"
        )


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _clamp(difference: jax.Array) -> jax.Array:
    return jnp.clip(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)


def _token_ratio(tokens: Tokens) -> jax.Array:
    return jnp.exp(_clamp(tokens.differences))


def _sequence_ratio(tokens: Tokens) -> jax.Array:
    return jnp.exp(_clamp(jnp.sum(tokens.differences, axis=1, keepdims=True)))


def _mean_ratio(tokens: Tokens) -> jax.Array:
    total = jnp.sum(tokens.differences, axis=1, keepdims=True)
    return jnp.exp(_clamp(total / tokens.lengths))


def _clipped(
    tokens: Tokens,
    ratio: jax.Array,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    delta: float | None = None,
) -> jax.Array:
    """PPO's clipped objective of a ratio [N, T] or [N, 1], as a loss."""
    advantages = tokens.advantages
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    if delta is not None:
        check_range("delta", delta, delta > 1 + clip_high, "(1 + clip_high, inf)")
        ratio = jnp.minimum(ratio, delta)
    loss = -jnp.minimum(ratio * advantages, clipped * advantages)
    if dual_clip is not None:
        check_range("dual_clip", dual_clip, dual_clip > 1, "(1, inf)")
        loss = jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)
    return loss


def _cispo_bounds(
    *, clip_high: float, clip_low: float | None, clip: str
) -> tuple[float | None, float]:
    check_choice("clip", clip, ("absolute", "upper", "both"))
    if clip == "both":
        return 1 - (0.2 if clip_low is None else clip_low), 1 + clip_high
    if clip_low is not None:
        raise ValueError(f"the option clip_low is only for clip 'both', not {clip!r}")
    return None, clip_high if clip == "absolute" else 1 + clip_high


def _clip_fractions(
    name: str, tokens: Tokens, options: Mapping[str, Any]
) -> tuple[jax.Array, jax.Array] | None:
    """Where the objective's clip changes a token: (below its range, above it), bool [N, T].

    None for an objective that has none.
    """
    options = policy_options(name) | dict(options)
    down, up = tokens.advantages < 0, tokens.advantages > 0
    if name == "cispo":
        low, high = _cispo_bounds(**options)
        ratio = _token_ratio(tokens)
        below = jnp.zeros_like(down) if low is None else ratio < low
        return below & (down | up), (ratio > high) & (down | up)
    if name == "gmpo":
        d = _clamp(tokens.differences)
        return down & (d < -options["clip_low"]), up & (d > options["clip_high"])
    ratios = {"ppo": _token_ratio, "ppo_sequence": _sequence_ratio, "gspo": _mean_ratio}
    if name not in ratios:
        return None
    ratio = ratios[name](tokens)
    return down & (ratio < 1 - options["clip_low"]), up & (ratio > 1 + options["clip_high"])


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

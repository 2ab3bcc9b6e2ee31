"""Preference losses: DPO and its relatives, one small class each, reached by name.

Notation of every docstring: lp = log π(y|x) summed over the response (nats), s = lp − lp_ref its
log-ratio to the reference, Δ = s_w − s_l of the chosen response w and the rejected l, |y| tokens,
lp̄ = lp/|y| and s̄ = s/|y|. Unless it says otherwise a loss is defined per pair, [N] → [N] nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.losses.checks import (
    check_choice,
    check_options,
    check_rank,
    check_same_shape,
    within,
)
from rlhf_jax.losses.reductions import Reduction, keep_weighted, mean, weighted_sum
from rlhf_jax.losses.reward import pair_accuracy

log_sigmoid = jax.nn.log_sigmoid
sigma = jax.nn.sigmoid


class Pairs(NamedTuple):
    """N pairs, all fields [N].

    Attributes:
      chosen, rejected: nats, log-probs summed over response tokens including EOS.
      ref_chosen, ref_rejected: nats, of the reference; None for (only) reference-free losses.
      chosen_lengths, rejected_lengths: response tokens; 0 (an empty response) counts as 1.
      weights: such as 1, or a probability; 0 = no pair (ignored, whatever else it holds).
      kl: nats, [N] or scalar; KTO's reference point (`kto_baseline`), None for other losses.
    """

    chosen: jax.Array
    rejected: jax.Array
    ref_chosen: Any
    ref_rejected: Any
    chosen_lengths: jax.Array
    rejected_lengths: jax.Array
    weights: jax.Array
    kl: Any = None

    @property
    def logratios(self) -> tuple[jax.Array, jax.Array]:
        """(s_w, s_l); lp itself where there is no reference."""
        if self.ref_chosen is None:
            return self.chosen, self.rejected
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected

    @property
    def margins(self) -> jax.Array:
        """Δ = s_w − s_l."""
        chosen, rejected = self.logratios
        return chosen - rejected

    def per_token(self) -> Pairs:
        """Returns the pairs with every log-prob divided by its response's length."""
        chosen, rejected = self.chosen_lengths, self.rejected_lengths
        return self._replace(
            chosen=self.chosen / chosen,
            rejected=self.rejected / rejected,
            ref_chosen=None if self.ref_chosen is None else self.ref_chosen / chosen,
            ref_rejected=None if self.ref_rejected is None else self.ref_rejected / rejected,
        )


@dataclass(frozen=True)
class PreferenceLoss:
    """A preference loss: a function of pairs whose options are its fields.

    Attributes:
      beta: strength of the tie to the reference, or what the loss calls so.
    """

    uses_reference: ClassVar[bool] = True
    # Divides log-probs by length; so do its implicit rewards.
    per_token: ClassVar[bool] = False
    # It sorts all pairs that it is given: of parts of a batch it is a different (and noisier) loss
    # than of the whole.
    batchwise: ClassVar[bool] = False
    coupled: ClassVar[bool] = False  # its parts do not add up to the whole batch, for any reason

    beta: float = within("(0, inf)", 0.1)

    def __post_init__(self) -> None:
        """Raises ValueError for an option outside its range."""
        check_options(self)

    def __call__(self, pairs: Pairs) -> Any:
        """Returns the losses [N]; a batch-wise loss returns (values, weights)."""
        raise NotImplementedError


def divergent_margins(pairs: Pairs, divergence: str, alpha: float | None) -> jax.Array:
    """f′(u_w) − f′(u_l), u = eˢ, in place of Δ: f-DPO, https://arxiv.org/abs/2309.16240.

    It regularises with E_ref f(π/π_ref): "reverse_kl" f′ = s (DPO), "forward_kl" f′ = −e^(−s),
    "js" f′ = log(2u/(1+u)), "alpha" f′ = (1 − e^(−αs))/α with 0 < α < 1, the option alpha (0.5).
    Forward KL grows as e^(−s) and overflows float32 at s < −88: inf, not a clamped value.
    """
    chosen, rejected = pairs.logratios
    match divergence:
        case "forward_kl":
            return jnp.exp(-rejected) - jnp.exp(-chosen)
        case "js":
            return log_sigmoid(chosen) - log_sigmoid(rejected)
        case "alpha":
            alpha = 0.5 if alpha is None else alpha
            return (jnp.exp(-alpha * rejected) - jnp.exp(-alpha * chosen)) / alpha
    return chosen - rejected


@dataclass(frozen=True)
class Sigmoid(PreferenceLoss):
    """DPO: −log σ(βΔ). https://arxiv.org/abs/2305.18290. Δ is that of `divergent_margins`."""

    divergence: str = "reverse_kl"  # or forward_kl, js, alpha
    alpha: float | None = within("(0, 1)", None)  # of the divergence "alpha"; None: 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("divergence", self.divergence, ("reverse_kl", "forward_kl", "js", "alpha"))
        if self.alpha is not None and self.divergence != "alpha":
            kind = f"not {self.divergence!r}"
            raise ValueError(f"the option alpha is only for divergence 'alpha', {kind}")

    def __call__(self, pairs: Pairs) -> jax.Array:
        margins = divergent_margins(pairs, self.divergence, self.alpha)
        return -log_sigmoid(self.beta * margins)


@dataclass(frozen=True)
class Cdpo(Sigmoid):
    """Conservative DPO: −(1−ε)·log σ(βΔ) − ε·log σ(−βΔ). https://ericmitchell.ai/cdpo.pdf."""

    # ε, the share of labels that are taken to be flipped.
    label_smoothing: float = within("[0, 0.5)", 0.1)

    def __call__(self, pairs: Pairs) -> jax.Array:
        x = self.beta * divergent_margins(pairs, self.divergence, self.alpha)
        flipped = self.label_smoothing
        return -(1 - flipped) * log_sigmoid(x) - flipped * log_sigmoid(-x)


@dataclass(frozen=True)
class Robust(Cdpo):
    """rDPO: [−(1−ε)·log σ(βΔ) + ε·log σ(−βΔ)] / (1−2ε). https://arxiv.org/abs/2403.00409.

    The unbiased estimate of DPO's loss when a share ε of the labels is flipped.
    """

    def __call__(self, pairs: Pairs) -> jax.Array:
        x = self.beta * divergent_margins(pairs, self.divergence, self.alpha)
        flipped = self.label_smoothing
        unbiased = -(1 - flipped) * log_sigmoid(x) + flipped * log_sigmoid(-x)
        return unbiased / (1 - 2 * flipped)


@dataclass(frozen=True)
class Hinge(PreferenceLoss):
    """SLiC/RSO hinge: max(0, 1 − βΔ). https://arxiv.org/abs/2309.06657."""

    def __call__(self, pairs: Pairs) -> jax.Array:
        return jax.nn.relu(1 - self.beta * pairs.margins)


@dataclass(frozen=True)
class Ipo(PreferenceLoss):
    """IPO: (Δ − 1/(2β))². https://arxiv.org/abs/2310.12036 (whose τ is β)."""

    beta: float = within("[1e-12, inf)", 0.1)  # 1/(2β) is squared in float32
    ipo_reduction: str = "sum"  # Δ of summed log-probs, as in the paper; "mean": of s̄

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("ipo_reduction", self.ipo_reduction, ("sum", "mean"))

    @property
    def per_token(self) -> bool:  # type: ignore[override]
        """Whether its implicit rewards are per token, as its loss then is."""
        return self.ipo_reduction == "mean"

    def __call__(self, pairs: Pairs) -> jax.Array:
        pairs = pairs.per_token() if self.per_token else pairs
        return (pairs.margins - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class Kto(PreferenceLoss):
    """KTO on both sides of a pair: λ_D·[1 − σ(β(s_w − z))] + λ_U·[1 − σ(β(z − s_l))].

    https://arxiv.org/abs/2402.01306. z ≥ 0 is the pairs' kl, required (`kto_baseline`); no gradient
    flows to it. With z = 0 and equal weights this is `ApoZero`.
    """

    coupled = True  # by the reference point, a mean of the whole batch
    desirable_weight: float = within("[0, inf)", 1.0)  # λ_D
    undesirable_weight: float = within("[0, inf)", 1.0)  # λ_U

    def examples(self, logratios: jax.Array, labels: jax.Array, kl: Any) -> jax.Array:
        """Single responses [N]: λ_D·[1 − σ(β(s − z))] of label 1, λ_U·[1 − σ(β(z − s))] of 0."""
        z = jax.lax.stop_gradient(kl)
        good = labels != 0
        size = jnp.where(good, self.desirable_weight, self.undesirable_weight)
        return size * sigma(self.beta * jnp.where(good, z - logratios, logratios - z))

    def __call__(self, pairs: Pairs) -> jax.Array:
        if pairs.kl is None:
            raise ValueError("kto needs the option kl, its reference point: see kto_baseline")
        chosen, rejected = pairs.logratios
        kl = jnp.where(pairs.weights != 0, pairs.kl, 0)
        good = self.examples(chosen, jnp.ones_like(chosen), kl)
        return good + self.examples(rejected, jnp.zeros_like(rejected), kl)


def unpaired_kto(
    loss: Kto,
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    labels: jax.Array,
    *,
    weights: jax.Array,
    kl: Any,
) -> tuple[Reduction, dict[str, Reduction]]:
    """KTO over N responses each labelled by itself; its total on both sides of pairs is `Kto`'s.

    https://arxiv.org/abs/2402.01306.

    Args:
      loss: its options.
      logprobs, ref_logprobs: [N] nats, summed over response tokens including EOS.
      labels: [N], 1 = desirable, 0 = not. weights: [N], 0 = no response.
      kl: the reference point z ≥ 0, scalar nats: see `kto_baseline`.

    Returns:
      (total, weight) in the loss's units and responses; metrics loss, and of either label
      rewards/{chosen,rejected} (β·s) and logps/{chosen,rejected} (nats per response).
    """
    check_rank("logprobs", logprobs, 1)
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, labels=labels, weights=weights)
    logprobs, ref_logprobs, labels = keep_weighted(weights, logprobs, ref_logprobs, labels)
    logratios = logprobs - ref_logprobs
    total = weighted_sum(loss.examples(logratios, labels, kl), weights)
    metrics = {"loss": total}
    for name, of in (("chosen", labels != 0), ("rejected", labels == 0)):
        metrics[f"rewards/{name}"] = weighted_sum(loss.beta * logratios, weights * of)
        metrics[f"logps/{name}"] = weighted_sum(logprobs, weights * of)
    return total, metrics


def kto_baseline(logprobs: jax.Array, ref_logprobs: jax.Array, weights: jax.Array) -> jax.Array:
    """KTO's reference point z₀ = max(0, Σ wᵢ·(lpᵢ − lp_refᵢ) / Σ wᵢ), scalar nats, no gradient.

    logprobs, ref_logprobs: [N] of replies to other prompts, each scored after a prompt that it does
    not answer. They are those of the whole batch, since its parts have other means and the clamp at
    0 comes last.
    """
    check_rank("logprobs", logprobs, 1)
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, weights=weights)
    kl = mean(weighted_sum(logprobs - ref_logprobs, weights))
    return jax.lax.stop_gradient(jnp.maximum(kl, 0))


@dataclass(frozen=True)
class Orpo(PreferenceLoss):
    """ORPO: −lp̄_w − β·log σ(logit e^lp̄_w − logit e^lp̄_l), logit p = log p/(1−p).

    https://arxiv.org/abs/2403.07691 (whose λ is β). Reference-free.
    """

    uses_reference = False
    per_token = True

    def __call__(self, pairs: Pairs) -> jax.Array:
        pairs = pairs.per_token()
        log_odds = _logit_exp(pairs.chosen) - _logit_exp(pairs.rejected)
        return -pairs.chosen - self.beta * log_sigmoid(log_odds)


@dataclass(frozen=True)
class Simpo(PreferenceLoss):
    """SimPO: −log σ(β·(lp̄_w − lp̄_l) − γ). https://arxiv.org/abs/2405.14734 (β 2 to 10 there).

    Reference-free.
    """

    uses_reference = False
    per_token = True
    gamma: float = within("[0, inf)", 0.5)  # the target margin, nats

    def __call__(self, pairs: Pairs) -> jax.Array:
        return -log_sigmoid(self.beta * pairs.per_token().margins - self.gamma)


@dataclass(frozen=True)
class Cpo(PreferenceLoss):
    """CPO: −log σ(β·(lp_w − lp_l)) − c·lp̄_w. https://arxiv.org/abs/2401.08417.

    Reference-free; the second term is a token mean as in the authors' code.
    """

    uses_reference = False
    sft_weight: float = within("[0, inf)", 1.0)  # c

    def __call__(self, pairs: Pairs) -> jax.Array:
        sft = -self.sft_weight * pairs.per_token().chosen
        return -log_sigmoid(self.beta * pairs.margins) + sft


@dataclass(frozen=True)
class ExoPair(PreferenceLoss):
    """EXO: KL of (σ(βΔ), σ(−βΔ)) from (1−ε, ε), the reverse of cDPO's. https://arxiv.org/abs/2402.00856."""

    label_smoothing: float = within("(0, 0.5)", 1e-3)  # ε

    def __call__(self, pairs: Pairs) -> jax.Array:
        x = self.beta * pairs.margins
        win = sigma(x) * (log_sigmoid(x) - math.log1p(-self.label_smoothing))
        return win + sigma(-x) * (log_sigmoid(-x) - math.log(self.label_smoothing))


@dataclass(frozen=True)
class NcaPair(PreferenceLoss):
    """NCA: −log σ(βs_w) − ½·log σ(−βs_w) − ½·log σ(−βs_l). https://arxiv.org/abs/2402.05369."""

    def __call__(self, pairs: Pairs) -> jax.Array:
        chosen, rejected = (self.beta * s for s in pairs.logratios)
        return -log_sigmoid(chosen) - (log_sigmoid(-chosen) + log_sigmoid(-rejected)) / 2


@dataclass(frozen=True)
class BcoPair(PreferenceLoss):
    """BCO: −log σ(βs_w) − log σ(−βs_l), reward shift 0. https://arxiv.org/abs/2404.04656."""

    def __call__(self, pairs: Pairs) -> jax.Array:
        chosen, rejected = pairs.logratios
        return -log_sigmoid(self.beta * chosen) - log_sigmoid(-self.beta * rejected)


@dataclass(frozen=True)
class SppoHard(PreferenceLoss):
    """SPPO, hard labels: (s_w − 1/(2β))² + (s_l + 1/(2β))². https://arxiv.org/abs/2405.00675."""

    beta: float = within("[1e-12, inf)", 0.1)  # 1/(2β) is squared in float32

    def __call__(self, pairs: Pairs) -> jax.Array:
        chosen, rejected = pairs.logratios
        return (chosen - 1 / (2 * self.beta)) ** 2 + (rejected + 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class ApoZero(PreferenceLoss):
    """APO-zero: 1 − σ(βs_w) + σ(βs_l): chosen up, rejected down. https://arxiv.org/abs/2408.06266."""

    def __call__(self, pairs: Pairs) -> jax.Array:
        chosen, rejected = pairs.logratios
        return sigma(-self.beta * chosen) + sigma(self.beta * rejected)


@dataclass(frozen=True)
class ApoDown(PreferenceLoss):
    """APO-down: σ(βs_w) + 1 − σ(βΔ): both down, rejected more. https://arxiv.org/abs/2408.06266."""

    def __call__(self, pairs: Pairs) -> jax.Array:
        return sigma(self.beta * pairs.logratios[0]) + sigma(-self.beta * pairs.margins)


@dataclass(frozen=True)
class Aot(PreferenceLoss):
    """AOT, paired: −log σ(β(q(lp_w − lp_l) − q(lp_ref_w − lp_ref_l))), q the batch's quantiles.

    https://arxiv.org/abs/2406.05882. Batch-wise: the values and weights, both [2N], are those of
    the matched pieces.
    """

    batchwise = True
    coupled = True

    def __call__(self, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
        margins, ref_margins = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
        policy, reference, weights = _match_quantiles(margins, ref_margins, pairs.weights)
        return -log_sigmoid(self.beta * (policy - reference)), weights


@dataclass(frozen=True)
class AotUnpaired(Aot):
    """AOT, unpaired: −log σ(β(q(s_w) − q(s_l))), q the batch's quantiles.

    https://arxiv.org/abs/2406.05882. Batch-wise, and otherwise, as `Aot`.
    """

    def __call__(self, pairs: Pairs) -> tuple[jax.Array, jax.Array]:
        chosen, rejected, weights = _match_quantiles(*pairs.logratios, pairs.weights)
        return -log_sigmoid(self.beta * (chosen - rejected)), weights


@dataclass(frozen=True)
class Discopop(PreferenceLoss):
    """DiscoPOP: (1−m)·(−log σ(x)) + m·e^(−x), x = βΔ, m = σ(x/τ). https://arxiv.org/abs/2406.08414.

    m·e^(−x) is computed as one exponential, which cannot be 0·∞.
    """

    temperature: float = within("(0, inf)", 0.05)  # τ

    def __call__(self, pairs: Pairs) -> jax.Array:
        x = self.beta * pairs.margins
        modulated = jnp.exp(log_sigmoid(x / self.temperature) - x)
        return -sigma(-x / self.temperature) * log_sigmoid(x) + modulated


@dataclass(frozen=True)
class SigmoidNorm(PreferenceLoss):
    """Length-normalised DPO: −log σ(β(s̄_w − s̄_l)). https://arxiv.org/abs/2411.15124 (β 5 there)."""

    per_token = True

    def __call__(self, pairs: Pairs) -> jax.Array:
        return -log_sigmoid(self.beta * pairs.per_token().margins)


@dataclass(frozen=True)
class Rpo(Sigmoid):
    """DPO + SFT: −log σ(βΔ) − c·lp̄_w. https://arxiv.org/abs/2404.19733."""

    sft_weight: float = within("[0, inf)", 1.0)  # c

    def __call__(self, pairs: Pairs) -> jax.Array:
        return super().__call__(pairs) - self.sft_weight * pairs.per_token().chosen


LOSSES: dict[str, type[PreferenceLoss]] = {
    "sigmoid": Sigmoid,
    "cdpo": Cdpo,
    "robust": Robust,
    "hinge": Hinge,
    "ipo": Ipo,
    "kto": Kto,
    "orpo": Orpo,
    "simpo": Simpo,
    "cpo": Cpo,
    "exo_pair": ExoPair,
    "nca_pair": NcaPair,
    "bco_pair": BcoPair,
    "sppo_hard": SppoHard,
    "apo_zero": ApoZero,
    "apo_down": ApoDown,
    "aot": Aot,
    "aot_unpaired": AotUnpaired,
    "discopop": Discopop,
    "sigmoid_norm": SigmoidNorm,
    "rpo": Rpo,
}


def preference_loss(loss: PreferenceLoss, pairs: Pairs) -> tuple[Reduction, dict[str, Reduction]]:
    """A preference loss over N pairs of responses.

    Args:
      loss: one of LOSSES; its class has the equation, the paper and its options.

    Returns:
      (total, weight) in the loss's units and pairs; metrics loss, logps/{chosen,rejected} (nats per
      response) and rewards/{chosen,rejected,margins,accuracies}: β·s, or β·lp without a reference,
      per token if the loss is; a tie counts ½.

    Raises:
      ValueError: arrays of other shapes, or a reference missing or unused.
    """
    references = pairs.ref_chosen, pairs.ref_rejected
    if any((reference is not None) != loss.uses_reference for reference in references):
        use = "needs both" if loss.uses_reference else "uses no"
        name = next(name for name, kind in LOSSES.items() if kind is type(loss))
        raise ValueError(f"the preference loss {name!r} {use} reference log-probs")
    check_rank("chosen", pairs.chosen, 1)
    check_same_shape(**pairs._replace(kl=None)._asdict())

    pairs = Pairs._make((*keep_weighted(pairs.weights, *pairs[:-1]), pairs.kl))
    pairs = pairs._replace(
        chosen_lengths=jnp.maximum(pairs.chosen_lengths, 1),
        rejected_lengths=jnp.maximum(pairs.rejected_lengths, 1),
    )
    values = loss(pairs)
    total = weighted_sum(*values) if loss.batchwise else weighted_sum(values, pairs.weights)
    scored = pairs.per_token() if loss.per_token else pairs
    chosen, rejected = (loss.beta * logratios for logratios in scored.logratios)
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": pair_accuracy(chosen - rejected),
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
    }
    sums = {name: weighted_sum(value, pairs.weights) for name, value in metrics.items()}
    return total, {"loss": total} | sums


def _logit_exp(x: jax.Array) -> jax.Array:
    """log(eˣ / (1 − eˣ)) for x < 0, accurate near 0; x = 0 (a sure response) counts as −eps."""
    x = jnp.minimum(x, -jnp.finfo(x.dtype).eps)
    near = x > -math.log(2)
    # Both branches see only arguments they are meant for: else their unused gradient is a NaN.
    log1mexp = jnp.where(
        near,
        jnp.log(-jnp.expm1(jnp.where(near, x, -1))),
        jnp.log1p(-jnp.exp(jnp.where(near, -1, x))),
    )
    return x - log1mexp


def _match_quantiles(
    a: jax.Array, b: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Optimal transport on the line: the weighted samples a and b [N] matched quantile by quantile.

    The steps of both quantile functions cut [0, Σw] into 2N pieces; returns a's and b's value and
    the length of each, [2N] all. With equal weights that is sort against sort.
    """
    order_a, order_b = jnp.argsort(a), jnp.argsort(b)
    ends_a, ends_b = jnp.cumsum(weights[order_a]), jnp.cumsum(weights[order_b])
    ends = jnp.sort(jnp.concatenate([ends_a, ends_b]))
    lengths = jnp.diff(ends, prepend=0)
    middles = ends - lengths / 2
    last = a.shape[0] - 1
    index_a = jnp.minimum(jnp.searchsorted(ends_a, middles), last)
    index_b = jnp.minimum(jnp.searchsorted(ends_b, middles), last)
    return a[order_a][index_a], b[order_b][index_b], lengths

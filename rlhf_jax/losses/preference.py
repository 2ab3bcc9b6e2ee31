"""Preference losses: DPO and its relatives, one small function each, reached by name.

Notation of every docstring: lp = log π(y|x) summed over the response (nats), s = lp − lp_ref its
log-ratio to the reference, Δ = s_w − s_l of the chosen response w and the rejected l, |y| tokens,
lp̄ = lp/|y| and s̄ = s/|y|. Unless it says otherwise a loss is defined per pair, [N] → [N] nats.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.losses.checks import check_choice, check_range, check_rank, check_same_shape
from rlhf_jax.losses.reductions import Reduction, keep_weighted, mean, weighted_sum
from rlhf_jax.losses.reward import pair_accuracy

log_sigmoid = jax.nn.log_sigmoid
sigma = jax.nn.sigmoid


class Pairs(NamedTuple):
    """N pairs, all fields [N]: summed log-probs in nats, lengths in tokens (at least 1).

    The reference fields are None for the reference-free losses.
    """

    chosen: jax.Array
    rejected: jax.Array
    ref_chosen: Any
    ref_rejected: Any
    chosen_lengths: jax.Array
    rejected_lengths: jax.Array
    weights: jax.Array

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
        """The same pairs with every log-prob divided by its response's length."""
        chosen, rejected = self.chosen_lengths, self.rejected_lengths
        return self._replace(
            chosen=self.chosen / chosen,
            rejected=self.rejected / rejected,
            ref_chosen=None if self.ref_chosen is None else self.ref_chosen / chosen,
            ref_rejected=None if self.ref_rejected is None else self.ref_rejected / rejected,
        )


def sigmoid(pairs: Pairs, *, beta, divergence="reverse_kl", alpha=None) -> jax.Array:
    """DPO: −log σ(βΔ). https://arxiv.org/abs/2305.18290. Options: see `divergence_margins`."""
    return -log_sigmoid(beta * divergence_margins(pairs, divergence, alpha))


def cdpo(
    pairs: Pairs, *, beta, label_smoothing=0.1, divergence="reverse_kl", alpha=None
) -> jax.Array:
    """Conservative DPO: −(1−ε)·log σ(βΔ) − ε·log σ(−βΔ). https://ericmitchell.ai/cdpo.pdf."""
    check_range("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "[0, 0.5)")
    x = beta * divergence_margins(pairs, divergence, alpha)
    return -(1 - label_smoothing) * log_sigmoid(x) - label_smoothing * log_sigmoid(-x)


def robust(
    pairs: Pairs, *, beta, label_smoothing=0.1, divergence="reverse_kl", alpha=None
) -> jax.Array:
    """rDPO: [−(1−ε)·log σ(βΔ) + ε·log σ(−βΔ)] / (1−2ε). https://arxiv.org/abs/2403.00409.

    The unbiased estimate of DPO's loss when a share ε of the labels is flipped.
    """
    check_range("label_smoothing", label_smoothing, 0 <= label_smoothing < 0.5, "[0, 0.5)")
    x = beta * divergence_margins(pairs, divergence, alpha)
    flipped = -(1 - label_smoothing) * log_sigmoid(x) + label_smoothing * log_sigmoid(-x)
    return flipped / (1 - 2 * label_smoothing)


def hinge(pairs: Pairs, *, beta) -> jax.Array:
    """SLiC/RSO hinge: max(0, 1 − βΔ). https://arxiv.org/abs/2309.06657."""
    return jax.nn.relu(1 - beta * pairs.margins)


def ipo(pairs: Pairs, *, beta, ipo_reduction="sum") -> jax.Array:
    """IPO: (Δ − 1/(2β))². https://arxiv.org/abs/2310.12036 (whose τ is β).

    ipo_reduction "sum" (the default, the paper's) takes Δ of summed log-probs, "mean" of s̄.
    """
    check_choice("ipo_reduction", ipo_reduction, ("sum", "mean"))
    pairs = pairs.per_token() if ipo_reduction == "mean" else pairs
    return (pairs.margins - 1 / (2 * beta)) ** 2


def kto(pairs: Pairs, *, beta, kl=None, desirable_weight=1.0, undesirable_weight=1.0) -> jax.Array:
    """KTO on both sides of a pair: λ_D·[1 − σ(β(s_w − z))] + λ_U·[1 − σ(β(z − s_l))].

    https://arxiv.org/abs/2402.01306. kl is z ≥ 0, scalar or [N] nats, required (`kto_baseline`);
    no gradient flows to it. With z = 0 and equal weights this is `apo_zero`.
    """
    if kl is None:
        raise ValueError("kto needs the option kl, its reference point: see kto_baseline")
    chosen, rejected = pairs.logratios
    share = partial(
        kto_example,
        kl=jnp.where(pairs.weights != 0, kl, 0),
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    return share(chosen, jnp.ones_like(chosen)) + share(rejected, jnp.zeros_like(rejected))


def kto_example(
    logratios: jax.Array, labels: jax.Array, *, kl, beta, desirable_weight, undesirable_weight
) -> jax.Array:
    """KTO of single responses [N]: λ_D·[1 − σ(β(s − z))] of label 1, λ_U·[1 − σ(β(z − s))] of 0."""
    z = jax.lax.stop_gradient(kl)
    good = labels != 0
    size = jnp.where(good, desirable_weight, undesirable_weight)
    return size * sigma(beta * jnp.where(good, z - logratios, logratios - z))


def unpaired_kto(
    logprobs: jax.Array,
    ref_logprobs: jax.Array,
    labels: jax.Array,
    *,
    weights: jax.Array,
    kl: jax.Array,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Reduction, dict[str, Reduction]]:
    """KTO over N responses each labelled by itself; its total on both sides of pairs is `kto`'s.

    https://arxiv.org/abs/2402.01306.

    Args:
      logprobs, ref_logprobs: [N] nats, summed over response tokens including EOS.
      labels: [N], 1 = desirable, 0 = not. weights: [N], 0 = no response.
      kl: the reference point z ≥ 0, scalar nats: see `kto_baseline`.

    Returns:
      (total, weight) in the loss's units and responses; metrics loss, and of either label
      rewards/{chosen,rejected} (β·s) and logps/{chosen,rejected} (nats a response).
    """
    check_rank("logprobs", logprobs, 1)
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, labels=labels, weights=weights)
    logprobs, ref_logprobs, labels = keep_weighted(weights, logprobs, ref_logprobs, labels)
    logratios = logprobs - ref_logprobs
    values = kto_example(
        logratios,
        labels,
        kl=kl,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
    )
    total = weighted_sum(values, weights)
    metrics = {"loss": total}
    for name, of in (("chosen", labels != 0), ("rejected", labels == 0)):
        metrics[f"rewards/{name}"] = weighted_sum(beta * logratios, weights * of)
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


def orpo(pairs: Pairs, *, beta) -> jax.Array:
    """ORPO: −lp̄_w − β·log σ(logit e^lp̄_w − logit e^lp̄_l), logit p = log p/(1−p).

    https://arxiv.org/abs/2403.07691 (whose λ is β). Reference-free.
    """
    pairs = pairs.per_token()
    log_odds = _logit_exp(pairs.chosen) - _logit_exp(pairs.rejected)
    return -pairs.chosen - beta * log_sigmoid(log_odds)


def simpo(pairs: Pairs, *, beta, gamma=0.5) -> jax.Array:
    """SimPO: −log σ(β·(lp̄_w − lp̄_l) − γ). https://arxiv.org/abs/2405.14734 (β 2 to 10 there).

    Reference-free; gamma is the target margin in nats.
    """
    return -log_sigmoid(beta * pairs.per_token().margins - gamma)


def cpo(pairs: Pairs, *, beta, sft_coefficient=1.0) -> jax.Array:
    """CPO: −log σ(β·(lp_w − lp_l)) − c·lp̄_w. https://arxiv.org/abs/2401.08417.

    Reference-free; c is sft_coefficient, its term a token mean as in the authors' code.
    """
    return -log_sigmoid(beta * pairs.margins) - sft_coefficient * pairs.per_token().chosen


def exo_pair(pairs: Pairs, *, beta, label_smoothing=1e-3) -> jax.Array:
    """EXO: KL of (σ(βΔ), σ(−βΔ)) from (1−ε, ε), the reverse of cDPO's. https://arxiv.org/abs/2402.00856."""
    check_range("label_smoothing", label_smoothing, 0 < label_smoothing < 0.5, "(0, 0.5)")
    x = beta * pairs.margins
    win = sigma(x) * (log_sigmoid(x) - math.log1p(-label_smoothing))
    return win + sigma(-x) * (log_sigmoid(-x) - math.log(label_smoothing))


def nca_pair(pairs: Pairs, *, beta) -> jax.Array:
    """NCA: −log σ(βs_w) − ½·log σ(−βs_w) − ½·log σ(−βs_l). https://arxiv.org/abs/2402.05369."""
    chosen, rejected = (beta * s for s in pairs.logratios)
    return -log_sigmoid(chosen) - (log_sigmoid(-chosen) + log_sigmoid(-rejected)) / 2


def bco_pair(pairs: Pairs, *, beta) -> jax.Array:
    """BCO: −log σ(βs_w) − log σ(−βs_l), reward shift 0. https://arxiv.org/abs/2404.04656."""
    chosen, rejected = pairs.logratios
    return -log_sigmoid(beta * chosen) - log_sigmoid(-beta * rejected)


def sppo_hard(pairs: Pairs, *, beta) -> jax.Array:
    """SPPO, hard labels: (s_w − 1/(2β))² + (s_l + 1/(2β))². https://arxiv.org/abs/2405.00675."""
    chosen, rejected = pairs.logratios
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


def apo_zero(pairs: Pairs, *, beta) -> jax.Array:
    """APO-zero: 1 − σ(βs_w) + σ(βs_l): chosen up, rejected down. https://arxiv.org/abs/2408.06266."""
    chosen, rejected = pairs.logratios
    return sigma(-beta * chosen) + sigma(beta * rejected)


def apo_down(pairs: Pairs, *, beta) -> jax.Array:
    """APO-down: σ(βs_w) + 1 − σ(βΔ): both down, rejected more. https://arxiv.org/abs/2408.06266."""
    return sigma(beta * pairs.logratios[0]) + sigma(-beta * pairs.margins)


def aot(pairs: Pairs, *, beta) -> tuple[jax.Array, jax.Array]:
    """AOT, paired: −log σ(β(q(lp_w − lp_l) − q(lp_ref_w − lp_ref_l))), q the batch's quantiles.

    https://arxiv.org/abs/2406.05882. Batch-wise, so a batch's parts do not add up to it: see
    `BATCHWISE`. Returns (values, weights), both [2N], of the matched pieces.
    """
    margins, ref_margins = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
    policy, reference, weights = _match_quantiles(margins, ref_margins, pairs.weights)
    return -log_sigmoid(beta * (policy - reference)), weights


def aot_unpaired(pairs: Pairs, *, beta) -> tuple[jax.Array, jax.Array]:
    """AOT, unpaired: −log σ(β(q(s_w) − q(s_l))), q the batch's quantiles.

    https://arxiv.org/abs/2406.05882. Batch-wise, and otherwise, as `aot`.
    """
    chosen, rejected, weights = _match_quantiles(*pairs.logratios, pairs.weights)
    return -log_sigmoid(beta * (chosen - rejected)), weights


def discopop(pairs: Pairs, *, beta, temperature=0.05) -> jax.Array:
    """DiscoPOP: (1−m)·(−log σ(x)) + m·e^(−x), x = βΔ, m = σ(x/τ). https://arxiv.org/abs/2406.08414.

    temperature is τ; m·e^(−x) is computed as one exponential, which cannot be 0·∞.
    """
    x = beta * pairs.margins
    modulated = jnp.exp(log_sigmoid(x / temperature) - x)
    return -sigma(-x / temperature) * log_sigmoid(x) + modulated


def sigmoid_norm(pairs: Pairs, *, beta) -> jax.Array:
    """Length-normalised DPO: −log σ(β(s̄_w − s̄_l)). https://arxiv.org/abs/2411.15124 (β 5 there)."""
    return -log_sigmoid(beta * pairs.per_token().margins)


def rpo(
    pairs: Pairs, *, beta, sft_coefficient=1.0, divergence="reverse_kl", alpha=None
) -> jax.Array:
    """DPO + SFT: −log σ(βΔ) − c·lp̄_w, c = sft_coefficient. https://arxiv.org/abs/2404.19733."""
    sft = -sft_coefficient * pairs.per_token().chosen
    return sigmoid(pairs, beta=beta, divergence=divergence, alpha=alpha) + sft


def divergence_margins(pairs: Pairs, divergence: str, alpha: float | None) -> jax.Array:
    """f-DPO: f′(u_w) − f′(u_l) with u = eˢ in place of Δ. https://arxiv.org/abs/2309.16240.

    It regularises with E_ref f(π/π_ref): "reverse_kl" f′ = s (DPO), "forward_kl" f′ = −e^(−s),
    "js" f′ = log(2u/(1+u)), "alpha" f′ = (1 − e^(−αs))/α with 0 < α < 1, the option alpha (0.5).
    Forward KL grows as e^(−s) and overflows float32 at s < −88: inf, not a clamped value.
    """
    check_choice("divergence", divergence, ("reverse_kl", "forward_kl", "js", "alpha"))
    if alpha is not None and divergence != "alpha":
        raise ValueError(f"the option alpha is only for divergence 'alpha', not {divergence!r}")
    chosen, rejected = pairs.logratios
    if divergence == "forward_kl":
        return jnp.exp(-rejected) - jnp.exp(-chosen)
    if divergence == "js":
        return log_sigmoid(chosen) - log_sigmoid(rejected)
    if divergence == "alpha":
        alpha = 0.5 if alpha is None else alpha
        check_range("alpha", alpha, 0 < alpha < 1, "(0, 1)")
        return (jnp.exp(-alpha * rejected) - jnp.exp(-alpha * chosen)) / alpha
    return chosen - rejected


_TABLE: dict[str, Callable[..., Any]] = {
    "sigmoid": sigmoid,
    "cdpo": cdpo,
    "robust": robust,
    "hinge": hinge,
    "ipo": ipo,
    "kto": kto,
    "orpo": orpo,
    "simpo": simpo,
    "cpo": cpo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "sppo_hard": sppo_hard,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "discopop": discopop,
    "sigmoid_norm": sigmoid_norm,
    "rpo": rpo,
}
LOSSES = tuple(_TABLE)
REFERENCE_FREE = frozenset({"orpo", "simpo", "cpo"})
# These sort all pairs that they are given: of parts of a batch they are a different (and noisier)
# loss than of the whole.
BATCHWISE = frozenset({"aot", "aot_unpaired"})
COUPLED = BATCHWISE | {"kto"}  # kto's reference point is a mean of the batch too
PER_TOKEN = frozenset({"orpo", "simpo", "sigmoid_norm"})


def preference_loss(
    name: str,
    chosen_logprobs: jax.Array,
    rejected_logprobs: jax.Array,
    ref_chosen_logprobs: jax.Array | None = None,
    ref_rejected_logprobs: jax.Array | None = None,
    *,
    chosen_lengths: jax.Array,
    rejected_lengths: jax.Array,
    weights: jax.Array,
    beta: float = 0.1,
    **options: Any,
) -> tuple[Reduction, dict[str, Reduction]]:
    """The preference loss called `name` over N pairs of responses.

    Args:
      name: one of LOSSES; the function of that name has the equation, the paper and its options.
      chosen_logprobs, rejected_logprobs: [N] nats, summed over response tokens including EOS.
      ref_chosen_logprobs, ref_rejected_logprobs: [N], or None for (only) REFERENCE_FREE losses.
      chosen_lengths, rejected_lengths: [N] response tokens; 0 (an empty response) counts as 1.
      weights: [N], such as 1, or a probability; 0 = no pair (ignored, whatever else it holds).
      beta: strength of the tie to the reference, or what the named loss calls so.
      options: of the named loss; None means its default.

    Returns:
      (total, weight) in the loss's units and pairs; metrics loss, logps/{chosen,rejected} (nats a
      response) and rewards/{chosen,rejected,margins,accuracies}: β·s, or β·lp without a reference,
      per token if the loss is; a tie counts ½.

    Raises:
      ValueError: unknown name, an option the loss does not have, a reference missing or unused.
    """
    loss = _find(name)
    options = {key: value for key, value in options.items() if value is not None}
    check_options(name, options)
    references = ref_chosen_logprobs, ref_rejected_logprobs
    if any((reference is None) != (name in REFERENCE_FREE) for reference in references):
        use = "uses no" if name in REFERENCE_FREE else "needs both"
        raise ValueError(f"the preference loss {name!r} {use} reference log-probs")
    arrays = {
        "chosen_logprobs": chosen_logprobs,
        "rejected_logprobs": rejected_logprobs,
        "ref_chosen_logprobs": ref_chosen_logprobs,
        "ref_rejected_logprobs": ref_rejected_logprobs,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }
    check_rank("chosen_logprobs", chosen_logprobs, 1)
    check_same_shape(**arrays, weights=weights)

    pairs = Pairs(*keep_weighted(weights, *arrays.values(), weights))
    pairs = pairs._replace(
        chosen_lengths=jnp.maximum(pairs.chosen_lengths, 1),
        rejected_lengths=jnp.maximum(pairs.rejected_lengths, 1),
    )
    values = loss(pairs, beta=beta, **options)
    total = weighted_sum(*values) if name in BATCHWISE else weighted_sum(values, weights)
    return total, {"loss": total} | _metrics(pairs, beta, name in PER_TOKEN)


def _metrics(pairs: Pairs, beta: float, per_token: bool) -> dict[str, Reduction]:
    """Sums of implicit rewards and log-probs."""
    chosen, rejected = (beta * s for s in (pairs.per_token() if per_token else pairs).logratios)
    metrics = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": pair_accuracy(chosen - rejected),
        "logps/chosen": pairs.chosen,
        "logps/rejected": pairs.rejected,
    }
    return {name: weighted_sum(value, pairs.weights) for name, value in metrics.items()}


def loss_options(name: str) -> dict[str, Any]:
    """Names and defaults of the options of the preference loss called `name`, beta aside."""
    parameters = inspect.signature(_find(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ("pairs", "beta")}


def _find(name: str) -> Callable[..., Any]:
    if name in _TABLE:
        return _TABLE[name]
    near = difflib.get_close_matches(str(name), LOSSES, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"unknown preference loss {name!r}{hint}; known: {', '.join(LOSSES)}")


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """ValueError for an unknown loss, or an option that the loss would ignore."""
    known = loss_options(name)
    unused = sorted(set(options) - set(known))
    if unused:
        listed = ", ".join(known) or "none but beta"
        raise ValueError(
            f"the preference loss {name!r} has no option {', '.join(unused)}; its options: {listed}"
        )


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

"""Token log-probabilities and cross-entropy from hidden states, without ever holding all logits.

The logits of N tokens over V words are by far the largest array of a language model. They are
computed here one chunk of tokens at a time, reduced to five numbers per token, and recomputed in
the backward pass unless they all fit into one chunk, as in "Cut Your Losses in Large-Vocabulary
Language Models", https://arxiv.org/abs/2411.09009.

Where the words are split over devices, each has its words' logits of all the devices' tokens. Then
hidden states travel and not the table, which is larger than they are, nor its gradient, as in
"Megatron-LM", https://arxiv.org/abs/1909.08053.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.losses.checks import check_rank, check_same_shape
from rlhf_jax.losses.reductions import Reduction, at_least_f32, keep_weighted, weighted_sums

# The most logits a chunk holds, unless its least number of tokens (1024, and 512 in cross_entropy)
# has more: those of `token_statistics` are kept for the backward pass if one chunk holds all, those
# of `cross_entropy` only pass by.
KEPT_LOGITS, PASSING_LOGITS = 2**24, 2**21
Ranges = tuple[tuple[int, int], ...]  # of ids: from the first to before the second of each


class TokenStatistics(NamedTuple):
    """What losses need to know of a token's distribution p = softmax(l); all fields [...], nats.

    V is the number of words that are not left out as unused.

    logprobs: log p(target). logsumexp: L = log Σᵥ exp lᵥ. mean_logit: Σᵥ lᵥ / V.
    entropy: −Σᵥ pᵥ log pᵥ. correct: 1 where the target is the first of the highest logits, else 0.
    """

    logprobs: jax.Array
    logsumexp: jax.Array
    mean_logit: jax.Array
    entropy: jax.Array
    correct: jax.Array


class Words(NamedTuple):
    """Which words logits are of, and how the unembedding [V, D] lies.

    Attributes:
      layout: "vd", or "dv" for an unembedding that is [D, V], as a kernel is.
      unused: ids that are no words, in order and not all: no field counts their logits, whose
        gradient is 0, and a target that is one has a log-prob near the lowest of all floats.
      axis: a mapped axis, such as a `shard_map`'s, over whose devices the words are split in order.
        The unembedding is then this device's, of V/n words, and a bias is theirs, while hidden
        states, targets and weights are of this device's tokens, as many as any other's.
    """

    layout: str = "vd"
    unused: Ranges = ()
    axis: str | None = None

    def ids(self, count: int) -> jax.Array:
        """int32 [count]: the ids of this device's words."""
        ids = jnp.arange(count)
        return ids if self.axis is None else ids + count * jax.lax.axis_index(self.axis)

    def are_used(self, count: int) -> jax.Array:
        """Bool [count]: which of this device's ids are words."""
        ids = self.ids(count)
        used = ids >= 0
        for start, stop in self.unused:
            used &= (ids < start) | (ids >= stop)
        return used

    def gather(self, tree: Any) -> Any:
        """Arrays [c, …] of this device's tokens → [n·c, …], those of all n devices' in order."""
        if self.axis is None:
            return tree
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self.axis, tiled=True), tree)

    def own(self, array: jax.Array) -> jax.Array:
        """This device's part [c, …] of what `gather` returns."""
        if self.axis is None:
            return array
        parts = array.reshape(jax.lax.axis_size(self.axis), -1, *array.shape[1:])
        return parts[jax.lax.axis_index(self.axis)]


ALL_WORDS = Words()


class _Options(NamedTuple):
    """The static part of a call."""

    vocab: int
    temperature: float
    softcap: float | None
    words: Words

    @property
    def used(self) -> int:
        """How many ids are words."""
        return self.vocab - sum(stop - start for start, stop in self.words.unused)


def token_statistics(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    *,
    bias: jax.Array | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    words: Words = ALL_WORDS,
    chunk_tokens: int | None = None,
) -> TokenStatistics:
    """Statistics of softmax(l) with l = cap(hidden · unembeddingᵀ + bias) / temperature.

    cap(z) = softcap · tanh(z / softcap), or z without a softcap. At most chunk_tokens × V logits
    exist at a time, in the gradient too, which is exact for all fields but `correct` (none).
    When one chunk holds all tokens its logits are kept for the backward pass and not recomputed.

    A chunk takes every k-th token, so a batch axis sharded over devices stays so in every chunk.
    A token none of whose outputs is used gets gradient 0, even if its hidden state is not finite.

    Args:
      hidden: [..., D]. unembedding: [V, D]. Their products accumulate in float32 or better; when
        both are bfloat16, gradients of logits are rounded to that for the products with them.
      bias: [V], finite; −1e9 bans a word (if there is no softcap).
      targets: [...] integers. Outside [0, V): logprobs is NaN there and correct is 0.
      temperature, softcap: Python numbers > 0.
      words: which words these are, and how the unembedding lies.
      chunk_tokens: most tokens per chunk; None: 1024, or more while they have at most KEPT_LOGITS.

    Returns:
      TokenStatistics of [...] arrays, float32 (float64 if hidden or unembedding is).

    Raises:
      ValueError: shapes do not fit, or a number is not positive.
    """
    part, vocab, width = _sizes(hidden, unembedding, targets, words)
    if bias is not None and bias.shape != (part,):
        raise ValueError(f"bias must have shape ({part},), got {bias.shape}")
    if chunk_tokens is None:
        chunk_tokens = max(1024, KEPT_LOGITS // vocab)
    numbers = {"chunk_tokens": chunk_tokens, "temperature": temperature, "softcap": softcap}
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")

    hidden, unembedding, bias, targets = _vary_alike(hidden, unembedding, bias, targets)
    statistics = _statistics(
        _Options(vocab, temperature, softcap, words),
        _strided(hidden.reshape(-1, width), chunk_tokens),
        unembedding,
        bias,
        _strided(targets.reshape(-1), chunk_tokens),
    )
    return jax.tree.map(
        lambda x: x.T.reshape(-1)[: targets.size].reshape(targets.shape), statistics
    )


def token_cross_entropy(
    statistics: TokenStatistics,
    weights: jax.Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Reduction, dict[str, Reduction]]:
    """Cross-entropy per token: −(1−ε)·log p(target) − ε/V·Σᵥ log pᵥ + z_loss·L².

    ε is label_smoothing ("Rethinking the Inception Architecture", https://arxiv.org/abs/1512.00567)
    and L the logsumexp, which z_loss keeps near 0 ("PaLM", https://arxiv.org/abs/2204.02311; 1e-4).

    Args:
      statistics: fields of any one shape. weights: the same shape, 0 = not a target.

    Returns:
      (total, weight) in nats and tokens, and metrics: loss (the above), nll (−log p(target) alone),
      z_loss (its term), entropy (nats), accuracy (of the most likely token).
    """
    check_same_shape(weights=weights, logprobs=statistics.logprobs)
    statistics = TokenStatistics(*keep_weighted(weights, *statistics))
    nll = -statistics.logprobs
    penalty = z_loss * statistics.logsumexp**2
    loss = nll + penalty
    if label_smoothing:
        loss += label_smoothing * (statistics.logsumexp - statistics.mean_logit - nll)
    metrics = {
        "loss": loss,
        "nll": nll,
        "z_loss": penalty,
        "entropy": statistics.entropy,
        "accuracy": statistics.correct,
    }
    return weighted_sums(metrics, weights)


def cross_entropy(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    words: Words = ALL_WORDS,
    chunk_tokens: int | None = None,
) -> tuple[Reduction, dict[str, Reduction]]:
    """`token_cross_entropy` of `token_statistics`, its gradient taken in the forward pass.

    The loss is a sum over tokens, so a chunk's share of the gradient is known, up to one factor,
    while its logits are there: none are kept, none are computed twice, and a quarter of the
    products is saved. The total has a gradient to hidden and unembedding; weights and metrics have
    none. As in "Liger Kernel", https://arxiv.org/abs/2410.10989.

    Args:
      hidden: [..., D]. unembedding: [V, D], or as `words` say. targets: [...] integers.
      weights: [...], 0 = not a target.
      chunk_tokens: most tokens per chunk; None: 512, or more while they have at most
        PASSING_LOGITS. The others are those of the two functions.

    Returns:
      (total, weight) in nats and tokens, and the metrics of `token_cross_entropy`.

    Raises:
      ValueError: shapes do not fit, or chunk_tokens is not positive.
    """
    check_same_shape(weights=weights, targets=targets)
    _, vocab, width = _sizes(hidden, unembedding, targets, words)
    if chunk_tokens is None:
        chunk_tokens = max(512, PASSING_LOGITS // vocab)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be > 0, got {chunk_tokens}")
    hidden, unembedding, targets, weights = _vary_alike(hidden, unembedding, targets, weights)
    flat = hidden.reshape(-1, width), targets.reshape(-1), weights.reshape(-1)
    total, (weight, metrics) = _summed_cross_entropy(
        _Options(vocab, 1.0, softcap, words),
        (label_smoothing, z_loss),
        unembedding,
        *(_strided(x, chunk_tokens) for x in flat),
    )
    return (total, weight), metrics


def _sizes(hidden, unembedding, targets, words: Words) -> tuple[int, int, int]:
    """(words of this device, V, D), checked."""
    check_rank("unembedding", unembedding, 2)
    if words.layout not in ("vd", "dv"):
        raise ValueError(f"layout must be 'vd' or 'dv', got {words.layout!r}")
    part, width = unembedding.shape if words.layout == "vd" else unembedding.shape[::-1]
    if hidden.shape != (*targets.shape, width):
        raise ValueError(
            "hidden must have the shape of targets and the width of unembedding, "
            f"{(*targets.shape, width)}, got {hidden.shape}"
        )
    devices = 1 if words.axis is None else jax.lax.axis_size(words.axis)
    return part, part * devices, width


def _strided(x: jax.Array, size: int) -> jax.Array:
    """[N, …] → [k, c, …]: k = ⌈N/size⌉ zero-padded chunks, chunk i of every k-th item from i on."""
    count = max(1, math.ceil(len(x) / size))
    each = math.ceil(len(x) / count)
    x = jnp.pad(x, [(0, count * each - len(x))] + [(0, 0)] * (x.ndim - 1))
    return jnp.swapaxes(x.reshape(each, count, *x.shape[1:]), 0, 1)


def _vary_alike(*arrays: jax.Array | None) -> list[Any]:
    """Adds every array's zero to every other, so that under shard_map all vary over the same axes.

    Loop carries need that, and it makes the gradient of a replicated array the sum over devices.
    """
    zeros = [jnp.zeros_like(x, shape=()) for x in arrays if x is not None]
    return [x if x is None else sum((z.astype(x.dtype) for z in zeros), x) for x in arrays]


def _fold(step: Callable, carry: Any, chunks: Any) -> tuple[Any, Any]:
    """lax.scan, but a single chunk is computed in place: XLA then fuses it with its neighbours."""
    if jax.tree.leaves(chunks)[0].shape[0] > 1:
        return jax.lax.scan(step, carry, chunks)
    carry, out = step(carry, jax.tree.map(lambda x: x[0], chunks))
    return carry, jax.tree.map(lambda x: x[None], out)


def _lowest(dtype: jnp.dtype) -> float:
    """Stands for −∞ where ∞ − ∞ or 0·∞ would make a NaN."""
    return float(jnp.finfo(dtype).min / 4)


def _logits(options: _Options, hidden, unembedding, bias) -> jax.Array:
    """[c, V] logits of one chunk; those of unused ids are far below any other.

    The barrier has them computed once: a fusion that recomputes them may round another way, and
    then no logit equals the highest.
    """
    dtype = at_least_f32(hidden, unembedding)
    spec = f"cd,{options.words.layout}->cv"
    logits = jnp.einsum(spec, hidden, unembedding, preferred_element_type=dtype)
    if bias is not None:
        logits += bias.astype(dtype)
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    if options.temperature != 1:
        logits = logits / options.temperature
    if options.words.unused:
        logits = jnp.where(options.words.are_used(logits.shape[-1]), logits, _lowest(dtype))
    return jax.lax.optimization_barrier(logits)


class _Sums(NamedTuple):
    """What a token's statistics are made of; all [c], of the words of one device or of all.

    top: the highest logit. mass: Σᵥ exp(lᵥ − top). moment: Σᵥ exp(lᵥ − top) (lᵥ − top).
    total: Σᵥ lᵥ. at_target: the target's logit, 0 if it is another device's. first: −id of the
    first of the highest logits, which as a negative float a CPU finds several times faster.
    """

    top: jax.Array
    mass: jax.Array
    moment: jax.Array
    total: jax.Array
    at_target: jax.Array
    first: jax.Array


def _sums(options: _Options, logits: jax.Array, targets: jax.Array) -> _Sums:
    """Sums over this device's words: logits [c, V], targets [c]."""
    ids = options.words.ids(logits.shape[-1])
    top = logits.max(-1)
    shifted = logits - top[:, None]
    exps = jnp.exp(shifted)
    words = logits
    if options.words.unused:
        words = jnp.where(options.words.are_used(logits.shape[-1]), logits, 0)
    column = targets - ids[0]
    known = (column >= 0) & (column < len(ids))
    at_target = jnp.take_along_axis(logits, jnp.where(known, column, 0)[:, None], -1)[:, 0]
    highest = jnp.where(logits == top[:, None], -ids.astype(logits.dtype), -options.vocab)
    return _Sums(
        top=top,
        mass=jnp.sum(exps, -1),
        moment=jnp.sum(exps * shifted, -1),
        total=jnp.sum(words, -1),
        at_target=jnp.where(known, at_target, 0),
        first=highest.max(-1),
    )


def _joined(axis: str, sums: _Sums) -> _Sums:
    """Each device's sums for all tokens [n·c] → all words' for its own tokens [c]."""
    devices = jax.lax.axis_size(axis)
    parts = jax.lax.all_to_all(jnp.stack(sums), axis, split_axis=1, concat_axis=0, tiled=True)
    each = _Sums(*jnp.swapaxes(parts.reshape(devices, len(sums), -1), 0, 1))
    top = each.top.max(0)
    below = each.top - top
    mass = jnp.exp(below) * each.mass
    return _Sums(
        top=top,
        mass=mass.sum(0),
        moment=jnp.sum(jnp.exp(below) * each.moment + mass * below, 0),
        total=each.total.sum(0),
        at_target=each.at_target.sum(0),
        first=jnp.where(below == 0, each.first, each.first.min()).max(0),
    )


def _chunk_statistics(options: _Options, hidden, unembedding, bias, targets):
    """Statistics of one chunk's tokens, and their logits.

    Of n devices each gives hidden [n·c, D] and targets [n·c] of all, and gets the statistics of its
    own tokens [c], and of all the logits of its words [n·c, V/n].
    """
    logits = _logits(options, hidden, unembedding, bias)
    sums = _sums(options, logits, targets)
    if options.words.axis is not None:
        sums, targets = _joined(options.words.axis, sums), options.words.own(targets)
    known = (targets >= 0) & (targets < options.vocab)
    log_mass = jnp.log(sums.mass)
    statistics = TokenStatistics(
        logprobs=(jnp.where(known, sums.at_target, jnp.nan) - sums.top) - log_mass,
        logsumexp=sums.top + log_mass,
        mean_logit=sums.total / options.used,
        entropy=log_mass - sums.moment / sums.mass,
        correct=(-sums.first == targets).astype(logits.dtype),
    )
    return statistics, logits


def _logit_gradient(options: _Options, logits, targets, statistics, cotangents):
    """[c, V]: the gradient to the products hidden · unembeddingᵀ + bias.

    ∂log p(t)/∂l = 1ₜ − p,  ∂L/∂l = p,  ∂(mean l)/∂l = 1/V,  ∂H/∂l = −p·(log p + H).
    """
    to_target, to_sum, to_mean, to_entropy, _ = (x[:, None] for x in cotangents)
    logprobs = logits - statistics.logsumexp[:, None]
    entropy = statistics.entropy[:, None]
    columns = options.words.ids(logits.shape[-1]).astype(targets.dtype)
    gradient = jnp.exp(logprobs) * (to_sum - to_target - to_entropy * (logprobs + entropy))
    gradient += jnp.where(columns == targets[:, None], to_target, 0) + to_mean / options.used
    if options.softcap is not None:
        gradient *= 1 - (logits * options.temperature / options.softcap) ** 2
    if options.temperature != 1:
        gradient = gradient / options.temperature
    used = _used(cotangents)
    if options.words.unused:
        used &= options.words.are_used(logits.shape[-1])
    return jnp.where(used, gradient, 0)


def _used(cotangents) -> jax.Array:
    """Bool [c, 1]: the tokens that have an output which is used."""
    return jnp.any(jnp.stack(cotangents) != 0, axis=0)[:, None]


def _products(options: _Options, to_logits, hidden, unembedding) -> tuple[jax.Array, jax.Array]:
    """Gradients to hidden [c, D] and, as [D, V], to the unembedding, of that to the logits.

    A CPU computes the second several times as fast as a [V, D] one. Of n devices each is given all
    tokens' hidden states [n·c, D] and returns the gradient to its own.
    """
    dtype = at_least_f32(hidden, unembedding)
    to_logits = to_logits.astype(jnp.result_type(hidden, unembedding))
    product = partial(jnp.einsum, preferred_element_type=dtype)
    to_hidden = product(f"cv,{options.words.layout}->cd", to_logits, unembedding)
    if options.words.axis is not None:
        to_hidden = jax.lax.psum_scatter(to_hidden, options.words.axis, tiled=True)
    return to_hidden.astype(hidden.dtype), product("cd,cv->dv", hidden, to_logits)


def _laid_out(options: _Options, to_words: jax.Array) -> jax.Array:
    """A gradient [D, V] as the unembedding lies; the barrier keeps its product as it is."""
    return jax.lax.optimization_barrier(to_words).T if options.words.layout == "vd" else to_words


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(options: _Options, hidden, unembedding, bias, targets) -> TokenStatistics:
    """hidden [k, c, D], bias [V] or None, targets [k, c] → fields [k, c]."""
    return _statistics_forward(options, hidden, unembedding, bias, targets)[0]


def _statistics_forward(options: _Options, hidden, unembedding, bias, targets):
    keep = len(hidden) == 1

    def step(_, chunk):
        hidden, targets = options.words.gather(chunk)
        statistics, logits = _chunk_statistics(options, hidden, unembedding, bias, targets)
        return None, (statistics, logits if keep else None)

    _, (statistics, logits) = _fold(step, None, (hidden, targets))
    return statistics, (hidden, unembedding, bias, targets, statistics, logits)


def _statistics_backward(options: _Options, residuals, cotangents):
    hidden, unembedding, bias, targets, statistics, logits = residuals
    dtype = at_least_f32(hidden, unembedding)

    def step(gradients, chunk):
        *mine, logits = chunk
        hidden, targets, statistics, cotangents = options.words.gather(tuple(mine))
        hidden = jnp.where(_used(cotangents), hidden, 0)
        if logits is None:
            logits = _logits(options, hidden, unembedding, bias)
        gradient = _logit_gradient(options, logits, targets, statistics, cotangents)
        to_hidden, to_words = _products(options, gradient, hidden, unembedding)
        to_bias = None if bias is None else gradient.sum(0)
        return jax.tree.map(jnp.add, gradients, (to_words, to_bias)), to_hidden

    shape = unembedding.shape if options.words.layout == "dv" else unembedding.shape[::-1]
    zeros = (
        jnp.zeros_like(unembedding, dtype, shape=shape),
        None if bias is None else jnp.zeros_like(bias, dtype),
    )
    chunks = (hidden, targets, statistics, cotangents, logits)
    (to_words, to_bias), to_hidden = _fold(step, zeros, chunks)
    to_bias = None if bias is None else to_bias.astype(bias.dtype)
    return to_hidden, _laid_out(options, to_words).astype(unembedding.dtype), to_bias, None


_statistics.defvjp(_statistics_forward, _statistics_backward)


def _cross_entropy_chunk(options: _Options, terms, unembedding, chunk, gradient: bool):
    """(total, (weight, metrics)) of a chunk, and its gradients to hidden and unembedding [D, V]."""
    *inputs, weights = chunk
    hidden, targets = options.words.gather(tuple(inputs))
    statistics, logits = _chunk_statistics(options, hidden, unembedding, None, targets)

    def loss(statistics: TokenStatistics):
        (total, weight), metrics = token_cross_entropy(
            statistics, weights, label_smoothing=terms[0], z_loss=terms[1]
        )
        return total, (weight, metrics)

    if not gradient:
        return loss(statistics), None
    total, pull, aux = jax.vjp(loss, statistics, has_aux=True)
    (cotangents,) = pull(jnp.ones_like(total))
    statistics, cotangents = options.words.gather((statistics, cotangents))
    to_logits = _logit_gradient(options, logits, targets, statistics, cotangents)
    hidden = jnp.where(_used(cotangents), hidden, 0)
    return (total, aux), _products(options, to_logits, hidden, unembedding)


def _summed(options: _Options, terms, unembedding, chunks, gradient: bool):
    """Sums of all chunks and, if asked, gradients to hidden [k, c, D] and unembedding [D, V]."""
    one = partial(_cross_entropy_chunk, options, terms, unembedding, gradient=gradient)

    def step(carry, chunk):
        sums, gradients = one(chunk)
        to_hidden, to_words = gradients if gradient else (None, None)
        return jax.tree.map(jnp.add, carry, (sums, to_words)), to_hidden

    sums, gradients = jax.eval_shape(one, jax.tree.map(lambda x: x[0], chunks))
    zeros = jax.tree.map(
        lambda x: jnp.zeros_like(unembedding, x.dtype, shape=x.shape),
        (sums, gradients[1] if gradient else None),
    )
    (sums, to_words), to_hidden = _fold(step, zeros, chunks)
    return sums, to_hidden, to_words


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed_cross_entropy(options: _Options, terms, unembedding, hidden, targets, weights):
    """hidden [k, c, D], targets and weights [k, c] → (total, (weight, metrics))."""
    return _summed(options, terms, unembedding, (hidden, targets, weights), False)[0]


def _summed_forward(options: _Options, terms, unembedding, *chunks):
    sums, *gradients = _summed(options, terms, unembedding, chunks, True)
    return sums, (gradients, unembedding)


def _summed_backward(options: _Options, terms, residuals, cotangents):
    (to_hidden, to_words), unembedding = residuals
    factor = cotangents[0]
    to_words = (factor * _laid_out(options, to_words)).astype(unembedding.dtype)
    return to_words, (factor * to_hidden).astype(to_hidden.dtype), None, None


_summed_cross_entropy.defvjp(_summed_forward, _summed_backward)

"""Token log-probabilities and cross-entropy from hidden states, without ever holding all logits.

The logits of N tokens over V words are by far the largest array of a language model. They are
computed here a chunk of tokens (and, if asked, of vocabulary) at a time, reduced to five numbers a
token, and recomputed in the backward pass, as in "Cut Your Losses in Large-Vocabulary Language
Models", https://arxiv.org/abs/2411.09009.
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


class _Options(NamedTuple):
    """The static part of a call: `vocab` is V before its chunks are padded to one size, if so.

    layout: "vd" or "dv", the axes of the unembedding. unused: see `token_statistics`.
    """

    vocab: int
    padded: bool
    temperature: float
    softcap: float | None
    layout: str
    unused: Ranges = ()

    @property
    def masked(self) -> bool:
        """Whether there are columns that are no words."""
        return self.padded or bool(self.unused)

    @property
    def words(self) -> int:
        """How many columns are words."""
        return self.vocab - sum(stop - start for start, stop in self.unused)


def token_statistics(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    *,
    bias: jax.Array | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    layout: str = "vd",
    unused: Ranges = (),
    chunk_tokens: int = 8192,
    chunk_vocab: int | None = None,
) -> TokenStatistics:
    """Statistics of softmax(l) with l = cap(hidden · unembeddingᵀ + bias) / temperature.

    cap(z) = softcap · tanh(z / softcap), or z without a softcap. At most chunk_tokens × chunk_vocab
    logits exist at a time, in the gradient too, which is exact for all fields but `correct` (none).
    When all fits in one chunk its logits are kept for the backward pass and not recomputed.

    A chunk takes every k-th token, so a batch axis sharded over devices stays so in every chunk.
    A token none of whose outputs is used gets gradient 0, even if its hidden state is not finite.

    Args:
      hidden: [..., D]. unembedding: [V, D]. Their products accumulate in float32 or better; when
        both are bfloat16, gradients of logits are rounded to that for the products with them.
      bias: [V], finite; −1e9 bans a word (if there is no softcap).
      targets: [...] integers. Outside [0, V): logprobs is NaN there and correct is 0.
      temperature, softcap: Python numbers > 0.
      layout: "dv" for an unembedding that is [D, V], as a kernel is: neither it nor its gradient
        is then transposed.
      unused: ids that are no words, in order and not all: no field counts their logits, whose
        gradient is 0, and a target that is one has a log-prob near the lowest of all floats.
      chunk_tokens, chunk_vocab: most tokens and words a chunk; None takes the vocabulary whole.

    Returns:
      TokenStatistics of [...] arrays, float32 (float64 if hidden or unembedding is).

    Raises:
      ValueError: shapes do not fit, or a number is not positive.
    """
    vocab, width = _sizes(hidden, unembedding, targets, layout)
    if bias is not None and bias.shape != (vocab,):
        raise ValueError(f"bias must have shape ({vocab},), got {bias.shape}")
    sizes = {"chunk_tokens": chunk_tokens, "chunk_vocab": chunk_vocab}
    for name, value in {**sizes, "temperature": temperature, "softcap": softcap}.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be > 0, got {value}")

    hidden, unembedding, bias, targets = _vary_alike(hidden, unembedding, bias, targets)
    if layout == "dv" and chunk_vocab is not None:
        unembedding, layout = unembedding.T, "vd"
    words = unembedding[None] if layout == "dv" else _chunks(unembedding, chunk_vocab or vocab)
    statistics = _statistics(
        _Options(vocab, vocab % len(words) != 0, temperature, softcap, layout, unused),
        _strided(hidden.reshape(-1, width), chunk_tokens),
        words,
        None if bias is None else _chunks(bias, chunk_vocab or vocab),
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
    layout: str = "vd",
    unused: Ranges = (),
    chunk_tokens: int = 1024,
) -> tuple[Reduction, dict[str, Reduction]]:
    """`token_cross_entropy` of `token_statistics`, its gradient taken in the forward pass.

    Of a sum over tokens every chunk's share of the gradient is known, up to one factor, while its
    logits are there: none are kept, none computed twice, a quarter of the products is saved. So the
    total has a gradient to hidden and unembedding; weights and metrics have none. As in "Liger
    Kernel", https://arxiv.org/abs/2410.10989.

    Args:
      hidden: [..., D]. unembedding: [V, D], or [D, V] with layout "dv". targets: [...] integers.
      weights: [...], 0 = not a target. The others as of those two functions.

    Returns:
      (total, weight) in nats and tokens, and the metrics of `token_cross_entropy`.

    Raises:
      ValueError: shapes do not fit, or chunk_tokens is not positive.
    """
    check_same_shape(weights=weights, targets=targets)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be > 0, got {chunk_tokens}")
    vocab, width = _sizes(hidden, unembedding, targets, layout)
    hidden, unembedding, targets, weights = _vary_alike(hidden, unembedding, targets, weights)
    flat = hidden.reshape(-1, width), targets.reshape(-1), weights.reshape(-1)
    total, (weight, metrics) = _summed_cross_entropy(
        _Options(vocab, False, 1.0, softcap, layout, unused),
        (label_smoothing, z_loss),
        unembedding,
        *(_strided(x, chunk_tokens) for x in flat),
    )
    return (total, weight), metrics


def _sizes(hidden, unembedding, targets, layout: str) -> tuple[int, int]:
    """(V, D), checked."""
    check_rank("unembedding", unembedding, 2)
    if layout not in ("vd", "dv"):
        raise ValueError(f"layout must be 'vd' or 'dv', got {layout!r}")
    vocab, width = unembedding.shape if layout == "vd" else unembedding.shape[::-1]
    if hidden.shape != (*targets.shape, width):
        raise ValueError(
            "hidden must have the shape of targets and the width of unembedding, "
            f"{(*targets.shape, width)}, got {hidden.shape}"
        )
    return vocab, width


def _chunks(x: jax.Array, size: int, minor: bool = False) -> jax.Array:
    """[N, …] → [k, c, …] in k = ⌈N/size⌉ equal zero-padded chunks, or [c, k, …] if `minor`."""
    count = max(1, math.ceil(x.shape[0] / size))
    each = math.ceil(x.shape[0] / count)
    x = jnp.pad(x, [(0, count * each - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return x.reshape((each, count, *x.shape[1:]) if minor else (count, each, *x.shape[1:]))


def _strided(x: jax.Array, size: int) -> jax.Array:
    """[N, …] → [k, c, …], chunk i of every k-th from i on."""
    return jnp.swapaxes(_chunks(x, size, minor=True), 0, 1)


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


def _columns(options: _Options, words: jax.Array, like: jax.Array) -> jax.Array:
    """[k, v]: the vocabulary index of every word of the chunks [k, v, D] or [k, D, v]."""
    count, each = words.shape[0], words.shape[1 + options.layout.index("v")]
    return jnp.arange(count * each, dtype=like.dtype).reshape(count, each)


def _lowest(dtype: jnp.dtype) -> float:
    """Stands for −∞ where ∞ − ∞ or 0·∞ would make a NaN."""
    return float(jnp.finfo(dtype).min / 4)


def _are_words(options: _Options, columns: jax.Array) -> jax.Array:
    """Bool, for every column."""
    found = columns < options.vocab
    for start, stop in options.unused:
        found &= (columns < start) | (columns >= stop)
    return found


def _logits(options: _Options, hidden, words, bias, columns) -> jax.Array:
    """[c, v] logits of one chunk; those of columns that are no words are far below any other.

    The barrier has them computed once: a fusion that recomputes them may round another way, and
    then no logit equals the highest.
    """
    dtype = at_least_f32(hidden, words)
    logits = jnp.einsum(f"cd,{options.layout}->cv", hidden, words, preferred_element_type=dtype)
    if bias is not None:
        logits += bias.astype(dtype)
    if options.softcap is not None:
        logits = options.softcap * jnp.tanh(logits / options.softcap)
    if options.temperature != 1:
        logits = logits / options.temperature
    if options.masked:
        logits = jnp.where(_are_words(options, columns), logits, _lowest(dtype))
    return jax.lax.optimization_barrier(logits)


def _chunk_statistics(options: _Options, keep: bool, hidden, words, bias, targets):
    """Statistics of one chunk of tokens, by an online softmax over the chunks of words.

    Carry: m = max l, s = Σ exp(l−m), u = Σ exp(l−m)·(l−m), Σ l, l[target], first argmax of l.
    """

    def step(carry, chunk):
        top, mass, moment, total, target_logit, best = carry
        words, bias, columns = chunk
        logits = _logits(options, hidden, words, bias, columns)
        higher = jnp.maximum(top, logits.max(-1))
        shifted = logits - higher[:, None]
        exps = jnp.exp(shifted)
        scale = jnp.exp(top - higher)
        moment = scale * (moment + mass * (top - higher)) + jnp.sum(exps * shifted, -1)
        mass = scale * mass + jnp.sum(exps, -1)
        real = jnp.where(_are_words(options, columns), logits, 0) if options.masked else logits
        total += jnp.sum(real, -1)
        offset = targets - columns[0]
        here = (offset >= 0) & (offset < columns.size) & (targets < options.vocab)
        offset = jnp.where(here, offset, 0)[:, None]
        found = jnp.take_along_axis(logits, offset, -1)[:, 0]
        target_logit = jnp.where(here, found, target_logit)
        # Negative floats: XLA's CPU backend takes the maximum of those several times faster.
        first = jnp.where(logits == higher[:, None], -columns.astype(dtype), -options.vocab).max(-1)
        best = jnp.where(higher > top, -first, best)
        return (higher, mass, moment, total, target_logit, best), logits if keep else None

    dtype = at_least_f32(hidden, words)
    zeros = jnp.zeros_like(hidden, dtype, shape=targets.shape)
    carry = (zeros + _lowest(dtype), zeros, zeros, zeros, zeros + jnp.nan, zeros)
    columns = _columns(options, words, targets)
    (top, mass, moment, total, target_logit, best), logits = _fold(
        step, carry, (words, bias, columns)
    )
    log_mass = jnp.log(mass)
    statistics = TokenStatistics(
        logprobs=(target_logit - top) - log_mass,
        logsumexp=top + log_mass,
        mean_logit=total / options.words,
        entropy=log_mass - moment / mass,
        correct=(best == targets).astype(dtype),
    )
    return statistics, logits


def _logit_gradient(options: _Options, logits, columns, targets, statistics, cotangents):
    """[c, v]: the gradient to the products hidden · wordsᵀ + bias.

    ∂log p(t)/∂l = 1ₜ − p,  ∂L/∂l = p,  ∂(mean l)/∂l = 1/V,  ∂H/∂l = −p·(log p + H).
    """
    to_target, to_sum, to_mean, to_entropy, _ = (x[:, None] for x in cotangents)
    logprobs = logits - statistics.logsumexp[:, None]
    entropy = statistics.entropy[:, None]
    gradient = jnp.exp(logprobs) * (to_sum - to_target - to_entropy * (logprobs + entropy))
    gradient += jnp.where(columns == targets[:, None], to_target, 0) + to_mean / options.words
    if options.softcap is not None:
        gradient *= 1 - (logits * options.temperature / options.softcap) ** 2
    used = jnp.any(jnp.stack(cotangents) != 0, axis=0)[:, None]
    if options.temperature != 1:
        gradient = gradient / options.temperature
    return jnp.where(used & _are_words(options, columns) if options.masked else used, gradient, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _statistics(options: _Options, hidden, words, bias, targets) -> TokenStatistics:
    """hidden [k, c, D], words [j, v, D], bias [j, v] or None, targets [k, c] → fields [k, c]."""
    return _statistics_forward(options, hidden, words, bias, targets)[0]


def _statistics_forward(options: _Options, hidden, words, bias, targets):
    keep = hidden.shape[0] == 1 and words.shape[0] == 1

    def step(_, chunk):
        hidden, targets = chunk
        return None, _chunk_statistics(options, keep, hidden, words, bias, targets)

    _, (statistics, logits) = _fold(step, None, (hidden, targets))
    return statistics, (hidden, words, bias, targets, statistics, logits)


def _statistics_backward(options: _Options, residuals, cotangents):
    hidden, words, bias, targets, statistics, logits = residuals
    dtype, products = at_least_f32(hidden, words), jnp.result_type(hidden, words)
    columns, layout = _columns(options, words, targets), options.layout

    def token_step(gradients, chunk):
        hidden, targets, statistics, cotangents, logits = chunk
        used = jnp.any(jnp.stack(cotangents) != 0, axis=0)[:, None]
        hidden = jnp.where(used, hidden, 0)

        def word_step(to_hidden, chunk):
            words, bias, columns, logits, to_words, to_bias = chunk
            if logits is None:
                logits = _logits(options, hidden, words, bias, columns)
            gradient = _logit_gradient(options, logits, columns, targets, statistics, cotangents)
            rounded = gradient.astype(products)
            to_hidden += jnp.einsum(
                f"cv,{layout}->cd", rounded, words, preferred_element_type=dtype
            )
            to_words += jnp.einsum("cd,cv->dv", hidden, rounded, preferred_element_type=dtype)
            if bias is not None:
                to_bias += gradient.sum(0)
            return to_hidden, (to_words, to_bias)

        chunks = (words, bias, columns, logits, *gradients)
        to_hidden, gradients = _fold(word_step, jnp.zeros_like(hidden, dtype), chunks)
        return gradients, to_hidden.astype(hidden.dtype)

    if layout == "vd":
        words_dv = words.swapaxes(1, 2)
    zeros = jax.tree.map(
        lambda x: jnp.zeros_like(x, dtype), (words_dv if layout == "vd" else words, bias)
    )
    chunks = (hidden, targets, statistics, cotangents, logits)
    (to_words, to_bias), to_hidden = _fold(token_step, zeros, chunks)
    to_bias = None if bias is None else to_bias.astype(bias.dtype)
    if layout == "vd":
        to_words = jax.lax.optimization_barrier(to_words).swapaxes(1, 2)
    return to_hidden, to_words.astype(words.dtype), to_bias, None


_statistics.defvjp(_statistics_forward, _statistics_backward)


def _cross_entropy_chunk(options: _Options, terms, unembedding, chunk, gradient: bool):
    """(total, (weight, metrics)) of a chunk, and its gradients to hidden and unembedding."""
    hidden, targets, weights = chunk
    words = unembedding[None]
    statistics, logits = _chunk_statistics(options, gradient, hidden, words, None, targets)

    def loss(statistics: TokenStatistics):
        (total, weight), metrics = token_cross_entropy(
            statistics, weights, label_smoothing=terms[0], z_loss=terms[1]
        )
        return total, (weight, metrics)

    if not gradient:
        return loss(statistics), None
    total, pull, aux = jax.vjp(loss, statistics, has_aux=True)
    (cotangents,) = pull(jnp.ones_like(total))
    columns = _columns(options, words, targets)[0]
    to_logits = _logit_gradient(options, logits[0], columns, targets, statistics, cotangents)
    hidden = jnp.where((weights != 0)[:, None], hidden, 0)
    dtype, layout = at_least_f32(hidden, unembedding), options.layout
    to_logits = to_logits.astype(jnp.result_type(hidden, unembedding))
    (to_hidden,), to_words = (
        (
            jnp.einsum(f"cv,{spec}", to_logits, x, preferred_element_type=dtype)
            for spec, x in ((f"{layout}->cd", unembedding),)
        ),
        jnp.einsum("cd,cv->dv", hidden, to_logits, preferred_element_type=dtype),
    )
    return (total, aux), (to_hidden.astype(hidden.dtype), to_words)


def _summed(options: _Options, terms, unembedding, chunks, gradient: bool):
    """Sums of all chunks and, if asked, gradients to hidden [k, c, D] and unembedding."""
    one = partial(_cross_entropy_chunk, options, terms, unembedding, gradient=gradient)

    def step(carry, chunk):
        sums, found = one(chunk)
        to_hidden, to_words = found if gradient else (None, None)
        return jax.tree.map(jnp.add, carry, (sums, to_words)), to_hidden

    sums, found = jax.eval_shape(one, jax.tree.map(lambda x: x[0], chunks))
    zeros = jax.tree.map(
        lambda x: jnp.zeros_like(unembedding, x.dtype, shape=x.shape),
        (sums, found[1] if gradient else None),
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
    if options.layout == "vd":
        to_words = jax.lax.optimization_barrier(to_words).T
    to_words = (factor * to_words).astype(unembedding.dtype)
    return to_words, (factor * to_hidden).astype(to_hidden.dtype), None, None


_summed_cross_entropy.defvjp(_summed_forward, _summed_backward)

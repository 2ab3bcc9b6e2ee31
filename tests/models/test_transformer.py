"""The forward pass against NumPy, and what packing, branches and options may not change."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models import (
    apply,
    check_tokens,
    init,
    logits,
    param_count,
    scores,
    unembedding,
)
from tests.models.small import KINDS, LEARNED, SMALL, forward, noisy, random_tokens

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=KINDS, name="config")
def _config(request):
    return KINDS[request.param]


def assert_trees_close(left, right, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **(tolerance or CLOSE)), left, right)


def numpy_forward(config, params, tokens):
    """One document, one head at a time, from the definition."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, p, kind=config.norm):
        if kind == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * p["scale"]
        return x + p.get("bias", 0.0)

    def dense(x, p):
        return x @ p["kernel"] + p.get("bias", 0.0)

    def rotate(x):  # pairs (i, i + d/2) turn by position·θ^(-2i/d)
        half = config.head_dim // 2
        angle = np.outer(
            np.arange(len(x)), config.rope_theta ** (-np.arange(half) * 2 / config.head_dim)
        )
        z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag], -1)

    def attention(x, near, p):
        size = config.head_dim
        mixed = []
        for head in range(config.heads):
            shared = head // (config.heads // config.kv_heads)
            q = dense(near, p["query"])[:, head * size : (head + 1) * size]
            k, v = (
                dense(y, p[n])[:, shared * size : (shared + 1) * size]
                for y, n in ((near, "key"), (x, "value"))
            )
            if config.qk_norm:
                q, k = norm(q, p["query_norm"], "rms"), norm(k, p["key_norm"], "rms")
            if config.position == "rope":
                q, k = rotate(q), rotate(k)
            s = q @ k.T / np.sqrt(size)
            if config.attention_softcap:
                s = config.attention_softcap * np.tanh(s / config.attention_softcap)
            back = np.subtract.outer(np.arange(len(x)), np.arange(len(x)))
            s[(back < 0) | (back >= (config.sliding_window or len(x)))] = -np.inf
            w = np.exp(s - s.max(-1, keepdims=True))
            mixed.append(w / w.sum(-1, keepdims=True) @ v)
        return dense(np.concatenate(mixed, -1), p["out"])

    def gelu(x):
        return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))

    def mlp(x, p):
        if "experts" in p:
            return np.stack([mixture(token, p) for token in x])
        up = dense(x, p["up"])
        if config.activation == "swiglu":
            gate = dense(x, p["gate"])
            return dense(gate / (1 + np.exp(-gate)) * up, p["down"])
        if config.activation == "geglu":
            return dense(gelu(dense(x, p["gate"])) * up, p["down"])
        return dense(gelu(up), p["down"])

    def mixture(token, p):
        share = np.exp(dense(token, p["router"]))
        share /= share.sum()
        chosen = np.argsort(-share)[: config.experts_per_token]
        if config.expert_renormalize:
            share /= share[chosen].sum()
        pick = [jax.tree.map(lambda leaf, e=e: leaf[e], p["experts"]) for e in chosen]
        return sum(share[e] * mlp(token, own) for e, own in zip(chosen, pick, strict=True))

    x = params["embed"]["embedding"][tokens]
    near = np.zeros_like(x)
    for i in range(config.short_convolution):
        before = np.concatenate([np.zeros((i + 1, config.width)), x[: -i - 1]])
        near = near + params["short_convolution"]["query_key"]["scale"][i] * before
    if config.position == "learned":
        x = x + params["position_embed"]["embedding"][: len(tokens)]
    for i in range(config.layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
        here, both = (norm(y, layer["attention_norm"]) for y in (x, x + near))
        x = x + attention(here, both, layer["attention"])
        x = x + mlp(norm(x, layer["mlp_norm"]), layer["mlp"])
    return norm(x, params["final_norm"])


def test_equals_the_definition_in_numpy(config):
    params, tokens = noisy(config), random_tokens(3, 9 + 64)
    hidden = forward(config, params, tokens)
    expected = numpy_forward(config, params, np.asarray(tokens[0]))
    np.testing.assert_allclose(hidden[0], expected, rtol=1e-4, atol=1e-4)
    cap = config.logit_softcap
    table, layout = unembedding(config, params)
    expected = expected @ np.asarray(table if layout == "dv" else table.T)
    expected = cap * np.tanh(expected / cap) if cap else expected
    np.testing.assert_allclose(logits(config, params, hidden)[0], expected, rtol=1e-4, atol=1e-4)


def test_parameters_are_stacked_float32_and_named():
    params = init(KINDS["grouped-window"], jax.random.key(0))
    shapes = {
        "/".join(k.key for k in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert shapes == {
        "embed/embedding": (61, 16),
        "short_convolution/query_key/scale": (3, 16),
        "layers/attention_norm/scale": (2, 16),
        "layers/attention/query/kernel": (2, 16, 16),
        "layers/attention/key/kernel": (2, 16, 8),
        "layers/attention/value/kernel": (2, 16, 8),
        "layers/attention/query_norm/scale": (2, 4),
        "layers/attention/key_norm/scale": (2, 4),
        "layers/attention/out/kernel": (2, 16, 16),
        "layers/mlp_norm/scale": (2, 16),
        "layers/mlp/gate/kernel": (2, 16, 24),
        "layers/mlp/up/kernel": (2, 16, 24),
        "layers/mlp/down/kernel": (2, 24, 16),
        "final_norm/scale": (16,),
    }
    assert param_count(params) == sum(int(np.prod(shape)) for shape in shapes.values())
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    query = params["layers"]["attention"]["query"]["kernel"]
    assert not np.array_equal(query[0], query[1])


def test_a_short_convolution_starts_with_factors_of_either_sign():
    """Of one sign they would say what stands before a token, and not how far before."""
    config = dataclasses.replace(SMALL, width=512, heads=2, kv_heads=2, short_convolution=4)
    scale = np.asarray(init(config, jax.random.key(0))["short_convolution"]["query_key"]["scale"])
    assert scale.shape == (4, 512) and np.all(np.abs(scale) == 0.5)
    # Each row's mean, and the product of any two, is within five deviations of 0.
    products = np.concatenate([scale @ scale.T, scale.sum(1)[:, None] / 2], axis=1)
    assert np.abs(products[~np.eye(4, 5, dtype=bool)]).max() < 5 * 0.25 * np.sqrt(512)


def test_initial_scales():
    config = dataclasses.replace(SMALL, width=256, mlp_width=256, init_std=0.02, head="scalar")
    params = init(config, jax.random.key(0))
    layers = params["layers"]
    for kernel, std in (
        (params["embed"]["embedding"], 0.02),
        (layers["attention"]["query"]["kernel"], 0.02),
        (layers["mlp"]["down"]["kernel"], 0.02 / np.sqrt(4)),
        (params["score_head"]["kernel"], 1 / np.sqrt(257)),
    ):
        # The sample standard deviation of n normals has relative error 1/√(2n): allow five.
        assert abs(float(kernel.std()) / std - 1) < 5 / np.sqrt(2 * kernel.size)


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_copy_init_undoes_the_values(kv_heads):
    config = dataclasses.replace(
        SMALL, width=256, heads=8, kv_heads=kv_heads, head_dim=32, init_std=0.05, copy_init=True
    )
    attention = init(config, jax.random.key(0))["layers"]["attention"]
    value = attention["value"]["kernel"].reshape(config.layers, 256, kv_heads, 32)
    out = attention["out"]["kernel"].reshape(config.layers, kv_heads, -1, 32, 256)
    # Σ over query heads of value · out, were all to attend to one token.
    product = np.asarray(jnp.einsum("lwkd,lkgdx->lwx", value, out))
    # Each is a mean of n = 32·kv_heads products of independent normals (their squares on the
    # diagonal): its standard deviation is 1/√n (√(2/n)).
    diagonal = np.diagonal(product, axis1=1, axis2=2)
    deviation = np.sqrt(2 / (32 * kv_heads))
    assert abs(diagonal.mean() - 1) < 5 * deviation / np.sqrt(diagonal.size)
    aside = product[:, ~np.eye(256, dtype=bool)]
    assert abs(aside.std() * np.sqrt(32 * kv_heads) - 1) < 0.05
    assert not np.array_equal(value[0], value[1])


def test_packed_documents_equal_separate_ones_and_never_see_each_other(config):
    params, alone = noisy(config), random_tokens(3, 12)
    sizes = (7, 12, 5)
    tokens = jnp.concatenate([alone[i, :n] for i, n in enumerate(sizes)] + [jnp.zeros(3, int)])[
        None
    ]
    ids = {
        "positions": jnp.asarray([[*range(7), *range(12), *range(5), 0, 0, 0]]),
        "segment_ids": jnp.asarray([[1] * 7 + [2] * 12 + [3] * 5 + [0] * 3]),
    }
    hidden = forward(config, params, tokens, ids)
    expected = forward(config, params, alone)  # shorter documents padded on the right
    expected = jnp.concatenate([expected[i, :n] for i, n in enumerate(sizes)])
    np.testing.assert_allclose(hidden[0, :24], expected, **CLOSE)
    assert np.isfinite(hidden).all()
    changed = forward(config, params, tokens.at[0, :7].set((tokens[0, :7] + 1) % 61), ids)
    np.testing.assert_array_equal(changed[0, 7:24], hidden[0, 7:24])
    assert not np.array_equal(changed[0, :7], hidden[0, :7])


@pytest.mark.parametrize("kind", ["gpt2", "grouped-window", "multiquery-capped"])
def test_branches_equal_separate_rows_in_values_and_gradients(kind):
    config = KINDS[kind]
    tokens = random_tokens(1, 6 + 5 + 8)
    ids = {
        "positions": jnp.asarray([[*range(6), *range(6, 11), *range(6, 14)]]),
        "segment_ids": jnp.ones((1, 19), jnp.int32),
        "branch_ids": jnp.asarray([[0] * 6 + [1] * 5 + [2] * 8]),
    }
    prompt, chosen, rejected = jnp.split(tokens[0], [6, 11])
    chosen_row = jnp.concatenate([prompt, chosen, jnp.zeros(3, jnp.int32)])
    rows = jnp.stack([chosen_row, jnp.concatenate([prompt, rejected])])
    sign = jnp.where(jnp.arange(13) < 5, 1.0, -1.0) / 13

    def logprobs(params, tokens, sources, ids):
        hidden = apply(config, params, tokens, **ids).hidden.reshape(-1, config.width)
        targets = jnp.concatenate([chosen, rejected])
        values = jax.nn.log_softmax(logits(config, params, hidden[jnp.asarray(sources)]))
        values = values[jnp.arange(13), targets]
        return (sign * values).sum(), (values, hidden)

    @jax.jit
    def both(params):
        step = jax.value_and_grad(logprobs, has_aux=True)
        together = step(params, tokens, [5, *range(6, 10), 5, *range(11, 18)], ids)
        apart = step(params, rows, [*range(5, 10), *range(14 + 5, 14 + 13)], {})
        return together, apart

    ((_, (together, hidden)), gradients), ((_, (apart, separate)), expected) = both(noisy(config))
    np.testing.assert_allclose(together, apart, **CLOSE)
    assert_trees_close(gradients, expected)
    np.testing.assert_allclose(hidden[:11], separate[:11], **CLOSE)
    np.testing.assert_allclose(hidden[11:], separate[14 + 6 :], **CLOSE)


@pytest.mark.parametrize("kind", [pytest.param("llama", marks=pytest.mark.slow), "gpt2"])
def test_padding_never_matters(kind):
    """0 to 7 padding tokens on either side change neither log-probs nor gradients."""
    config = KINDS[kind]
    params, document = noisy(config), random_tokens(9)

    def loss(params, tokens, start, ids):
        hidden = apply(config, params, tokens[None], **ids).hidden[0]
        hidden = jax.lax.dynamic_slice_in_dim(hidden, start, 8)
        values = jax.nn.log_softmax(logits(config, params, hidden))
        return -values[jnp.arange(8), document[1:]].mean()

    def padded(left):
        place = left + jnp.arange(9)
        tokens = jnp.full(16, 60).at[place].set(document)
        segment_ids = jnp.zeros((1, 16), int).at[0, place].set(1)
        positions = jnp.zeros((1, 16), int).at[0, place].set(jnp.arange(9))
        ids = {"positions": positions, "segment_ids": segment_ids}
        return jax.value_and_grad(loss)(params, tokens, left, ids)

    expected = jax.jit(jax.value_and_grad(loss))(params, document, 0, {})
    values = jax.jit(jax.vmap(padded))(jnp.arange(8))
    for left in range(8):
        assert_trees_close(jax.tree.map(lambda x, i=left: x[i], values), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"unroll": 99},
        {"remat": "full"},
        {"remat": "dots"},
        {"remat": "dots", "unroll": 2},
    ],
)
def test_how_it_is_computed_changes_no_value(change):
    def loss(config, params):
        hidden = apply(config, params, random_tokens(2, 11)).hidden
        return jnp.mean(jax.nn.logsumexp(logits(config, params, hidden), axis=-1))

    step = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
    params = noisy(SMALL)
    expected = step(SMALL, params)
    assert_trees_close(step(dataclasses.replace(SMALL, **change), params), expected)


def test_bfloat16_compute_keeps_float32_parameters():
    config = dataclasses.replace(SMALL, init_std=0.05)
    half = dataclasses.replace(config, compute_dtype="bfloat16")
    params, tokens = init(half, jax.random.key(0)), random_tokens(2, 40)
    hidden = forward(half, params, tokens)
    assert hidden.dtype == jnp.bfloat16
    values = logits(half, params, hidden)
    assert values.dtype == jnp.float32
    step = jax.jit(jax.grad(lambda p: forward(half, p, tokens).astype(jnp.float32).sum()))
    gradients = step(params)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((params, gradients)))
    expected = logits(config, params, forward(config, params, tokens))
    logprobs, expected = jax.nn.log_softmax(values), jax.nn.log_softmax(expected)
    assert 0 < float(jnp.abs(logprobs - expected).max()) < 0.05


def test_scores_of_a_scalar_model():
    config = dataclasses.replace(SMALL, head="scalar", tied_embeddings=False)
    params = noisy(config)
    assert "lm_head" not in params
    hidden = forward(config, params, random_tokens(2, 5))
    expected = np.asarray(hidden) @ np.asarray(params["score_head"]["kernel"])[:, 0]
    np.testing.assert_allclose(scores(config, params, hidden), expected, **CLOSE)
    with pytest.raises(ValueError, match="no language-model head"):
        unembedding(config, params)
    with pytest.raises(ValueError, match="head = 'scalar'"):
        scores(SMALL, params, hidden)


def test_ids_are_checked_on_the_host():
    check_tokens(SMALL, np.array([0, 60]), np.array([500]))
    with pytest.raises(UserError, match=r"token id 61 at \[1, 0\] is outside 0..60"):
        check_tokens(SMALL, np.array([[0], [61]]))
    with pytest.raises(UserError, match="token id -1"):
        check_tokens(SMALL, np.array([-1]))
    with pytest.raises(UserError, match=r"position 96 at \[0\]"):
        check_tokens(LEARNED, np.array([0]), np.array([96]))
    with pytest.raises(UserError, match="97 tokens a row, but model"):
        apply(LEARNED, noisy(LEARNED), jnp.zeros((1, 97), jnp.int32))


def test_arguments_that_do_not_go_together():
    params, tokens = noisy(SMALL), random_tokens(1, 4)
    ones = jnp.ones_like(tokens)
    with pytest.raises(ValueError, match="need positions"):
        apply(SMALL, params, tokens, segment_ids=ones)
    with pytest.raises(ValueError, match="need segment_ids"):
        apply(SMALL, params, tokens, positions=ones, branch_ids=ones)
    with pytest.raises(ValueError, match="need a cache"):
        apply(SMALL, params, tokens, prompt_lengths=jnp.array([4]))

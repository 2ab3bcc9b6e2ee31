#!/usr/bin/env bash
# optax 0.2.8 with flax 0.12.8: Muon trains the embedding and the head, and no layer that is scanned over.
#
# Muon is for the matrices of the hidden layers; its author leaves embeddings and the head to Adam. A good engineer
# who changes a transformer's optimizer to `optax.contrib.muon(learning_rate)` would expect about that. Seen: the
# default takes every parameter of two dimensions and leaves the others to Adam, without a word. Layers that are
# stacked for `nn.scan`, as JAX transformers do to compile fast, have kernels of three dimensions, so it is the
# wrong way round: the updates of embedding and head are orthogonalised (their singular values are nearly equal),
# and all entries of a layer's first update have one size, as Adam's have. The same layers in a Python loop are
# trained by Muon, so a model that is only rewritten as a scan is trained by another optimizer. Give
# `muon_weight_dimension_numbers` for what is to be orthogonalised.
#
# Exits 0 while that is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 flax==0.12.8 optax==0.2.8
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from optax.contrib import muon


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(32, use_bias=False)(nn.tanh(x)), None


class Model(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(64, 32, name="embedding")(tokens)
        if self.scanned:
            stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
            x, _ = stack(name="layers")(x, None)
        else:
            for i in range(4):
                x, _ = Layer(name=f"layer_{i}")(x, None)
        return nn.Dense(64, use_bias=False, name="head")(x)


def updates(scanned):
    """Each matrix of the first update: (largest over smallest singular value, largest over smallest entry)."""
    model, tokens = Model(scanned), jnp.arange(64)[None]
    params = model.init(jax.random.key(0), tokens)["params"]
    # Gradients of full rank, whatever the loss.
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    gradients = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), params)
    optimizer = muon(1e-2)
    update, _ = optimizer.update(gradients, optimizer.init(params), params)
    layer = update["layers"]["Dense_0"]["kernel"][0] if scanned else update["layer_0"]["Dense_0"]["kernel"]
    found = {}
    for name, matrix in {
        "embedding": update["embedding"]["embedding"], "a layer": layer, "head": update["head"]["kernel"]
    }.items():
        values = np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)
        entries = np.abs(np.asarray(matrix, np.float64))
        found[name] = "Muon" if values.max() < 2.5 * values.min() else "?"
        if entries.max() < 1.001 * entries.min():
            found[name] = "Adam"
    return found


looped, scanned = updates(scanned=False), updates(scanned=True)
print("layers in a Python loop:", looped)
print("layers in nn.scan:      ", scanned)
all_muon = dict.fromkeys(looped, "Muon")
sys.exit(not (looped == all_muon and scanned == all_muon | {"a layer": "Adam"}))
PYTHON

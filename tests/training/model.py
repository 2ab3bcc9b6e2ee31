"""A stand-in for the transformer: a residual MLP over token rows with stacked layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH, HIDDEN, LAYERS, ROWS, LENGTH = 32, 16, 32, 2, 16, 12


def init(seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 4)

    def normal(key, *shape):
        return 0.3 * jax.random.normal(key, shape)

    return {
        "embed": {"embedding": normal(keys[0], VOCAB, WIDTH)},
        "layers": {
            "mlp": {
                "up": {"kernel": normal(keys[1], LAYERS, WIDTH, HIDDEN)},
                "down": {"kernel": normal(keys[2], LAYERS, HIDDEN, WIDTH)},
            },
            "mlp_norm": {"scale": jnp.ones((LAYERS, WIDTH))},
        },
        "lm_head": {"kernel": normal(keys[3], WIDTH, VOCAB)},
    }


def loss_fn(params, batch, rng):
    """Next-token cross-entropy with a little noise from `rng`, per row, on the embeddings."""
    x = params["embed"]["embedding"][batch["tokens"]]
    noise = jax.vmap(lambda row: jax.random.normal(jax.random.fold_in(rng, row), x.shape[1:]))
    x = x + 0.01 * noise(batch["row_ids"])
    mlp = params["layers"]["mlp"]
    for i in range(LAYERS):
        y = x * params["layers"]["mlp_norm"]["scale"][i]
        x = x + jnp.tanh(y @ mlp["up"]["kernel"][i]) @ mlp["down"]["kernel"][i]
    logits = x @ params["lm_head"]["kernel"]
    logprobs = jax.nn.log_softmax(logits[:, :-1])
    losses = -jnp.take_along_axis(logprobs, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
    weights = batch["weights"]
    total, weight = jnp.sum(losses * weights), jnp.sum(weights)
    hits = jnp.sum((logprobs.argmax(-1) == batch["tokens"][:, 1:]) * weights)
    return (total, weight), {"accuracy": (hits, weight), "logps/chosen": (-total, weight)}


def make_batch(index: int, rows: int = ROWS) -> dict[str, np.ndarray]:
    """Rows of very uneven lengths; the first is empty."""
    rng = np.random.default_rng(index)
    lengths = rng.integers(0, LENGTH, rows)
    lengths[0] = 0
    inside = np.arange(LENGTH) < lengths[:, None] + 1
    tokens = np.cumsum(rng.integers(1, 4, (rows, LENGTH)), axis=1) % VOCAB
    return {
        "tokens": tokens.astype(np.int32),
        "segment_ids": inside.astype(np.int32),
        "weights": inside[:, 1:].astype(np.float32),
        "row_ids": (index * rows + np.arange(rows)).astype(np.int32),
    }


class Batches:
    """Batch after batch, with a position that can be saved and set."""

    def __init__(self, alter=lambda index, batch: batch):
        self._next, self._alter = 0, alter

    def __iter__(self):
        return self

    def __next__(self):
        self._next += 1
        return self._alter(self._next, make_batch(self._next))

    def get_state(self):
        return {"next_index": self._next}

    def set_state(self, state):
        self._next = state["next_index"]

"""The state that training carries from step to step."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from rlhf_jax.models.sharding import TRANSFORMER_RULES, Rules
from rlhf_jax.training.mesh import placed, shardings


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "params", "opt_state", "ema_params", "skipped", "consecutive_skipped"),
    meta_fields=(),
)
@dataclass(frozen=True)
class TrainState:
    """The whole state of training; a step maps it to the next one.

    Attributes:
      step: int32, steps taken, skipped ones included.
      params: nested dict of float32 arrays.
      opt_state: the optimizer's state.
      ema_params: exponential moving average of params, or None.
      skipped: int32, updates skipped so far (not finite, or no weight in the batch).
      consecutive_skipped: int32, updates skipped since the last one applied.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema_params: Any
    skipped: jax.Array
    consecutive_skipped: jax.Array


def init_state(
    params,
    optimizer: optax.GradientTransformation,
    *,
    ema: bool = False,
    mesh: Mesh | None = None,
    rules: Rules = TRANSFORMER_RULES,
) -> TrainState:
    """Returns the state before the first step, placed on the mesh by the rules.

    Everything is a copy: steps donate the state, and the caller may still need `params`, as a
    reference policy for example. For `ShapeDtypeStruct`s it returns the shapes only.
    """

    def build(params):
        zero = jnp.zeros((), jnp.int32)
        copy = functools.partial(jax.tree.map, jnp.copy)
        average = copy(params) if ema else None
        return TrainState(zero, copy(params), optimizer.init(params), average, zero + 0, zero + 0)

    shapes = jax.eval_shape(build, params)
    if isinstance(jax.tree.leaves(params)[0], jax.ShapeDtypeStruct):
        return placed(mesh, shapes, rules)
    if mesh is None:
        return jax.jit(build)(params)
    return jax.jit(build, out_shardings=shardings(mesh, shapes, rules))(params)


def release(tree) -> None:
    """Frees the memory of a tree's arrays, whoever still holds them; using one is an error then."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array) and not leaf.is_deleted():
            leaf.delete()

"""The step factory: the one place that divides sums by weights and updates parameters.

A step's metrics are scalars: those of the loss, divided (a name without "/" gets "train/" in front;
`Metrics.packed` holds what each was divided by), train/loss (total / weight, unless the loss
reports a "loss" itself), train/grad_norm (before the clip), train/param_norm, train/update_norm (0
when skipped), train/weight, train/skipped (so far), train/consecutive_skipped, and
train/learning_rate.

A step whose loss, gradient or update is not finite, or whose weight is zero, leaves params,
optimizer state and average bitwise as they were; the step still counts, and so does the skip. An
update whose norm float32 cannot hold is none that a model survives, and counts as not finite;
parameters may be as large, if only what is added to them is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rlhf_jax.errors import UserError
from rlhf_jax.models.lora import combine
from rlhf_jax.models.sharding import BATCH_AXES, TRANSFORMER_RULES, Rules, batch_shards, split_over
from rlhf_jax.training.mesh import batch_sharding, overlapping, shardings
from rlhf_jax.training.metrics import Metrics, merged
from rlhf_jax.training.state import TrainState
from rlhf_jax.trees import matches, named_leaves


@partial(jax.tree_util.register_dataclass, data_fields=("sums", "values"), meta_fields=("finish",))
@dataclass(frozen=True)
class Coupled:
    """A loss that is no sum over parts of a batch; it unpacks as (total, weight).

    A mean that is clamped, a quotient or a sorting of all rows is such a loss. Where a batch is
    split, the step first collects the values of all parts, and then goes through the parts once
    more for their gradients.

    Attributes:
      sums: (total, weight) of the rows at hand, as if they were the whole batch.
      values: tree of arrays [rows, …], or [1, …] of sums over the rows, by which alone the loss
        depends on the parameters.
      finish: (the values of all rows or parts, the whole batch as the step got it) → ((total,
        weight), metrics), which go before those of the parts; pure, and holds no arrays itself.
    """

    sums: tuple[jax.Array, jax.Array]
    values: Any
    finish: Callable[[Any, Any], tuple]

    def __iter__(self) -> Iterator[jax.Array]:
        return iter(self.sums)


def make_step(
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh | None = None,
    rules: Rules = TRANSFORMER_RULES,
    microbatches: int = 1,
    max_grad_norm: float | None = None,
    ema_decay: float | None = None,
    frozen: Any = None,
    schedule: Callable[[jax.Array], jax.Array] | None = None,
    seed: int = 0,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple]:
    """Returns the jitted `step(state, batch) -> (state, metrics)`; `state` is donated.

    `loss_fn(params, batch, rng) -> ((total, weight), metrics)`, metrics `{name: (total, weight)}`,
    all float32 scalars. Sums are added over microbatches and devices and divided once:

        g = Σ ∇total / Σ weight,   g ← g · min(1, max_grad_norm / ‖g‖)

    A metric that `meanings.meaning` takes for a largest, a least or a count, which comes as
    (value, 1), is that of all microbatches. A loss that is no such sum returns a `Coupled`. A third
    thing, a tree of arrays [rows, …], is returned by the step too, for all rows of the batch.

    Args:
      loss_fn: sees the rows of one microbatch. `rng` is fold_in(seed, step), the same for every
        microbatch: fold in `batch["row_ids"]` for noise that no split of the batch changes.
      optimizer: from `make_optimizer`.
      mesh: None for one device.
      rules: where parameters and optimizer state lie on the mesh.
      microbatches: number of equal parts the rows are split into, one after the other; row i is in
        part i mod microbatches, which keeps every device's rows on that device.
      max_grad_norm: clip by global norm.
      ema_decay: ema_params ← decay · ema_params + (1 − decay) · params; the state needs `ema=True`.
      frozen: parameters that the state lacks and `loss_fn` sees beside its own, as `lora.split`
        gives them; on a mesh already where they belong.
      schedule: learning rate by number of applied updates, only to report it.
    """

    def step(state: TrainState, batch, frozen=None):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        places = None if mesh is None else shardings(mesh, state, rules)
        batch = _constrain(batch, mesh and batch_sharding(mesh))
        _check_rows(batch, microbatches, batch_shards(mesh))
        objective = _make_objective(split_over(mesh, loss_fn), frozen, rng)
        if microbatches == 1:
            gradient, aux = jax.grad(objective, has_aux=True)(state.params, batch)
        else:
            gradient, aux = _accumulate(objective, state.params, batch, microbatches, mesh)
        (total, weight), sums, extra = aux
        loss = _float32((total, weight))
        gradient = _constrain(gradient, places and places.params)
        new, norms = _update(optimizer, state, gradient, loss, max_grad_norm, ema_decay)
        if schedule is not None:
            norms["train/learning_rate"] = schedule(state.step - state.skipped)
        means, weights = _divide({"loss": loss} | sums)
        return _constrain(new, places), Metrics.of(means | norms, weights), *extra

    compiled = jax.jit(step, donate_argnums=0, compiler_options=overlapping(mesh) or None)
    return partial(compiled, frozen=frozen) if frozen else compiled


def _constrain(tree, places):
    """The tree at those places of a mesh; without a mesh, where None stands for them, as it is."""
    return tree if places is None else jax.lax.with_sharding_constraint(tree, places)


def _check_rows(batch, microbatches: int, shards: int) -> None:
    rows = len(jax.tree.leaves(batch)[0])
    if rows % (microbatches * shards):
        raise UserError(
            f"a batch of {rows} rows does not split into {microbatches} microbatches over {shards} "
            f"devices; make it a multiple of {microbatches * shards}"
        )


def _make_objective(loss_fn: Callable, frozen: Any, rng: jax.Array) -> Callable:
    """(params, rows) → (total, (loss, sums of metrics, extra arrays)), for `jax.grad`."""

    def objective(params, rows):
        whole = combine(params, frozen) if frozen else params
        loss, metrics, *extra = loss_fn(whole, rows, rng)
        sums = _float32(tuple(loss))
        return sums[0], (loss if isinstance(loss, Coupled) else sums, _float32(metrics), extra)

    return objective


def with_constants(loss_fn: Callable, patterns: Sequence[str]) -> Callable:
    """Returns the loss with parameters of matching names as constants.

    They have no backward pass and no share in the gradient's norm.

    Args:
      patterns: regexes of "/"-joined names.
    """

    def loss_of_the_rest(params, batch, rng):
        leaves = [
            jax.lax.stop_gradient(leaf) if matches(name, patterns) else leaf
            for name, leaf in named_leaves(params).items()
        ]
        return loss_fn(jax.tree.unflatten(jax.tree.structure(params), leaves), batch, rng)

    return loss_of_the_rest


def _update(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradient,
    loss: tuple[jax.Array, jax.Array],
    max_grad_norm: float | None,
    ema_decay: float | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """(state after the step, its metrics) from the sums (total, weight) and ∇total.

    Whether an update is finite is known only when all of it was computed. So the optimizer is asked
    twice, for the update and, if that is applied, for its own next state: two passes over the
    arrays, of which the second writes in place. One pass would have to hold both states.
    """
    total, weight = loss
    divisor, scale = jnp.where(weight > 0, weight, 1), jnp.float32(1)
    grad_norm = optax.tree.norm(jax.tree.map(lambda g: g / divisor, gradient))
    if max_grad_norm is not None:
        scale = jnp.minimum(1, max_grad_norm / jnp.maximum(grad_norm, 1e-30))

    def optimize():
        clipped = jax.tree.map(lambda g: g / divisor * scale, gradient)
        return optimizer.update(clipped, state.opt_state, state.params)

    updates, _ = optimize()
    update_norm = optax.tree.norm(updates)
    finite = jnp.isfinite(total) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
    applied = finite & (weight > 0)

    def apply():
        _, opt_state = optimize()
        params = optax.apply_updates(state.params, updates)
        average = state.ema_params
        if ema_decay is not None:
            average = optax.incremental_update(params, average, 1 - ema_decay)
        return params, opt_state, average

    def skip():
        return state.params, state.opt_state, state.ema_params

    params, opt_state, average = jax.lax.cond(applied, apply, skip)
    skipped = state.skipped + ~applied
    consecutive = jnp.where(applied, 0, state.consecutive_skipped + 1)
    metrics = {
        "train/grad_norm": grad_norm,
        "train/param_norm": optax.tree.norm(params),
        "train/update_norm": jnp.where(applied, update_norm, 0),
        "train/weight": weight,
        "train/skipped": skipped,
        "train/consecutive_skipped": consecutive,
    }
    return TrainState(state.step + 1, params, opt_state, average, skipped, consecutive), metrics


def _accumulate(objective: Callable, params, batch, microbatches: int, mesh: Mesh | None):
    """(∇total, ((total, weight), sums of metrics, extra arrays)) of one part after the other.

    `objective(params, part)` is the total of a part and, beside it, the same three things.
    """
    place = mesh and NamedSharding(mesh, P(None, BATCH_AXES))
    parts = _constrain(_split(batch, microbatches), place)
    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts)
    _, (loss, metrics, _) = jax.eval_shape(objective, params, first)
    finish = loss.finish if isinstance(loss, Coupled) else None
    pulls = None  # of coupled values: ∂total/∂value, which each part's values are pulled by
    if finish is not None:
        values = jax.lax.map(lambda part: objective(params, part)[1][0].values, parts)
        pull = jax.grad(lambda values: finish(values, batch)[0][0])(_join(values))
        pulls = _split(pull, microbatches)

    def add(carry, part_and_pull):
        part, pull = part_and_pull

        def contribution(params):
            total, (loss, metrics, extra) = objective(params, part)
            if finish is None:
                return total, (loss, metrics, (None, extra))
            shares = jax.tree.map(lambda x, pull: jnp.sum(x * pull), loss.values, pull)
            return sum(jax.tree.leaves(shares)), (None, metrics, (loss.values, extra))

        gradient, (loss, metrics, extra) = jax.grad(contribution, has_aux=True)(params)
        gradients, sums, before = carry
        gradients, sums = jax.tree.map(jnp.add, (gradients, sums), (gradient, loss))
        return (gradients, sums, {k: merged(k, before[k], x) for k, x in metrics.items()}), extra

    summed = params, None if finish else loss, metrics
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), summed)
    (gradient, sums, metrics), extra = jax.lax.scan(add, zeros, (parts, pulls))
    values, extra = _join(extra)
    if finish is not None:
        sums, more = _float32(finish(values, batch))
        metrics |= more
    return gradient, (sums, metrics, extra)


def _split(tree, parts: int):
    """Arrays [rows, …] as [parts, rows / parts, …], row i in part i mod parts."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(len(x) // parts, parts, *x.shape[1:]), 1, 0), tree
    )


def _join(tree):
    """The rows of all parts, in the order that they had before `_split`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def _float32(sums):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), sums)


def _divide(sums: dict[str, tuple[jax.Array, jax.Array]]) -> tuple[dict[str, jax.Array], ...]:
    """(total / weight of each, 0 where the weight is 0; the weights), always in the same order."""
    pairs = sorted(sums.items())
    named = {name if "/" in name else f"train/{name}": pair for name, pair in pairs}
    means = {
        name: jnp.where(weight == 0, 0.0, total / jnp.where(weight == 0, 1.0, weight))
        for name, (total, weight) in named.items()
    }
    return means, {name: weight for name, (_, weight) in named.items()}

"""A model being trained: the step its config describes, and what is trained of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax.sharding import Mesh

from rlhf_jax.config import Config
from rlhf_jax.models.lora import combine, split
from rlhf_jax.models.sharding import TRANSFORMER_RULES, Rules
from rlhf_jax.training.mesh import placed
from rlhf_jax.training.optimizer import OptimizerConfig, make_optimizer
from rlhf_jax.training.state import TrainState, init_state
from rlhf_jax.training.step import make_step, with_constants


@dataclass(frozen=True)
class Learner:
    """A step and a state that train one model.

    Attributes:
      step: of `make_step`.
      init: () → the state before the first step.
      params: a state → all of the model's parameters, the average where one is kept; those that an
        adapter leaves alone are the very arrays it was made with.
    """

    step: Callable[[TrainState, Any], tuple]
    init: Callable[[], TrainState]
    params: Callable[[TrainState], Any]


def make_learner(
    config: Config,
    section: OptimizerConfig,
    params: Any,
    loss_fn: Callable,
    *,
    updates: int,
    mesh: Mesh | None = None,
    rules: Rules = TRANSFORMER_RULES,
    ema_decay: float = 0.0,
) -> Learner:
    """Returns a learner of `params`, under an adapter of that alone, for so many `updates`.

    Args:
      config: gives batch.microbatches and the seed.
      section: the config's section of an optimizer.
      loss_fn: see `make_step`.
    """
    optimizer, schedule = make_optimizer(section, updates)
    trained, frozen = split(placed(mesh, params, rules))
    step = make_step(
        with_constants(loss_fn, section.freeze) if section.freeze else loss_fn,
        optimizer,
        mesh=mesh,
        rules=rules,
        microbatches=config.batch.microbatches,
        max_grad_norm=section.max_grad_norm,
        ema_decay=ema_decay or None,
        frozen=frozen,
        schedule=schedule,
        seed=config.seed,
    )
    ema = ema_decay > 0
    init = partial(init_state, trained, optimizer, ema=ema, mesh=mesh, rules=rules)

    def whole(state: TrainState) -> Any:
        return combine(state.ema_params if ema else state.params, frozen)

    return Learner(step, init, whole)

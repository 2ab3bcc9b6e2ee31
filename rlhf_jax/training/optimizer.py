"""Optimizers and schedules from one configuration: AdamW, Adafactor, Lion, Muon."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from rlhf_jax.errors import UserError, nearest
from rlhf_jax.losses.checks import check_intervals
from rlhf_jax.trees import matches, named_leaves

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
NO_DECAY = (r"(^|/)(bias|scale|embedding)$",)
HIDDEN = r"(^|/)layers/.*kernel$"
_INTERVALS = {
    "[0, inf)": ("learning_rate", "weight_decay", "eps", "muon_rms"),
    "(0, inf)": ("max_grad_norm", "muon_steps"),
    "[0, 1)": ("b1", "b2", "momentum"),
    "[0, 1]": ("final_fraction", "decay_fraction"),
}


@dataclass(frozen=True)
class OptimizerConfig:
    """Everything an optimizer is made from.

    Attributes:
      name: "adamw", "adafactor" (no parameter scaling, so learning rates mean what they mean for
        Adam), "lion", or "muon" (for the kernels under layers/, Adam for the rest).
      learning_rate: the peak.
      schedule: after warm-up "cosine", "linear", "constant", or "wsd" (constant, then linear over
        the last `decay_fraction` of the steps).
      warmup_steps: update t of these (from 0) has learning_rate · (t + 1) / warmup_steps.
      final_fraction: the last update has final_fraction · learning_rate.
      decay_fraction: of "wsd".
      weight_decay: decoupled, times the learning rate as in PyTorch.
      no_decay: regexes of parameters without weight decay; norms, biases and embeddings by default.
      freeze: regexes of parameters that stay bitwise as they are and have no optimizer state; give
        them to `make_step` too, which then leaves out their backward pass.
      max_grad_norm: for `make_step`, which clips after accumulation; None: no clipping.
      b1, b2, eps: of Adam; b1 and b2 of Lion too.
      momentum: of Muon.
      muon_steps: Newton–Schulz iterations.
      muon_rms: root mean square of Muon's updates before the learning rate; Adam's is 0.2 to 0.4.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    weight_decay: float = 0.0
    no_decay: tuple[str, ...] = NO_DECAY
    freeze: tuple[str, ...] = ()
    max_grad_norm: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.95
    muon_steps: int = 5
    muon_rms: float = 0.2


def optimizer_config(values: Mapping) -> OptimizerConfig:
    """An OptimizerConfig of a mapping or ConfigDict; an unknown field is a UserError."""
    known = [field.name for field in dataclasses.fields(OptimizerConfig)]
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in dict(values).items()}
    for name in values:
        _check_name("optimizer field", name, known)
    return OptimizerConfig(**values)


def make_schedule(config: OptimizerConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Returns learning rate by number of updates applied before (0 for the first update).

    With W = warmup_steps, t the update and D the first step of the decay (W, or steps −
    decay_fraction · steps for "wsd"), p = clip((t + 1 − D) / (steps − D), 0, 1):

        lr(t) = min((t + 1) / W, 1) · peak · (final + (1 − final) · shape(p))

    shape is ½(1 + cos πp) for cosine, 1 − p for linear and wsd, 1 for constant.

    Raises:
      UserError: unknown schedule, or a warm-up that is not shorter than the run.
    """
    _check_name("schedule", config.schedule, SCHEDULES)
    if not 0 <= config.warmup_steps < max(steps, 1):
        raise UserError(
            f"optimizer.warmup_steps={config.warmup_steps} must be below the run's {steps} steps"
        )
    if config.schedule == "wsd":
        start = max(config.warmup_steps, steps - round(config.decay_fraction * steps))
    else:
        start = config.warmup_steps
    shape = {
        "cosine": lambda p: (1 + jnp.cos(jnp.pi * p)) / 2,
        "linear": lambda p: 1 - p,
        "wsd": lambda p: 1 - p,
        "constant": lambda p: jnp.ones_like(p),
    }[config.schedule]

    def schedule(count):
        done = jnp.asarray(count, jnp.float32) + 1
        progress = jnp.clip((done - start) / max(steps - start, 1), 0, 1)
        warmup = jnp.minimum(done / max(config.warmup_steps, 1), 1)
        final = config.final_fraction
        return config.learning_rate * warmup * (final + (1 - final) * shape(progress))

    return schedule


def make_optimizer(
    config: OptimizerConfig | Mapping, steps: int, section: str = "optimizer"
) -> tuple[optax.GradientTransformation, Callable[[jax.Array], jax.Array]]:
    """Returns (optimizer, schedule) for a run of `steps` updates; gradients come already clipped.

    Raises:
      UserError: unknown optimizer, schedule or field (the nearest known one is named), or a number
        outside its range; it names the config's `section`.
    """
    if not isinstance(config, OptimizerConfig):
        config = optimizer_config(config)
    _check_name("optimizer", config.name, OPTIMIZERS)
    try:
        check_intervals(dataclasses.asdict(config), _INTERVALS, f"{section}.")
    except ValueError as error:
        raise UserError(f"config: {error}") from error
    schedule = make_schedule(config, steps)
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    rules = {
        "adamw": {"adam": adam},
        "lion": {"lion": optax.scale_by_lion(config.b1, config.b2)},
        "adafactor": {
            "adafactor": optax.chain(
                optax.scale_by_factored_rms(decay_rate=0.8),
                optax.clip_by_block_rms(1.0),
            )
        },
        "muon": {"muon": _muon(config), "adam": adam},
    }[config.name]
    main, *others = rules

    def label(name: str) -> str:
        if matches(name, config.freeze):
            return "frozen"
        return others[0] if others and not re.search(HIDDEN, name) else main

    def decays(name: str) -> bool:
        return not matches(name, (*config.no_decay, *config.freeze))

    transforms = [
        optax.partition(rules | {"frozen": optax.set_to_zero()}, _by_name(label)),
        optax.add_decayed_weights(config.weight_decay, _by_name(decays)),
        optax.scale_by_learning_rate(schedule),
    ]
    if config.weight_decay == 0:
        del transforms[1]
    return optax.chain(*transforms), schedule


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Orthogonalised momentum for each matrix of kernels [layers, (experts,) in, out].

    Scaled by muon_rms · √max(in, out), to the RMS of Adam's updates, so that Adam's learning rate
    and weight decay serve: "Muon is Scalable for LLM Training", https://arxiv.org/abs/2502.16982.
    """

    def dimensions(updates):
        return jax.tree.map(lambda x: MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), updates)

    def rescale(updates, params=None):
        del params
        scale = config.muon_rms
        return jax.tree.map(lambda x: x * (scale * math.sqrt(max(x.shape[-2:]))), updates)

    return optax.chain(
        scale_by_muon(
            ns_steps=config.muon_steps,
            beta=config.momentum,
            eps=config.eps,
            weight_dimension_numbers=dimensions,
        ),
        optax.stateless(rescale),
    )


def _by_name(function):
    """A function of the parameter tree that applies `function` to every name."""

    def tree_of(params):
        values = [function(name) for name in named_leaves(params)]
        return jax.tree.unflatten(jax.tree.structure(params), values)

    return tree_of


def _check_name(what: str, name: str, known) -> None:
    if name in known:
        return
    hint = f"did you mean {nearest(name, known)!r}?"
    raise UserError(f"unknown {what} {name!r}; {hint} Known: {', '.join(known)}")

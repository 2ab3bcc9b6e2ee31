"""Optimizers and schedules from one configuration: AdamW, Adafactor, Lion, Muon."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from rlhf_jax.config import Only, build, option
from rlhf_jax.errors import UserError, nearest
from rlhf_jax.trees import matches, named_leaves

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon")
SCHEDULES = ("cosine", "linear", "constant", "wsd")
NO_DECAY = (r"(^|/)(bias|scale|embedding)$",)
STACKED = r"(^|/)layers/"
HIDDEN = STACKED + r".*kernel$"
B1 = 0.9  # of Adam and Lion
MUON_STEPS = 5  # of Newton–Schulz
MUON_RMS = 0.2  # root mean square of Muon's updates before the learning rate; Adam's is 0.2 to 0.4


@dataclass(frozen=True)
class OptimizerConfig:
    """The options of an optimizer.

    It is "adamw", "adafactor" (no parameter scaling, so learning rates mean what they mean for
    Adam), "lion", or "muon" (for the kernels under layers/, Adam for the rest). Weight decay is
    decoupled, times the learning rate as in PyTorch, and none of norms, biases and embeddings.
    """

    name: str = "adamw"  # or adafactor, lion, muon
    learning_rate: float = option(1e-3, within="[0, inf)")  # the peak
    # After the warm-up "cosine", "linear", "constant", or "wsd": constant, then linear.
    schedule: str = "cosine"
    warmup_steps: int = 0  # update t of these (from 0) has learning_rate · (t + 1) / warmup_steps
    final_fraction: float = option(0.1, within="[0, 1]")  # of learning_rate, in the last update
    decay_fraction: float = option(  # of the steps, in which "wsd" decays
        0.2, within="[0, 1]", only=Only("schedule", ("wsd",))
    )
    # Per update, times the learning rate.
    weight_decay: float = option(0.0, within="[0, inf)")
    # Regexes of parameters that stay bitwise as they are and have no optimizer state; give them to
    # `make_step` too, which then leaves out their backward pass.
    freeze: tuple[str, ...] = ()
    # For `make_step`, which clips after accumulation; None: no clipping.
    max_grad_norm: float | None = option(1.0, within="(0, inf)")
    # Of the mean of squared gradients; of Lion's momentum.
    b2: float = option(0.999, within="[0, 1)", only=Only("name", ("adamw", "lion", "muon")))
    # Added to the root of that mean.
    eps: float = option(1e-8, within="[0, inf)", only=Only("name", ("adamw", "muon")))
    # Of Muon's gradients.
    momentum: float = option(0.95, within="[0, 1)", only=Only("name", ("muon",)))

    def validate(self) -> None:
        """Raises UserError for an unknown optimizer or schedule, or a pattern that is none."""
        for pattern in self.freeze:
            try:
                empty = re.compile(pattern).match("") is not None
            except re.error:
                empty = True
            if empty:
                raise UserError(
                    f"optimizer.freeze has {pattern!r}, which is no pattern or is found in every "
                    "name: give a regular expression for names of parameters, as ^embed/"
                )
        for what, name, known in (
            ("optimizer", self.name, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
        ):
            if name not in known:
                hint = f"did you mean {nearest(name, known)!r}? Known: {', '.join(known)}"
                raise UserError(f"unknown {what} {name!r}; {hint}")


def make_schedule(config: OptimizerConfig, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Returns learning rate by number of updates applied before (0 for the first update).

    With W = warmup_steps, t the update and D the first step of the decay (W, or steps −
    decay_fraction · steps for "wsd"), p = clip((t + 1 − D) / (steps − D), 0, 1):

        lr(t) = min((t + 1) / W, 1) · peak · (final + (1 − final) · shape(p))

    shape is ½(1 + cos πp) for cosine, 1 − p for linear and wsd, 1 for constant.

    Raises:
      UserError: a warm-up that is not shorter than the run.
    """
    if not 0 <= config.warmup_steps < max(steps, 1):
        raise UserError(
            f"optimizer.warmup_steps={config.warmup_steps} must be at least 0 and less than the "
            f"run's {steps} steps"
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
    options: OptimizerConfig | Mapping, steps: int
) -> tuple[optax.GradientTransformation, Callable[[jax.Array], jax.Array]]:
    """Returns (optimizer, schedule) for a run of `steps` updates; gradients come already clipped.

    Raises:
      UserError: unknown optimizer, schedule or field (the nearest known one is named), or a number
        outside its range.
    """
    config: OptimizerConfig = (
        options
        if isinstance(options, OptimizerConfig)
        else build(OptimizerConfig, options, "optimizer")
    )
    schedule = make_schedule(config, steps)
    adam = optax.scale_by_adam(B1, config.b2, config.eps)
    rules = {
        "adamw": {"adam": adam},
        "lion": {"lion": optax.scale_by_lion(B1, config.b2)},
        "adafactor": {
            "adafactor": optax.chain(
                optax.scale_by_factored_rms(decay_rate=0.8),
                optax.stateless(_clip_each_layer),
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
        return not matches(name, (*NO_DECAY, *config.freeze))

    transforms = [
        optax.partition(rules | {"frozen": optax.set_to_zero()}, _by_name(label)),
        optax.add_decayed_weights(config.weight_decay, _by_name(decays)),
        optax.scale_by_learning_rate(schedule),
    ]
    if config.weight_decay == 0:
        del transforms[1]
    return optax.chain(*transforms), schedule


def _clip_each_layer(updates, params=None):
    """Adafactor's bound of 1 on an update's RMS, https://arxiv.org/abs/1804.04235 §6.

    The matrices of stacked layers and experts, and the vectors of layers, are each clipped alone.
    """
    del params

    def clip(name: str, update):
        own = None
        if re.search(STACKED, name):
            own = (-2, -1) if update.ndim > 2 else -1
        mean = jnp.mean(jnp.square(update), own, keepdims=True)
        return update / jnp.maximum(1.0, jnp.sqrt(mean))

    clipped = [clip(name, update) for name, update in named_leaves(updates).items()]
    return jax.tree.unflatten(jax.tree.structure(updates), clipped)


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Orthogonalised momentum for each matrix of kernels [layers, (experts,) in, out].

    Scaled by MUON_RMS · √max(in, out), to the RMS of Adam's updates, so that Adam's learning rate
    and weight decay serve: "Muon is Scalable for LLM Training", https://arxiv.org/abs/2502.16982.
    """

    def dimensions(updates):
        return jax.tree.map(lambda x: MuonDimensionNumbers(x.ndim - 2, x.ndim - 1), updates)

    def rescale(updates, params=None):
        del params
        return jax.tree.map(lambda x: x * (MUON_RMS * math.sqrt(max(x.shape[-2:]))), updates)

    return optax.chain(
        scale_by_muon(
            ns_steps=MUON_STEPS,
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

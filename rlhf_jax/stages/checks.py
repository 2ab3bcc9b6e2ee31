"""What can be seen to be wrong with a config before hours are spent on the parents."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from rlhf_jax.data.encode import check_stripped_turns
from rlhf_jax.data.shapes import parse_columns
from rlhf_jax.errors import UserError, nearest
from rlhf_jax.hub.chat_formats import chat_template
from rlhf_jax.hub.hub_data import check_hub_name
from rlhf_jax.losses.advantages import BASELINES, SCALES
from rlhf_jax.losses.checks import check_choice, check_intervals
from rlhf_jax.losses.policy import AGGREGATIONS, LEVELS, check_policy_options, policy_loss
from rlhf_jax.losses.preference import check_options as check_loss_options
from rlhf_jax.losses.shaping import EOS_MODES, ESTIMATORS
from rlhf_jax.models.lora import AdapterConfig
from rlhf_jax.rewards.ensemble import COMBINATIONS
from rlhf_jax.rewards.scorers import parse_rewards
from rlhf_jax.rl.objectives import ADVANTAGES, PLACEMENTS, parse_options
from rlhf_jax.sampling.arguments import check_options
from rlhf_jax.stages.defaults import SAMPLING, STAGES, fields_of, leaves
from rlhf_jax.stages.rollouts import truncation
from rlhf_jax.tasks.builders import task_of
from rlhf_jax.tasks.sources import parse_source, parse_sources
from rlhf_jax.training.optimizer import make_optimizer

_LEAST = {  # of whole numbers that count something
    2: ("train.keep_last",),
    1: (
        *("batch.rows", "batch.microbatches", "train.steps", "train.epochs", "train.minibatches"),
        *("train.log_every", "train.checkpoint_every", "train.max_skipped", "data.row_length"),
        *("rollout.prompts", "rollout.samples", "rollout.slots", "rollout.max_prompt_tokens"),
        *("rollout.max_new_tokens", "eval.count", "eval.max_new_tokens", "best_of_n.samples"),
        *("best_of_n.n", "best_of_n.prompts", "normalize.max_new_tokens"),
    ),
    0: (
        *("train.eval_every", "rollout.resample", "rollout.max_staleness"),
        *("normalize.prompts", "kl.exact_rows", "eval.during"),
    ),
}

_INTERVALS = {  # of other numbers; an optimizer's are in training/optimizer.py
    "[0, inf)": (
        *("loss.z_loss", "loss.centering", "loss.sft_coefficient", "loss.entropy_coefficient"),
        *("loss.ptx_coefficient", "kl.coefficient", "critic.value_clip", "advantage.eps"),
        *("advantage.ddof", "reward.ensemble_k", "rollout.missing_eos_penalty"),
        *("eval.temperature", "train.checkpoint_minutes"),
    ),
    "(0, inf)": ("loss.beta", "loss.importance_cap", "reward.timeout_seconds"),
    "[0, 1)": ("loss.label_smoothing", "train.ema_decay", "data.max_bad_fraction"),
    "[0, 1]": ("advantage.gamma", "advantage.lam"),
}


def check(config: ConfigDict) -> None:
    """UserError for what can be seen to be wrong before hours are spent on the parents."""
    _check_fields(config)
    if config.stage == "oracle":  # whose rows have configs of their own
        return
    _check_numbers(config)
    updates = config.train.steps
    if config.stage in ("policy", "online_preference"):
        updates *= config.train.epochs * config.train.minibatches
    make_optimizer(config.optimizer, updates)
    if "critic" in config:
        critic = {k: v for k, v in config.critic.items() if k != "value_clip"}
        make_optimizer(critic, updates, "critic")
    if config.data.get("chat_template"):
        chat_template(config.data.chat_template)
    if "stripped_turns" in config.data:
        check_stripped_turns(config.data.stripped_turns)
    if "adapter" in config:
        AdapterConfig(**config.adapter).validate()
    try:
        parse_columns(config.data.get("columns", ""))
    except ValueError as error:
        raise UserError(f"config: {error}") from error
    data, held_out = config.data, config.eval.get("source", "")
    for spec in (
        data.train,
        data.validation,
        data.get("replay", ""),
        data.get("ptx", ""),
        held_out,
    ):
        for source in parse_sources(spec) if spec else ():
            parsed = parse_source(source)
            if parsed.is_hub:
                check_hub_name(parsed.name)
            elif not parsed.is_file:
                task_of(parsed.name)
            elif not Path(parsed.name).is_file():
                raise UserError(f"data: there is no file {parsed.name}")
    if config.stage in SAMPLING:
        _check_sampling(config)
    if config.stage == "policy":
        check_objective(config)
    if config.stage == "reward" and config.loss.name not in ("bradley_terry", "pointwise"):
        name = config.loss.name
        raise UserError(f"config.loss.name = {name!r}: choose one of bradley_terry, pointwise")
    if config.stage == "online_preference" and config.loss.name == "kto":
        raise UserError(
            "config: loss.name = 'kto' needs an answer to another prompt beside each pair, which "
            "online pairs lack; choose another loss"
        )
    if config.stage in ("preference", "online_preference"):
        try:
            check_loss_options(config.loss.name, parse_options(config.loss.options))
        except ValueError as error:
            raise UserError(f"config.loss: {error}") from error


@functools.cache
def _fields(stage: str) -> frozenset[str]:
    return frozenset(leaves(fields_of(stage)))


def has_field(stage: str, name: str) -> bool:
    """Whether a stage reads the field of that dotted name."""
    member = stage in SAMPLING and name.startswith("init.reward_")  # of an ensemble, any number
    return member or name in _fields(stage)


def unread_field(stage: str, names: Iterable[str]) -> str | None:
    """A line about the first of the dotted names that other stages read and this one does not."""
    for name in names:
        others = [each for each in STAGES if has_field(each, name)]
        if others and stage not in others:
            return f"the {stage} stage has no {name}; it is read by {', '.join(others)}"
    return None


def _check_fields(config: ConfigDict) -> None:
    for name in leaves(config):
        if not has_field(config.stage, name):
            near = nearest(name, _fields(config.stage))
            line = f"the {config.stage} stage has no {name}; did you mean {near}?"
            raise UserError(f"config: {unread_field(config.stage, [name]) or line}")


def _check_numbers(config: ConfigDict) -> None:
    values = leaves(config)
    judged = ("eval.during",) if config.stage in SAMPLING else ()  # it is their result
    for least, names in (*_LEAST.items(), (1, judged)):
        for name in names:
            if values.get(name, least) < least:
                raise UserError(f"config: {name} = {values[name]} must be at least {least}")
    for name, value in values.items():
        if isinstance(value, float) and not abs(value) <= float(jnp.finfo(jnp.float32).max):
            raise UserError(f"config: {name} = {value} is no number that float32 can hold")
    try:
        check_intervals(values, _INTERVALS)
        parse_options(values.get("loss.options", ""))
    except ValueError as error:
        raise UserError(f"config: {error}") from error


def _check_sampling(config: ConfigDict) -> None:
    """UserError for a field about sampling or rewards that a stage cannot follow."""
    rollout, reward = config.rollout, config.reward
    weights = parse_rewards(reward.scorers)
    for name in weights:
        file = Path(name.rpartition(":")[0])
        if ".py:" in name and not file.is_file():
            raise UserError(f"config: reward.scorers names {name!r}: there is no file {file}")
    if not 0 < rollout.temperature < math.inf:
        raise UserError(f"config: rollout.temperature = {rollout.temperature} must be above 0")
    try:
        check_options({"top_k": rollout.top_k or None}, {k: rollout[k] for k in ("top_p", "min_p")})
    except UserError as error:
        raise UserError(f"config: rollout.{error}") from error
    named = [role for role, path in config.init.items() if role.startswith("reward") and path]
    if "model" in weights and not named:
        raise UserError("config: reward.scorers names a 'model', but there is no init.reward")
    try:
        check_choice("reward.ensemble", reward.ensemble, COMBINATIONS)
        check_choice("reward.on_error", reward.on_error, ("fail", "mask"))
        if config.stage != "best_of_n":
            check_choice("rollout.missing_eos", rollout.missing_eos, EOS_MODES)
            check_choice("rollout.truncated", rollout.truncated, ("keep", "mask"))
    except ValueError as error:
        raise UserError(f"config: {error}") from error
    pair = 2 if config.stage == "online_preference" else 1
    longest = rollout.max_prompt_tokens + pair * rollout.max_new_tokens
    if longest > config.data.row_length:
        raise UserError(
            f"config: a prompt of rollout.max_prompt_tokens with {pair} answer(s) of "
            f"rollout.max_new_tokens has {longest} tokens, over data.row_length = "
            f"{config.data.row_length}"
        )
    if config.stage == "best_of_n":
        return
    if not 0 <= rollout.overlong_buffer <= rollout.max_new_tokens:
        raise UserError(
            f"config: rollout.overlong_buffer = {rollout.overlong_buffer} must be between 0 and "
            f"rollout.max_new_tokens = {rollout.max_new_tokens}"
        )
    if rollout.filter_zero_std and rollout.samples < 2:
        raise UserError(
            "config: rollout.filter_zero_std needs rollout.samples of 2 or more: one answer to a "
            "prompt has no spread"
        )


def check_objective(config: ConfigDict) -> None:
    """UserError for a field of an on-policy config that cannot be followed."""
    advantage, kl, loss, rollout = config.advantage, config.kl, config.loss, config.rollout
    updates = config.train.epochs * config.train.minibatches
    try:
        check_choice("advantage.name", advantage.name, ADVANTAGES)
        check_choice("advantage.baseline", advantage.baseline, BASELINES)
        check_choice("advantage.scale", advantage.scale, SCALES)
        check_choice("kl.placement", kl.placement, PLACEMENTS)
        check_choice("kl.estimator", kl.estimator, ESTIMATORS)
        check_choice("kl.level", kl.level, LEVELS)
        check_choice("loss.aggregation", loss.aggregation, AGGREGATIONS)
        check_choice("loss.importance", loss.importance, ("none", "token", "sequence"))
        check_choice("loss.importance_mode", loss.importance_mode, ("truncate", "mask"))
        _try_objective(loss.name, parse_options(loss.options))
    except ValueError as error:
        raise UserError(f"config: {error}") from error
    if kl.placement == "loss" and kl.estimator == "k1":
        raise UserError(
            "config: kl.estimator = 'k1' in the loss has no gradient on average and would "
            "regularise nothing; use k2 or k3 there, or kl.placement = 'reward'"
        )
    if kl.target < 0 or kl.horizon <= 0 or (kl.target and kl.placement == "none"):
        raise UserError(
            f"config: kl.target = {kl.target} with kl.horizon = {kl.horizon} and kl.placement = "
            f"{kl.placement!r}: a target is positive, with a horizon above 0 and a KL that is paid"
        )
    relative = advantage.baseline != "none" or advantage.scale == "group"
    if advantage.name == "gae" and "critic" not in config:
        raise UserError(
            "config: advantage.name = 'gae' needs the section critic, which experiments/ppo.py has"
        )
    if advantage.name == "group" and rollout.samples < 2 and relative:
        raise UserError(
            f"config: rollout.samples = {rollout.samples}: a baseline over the samples of a prompt "
            "needs two or more of them"
        )
    for name in truncation(config):
        raise UserError(
            f"config: rollout.{name} = {rollout[name]}: what is trained is the whole distribution, "
            "not its truncation, so ratios would not start at 1; sample with rollout.temperature "
            "alone"
        )
    if loss.name == "policy_gradient" and updates > 1:
        raise UserError(
            f"config: loss.name = 'policy_gradient' has no ratio: of {updates} updates on the same "
            "samples all but the first would be biased; set train.epochs and train.minibatches to "
            "1, or loss.name = 'ppo'"
        )
    if rollout.max_staleness and updates - 1 > rollout.max_staleness:
        raise UserError(
            f"config: train.epochs x train.minibatches = {updates} updates would use samples up to "
            f"{updates - 1} updates old, over rollout.max_staleness = {rollout.max_staleness}"
        )
    if bool(loss.ptx_coefficient) != bool(config.data.ptx):
        raise UserError("config: loss.ptx_coefficient and data.ptx go together: set both or none")


def _try_objective(name: str, options: dict[str, Any]) -> None:
    """ValueError for options of a policy loss that it does not know or whose values are wrong."""
    check_policy_options(name, options)
    one = jnp.ones((1, 1))
    try:
        jax.eval_shape(lambda: policy_loss(name, one, one, one, one, **options))
    except TypeError as error:
        raise ValueError(f"loss.options of {name!r}: {error}") from error

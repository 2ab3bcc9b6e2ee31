"""Finds mistakes in a config before hours are spent on the parents.

A section's own fields are checked as it is made; here stands what several sections or the world
outside must agree on.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_jax.config import Config, section_document
from rlhf_jax.data.shapes import parse_columns
from rlhf_jax.devices import training_devices
from rlhf_jax.environments.libraries import LIBRARIES
from rlhf_jax.errors import UserError
from rlhf_jax.hub.chat_formats import chat_template
from rlhf_jax.hub.hub_data import check_hub_name
from rlhf_jax.models.fused_attention import check_kernel
from rlhf_jax.models.sharding import batch_shards
from rlhf_jax.own_code import check_bound
from rlhf_jax.rewards.costs import COSTS
from rlhf_jax.rewards.scorers import parse_rewards
from rlhf_jax.stages.defaults import FED_BACK, MOST_FED_BACK_SEED, SAMPLING
from rlhf_jax.tasks.builders import task_of
from rlhf_jax.tasks.sources import parse_source, parse_sources, read_records, split_sources
from rlhf_jax.training.meanings import is_less_better
from rlhf_jax.training.mesh import mesh_of
from rlhf_jax.training.optimizer import make_optimizer


def check(config: Config) -> None:
    """UserError for what can be seen to be wrong before hours are spent on the parents."""
    if config.stage == "oracle":  # whose rows have configs of their own
        return
    # JAX would drop the bits above 32, and NumPy takes no sign.
    most = MOST_FED_BACK_SEED if config.stage in FED_BACK else 2**32 - 1
    if not 0 <= config.seed <= most:
        raise UserError(f"config: seed = {config.seed}: choose one from 0 to {most}")
    updates = config.train.steps
    if config.stage in ("policy", "online_preference"):
        updates *= config.train.epochs * config.train.minibatches
    elif config.train.best and not config.train.eval_every:
        raise UserError("config: train.best needs evaluations on the way: set train.eval_every")
    elif config.train.epochs:
        updates = config.optimizer.warmup_steps + 1  # how many it will be, the data say
    if getattr(config.train, "best", ""):
        is_less_better(config.train.best)  # an error if that is not known
    make_optimizer(config.optimizer, updates)
    if config.critic is not None:
        make_optimizer(config.critic.optimizer(config.optimizer), updates)
    if getattr(config.data, "chat_template", ""):
        chat_template(config.data.chat_template)
    try:
        parse_columns(config.data.columns)
    except ValueError as error:
        raise UserError(f"config: {error}") from error
    _check_sources(config)
    if config.stage in SAMPLING:
        _check_sampling(config)
    if config.stage == "policy":
        check_objective(config)
        _check_costs(config)
    _check_environment(config)
    if config.feedback is not None and ".py:" in config.feedback.judge:
        check_bound(config.feedback.judge, "feedback.judge")
    if config.stage in FED_BACK and config.data.columns:
        raise UserError(
            f"config: data.columns: the {config.stage} stage reads its own file too, whose fields "
            "have their usual names; rename yours"
        )
    how = getattr(config.data, "labelers", "pooled")
    if how == "nuisance" and config.stage != "reward":
        raise UserError(
            "config: data.labelers = 'nuisance' is for reward models, which are asked without a "
            "labeler later; there are pooled, majority and weighted"
        )
    if how != "pooled" and config.loss.name == "pointwise":
        raise UserError(f"config: data.labelers = {how!r} is of votes on pairs: pointwise has none")
    if config.stage == "online_preference" and config.loss.name == "kto":
        raise UserError(
            "config: loss.name = 'kto' needs an answer to another prompt beside each pair, which "
            "online pairs lack; choose another loss"
        )


def check_devices(config: Config) -> None:
    """UserError for what the training devices cannot do: their mesh, its rows, its attention."""
    if config.stage == "oracle":  # whose rows have meshes of their own
        return
    mesh, batch = mesh_of(config), config.batch
    parts = batch.microbatches * batch_shards(mesh)
    if batch.rows % parts:
        raise UserError(
            f"config: batch.rows = {batch.rows} does not split into batch.microbatches = "
            f"{batch.microbatches} over {batch_shards(mesh)} devices (data x fsdp); the nearest "
            f"that does is {max(1, round(batch.rows / parts)) * parts}"
        )
    section = config.model if config.compute is None else config.compute
    check_kernel(section.attention, training_devices()[0].platform, config.data.row_length)


def _check_sources(config: Config) -> None:
    """UserError for a data set or file that does not exist, or weighs where nothing is mixed."""
    data, evaluation = config.data, config.eval
    alike = {
        "data.validation": data.validation,
        "data.ptx": getattr(data, "ptx", ""),
        "eval.source": getattr(evaluation, "source", ""),
    }
    for field, spec in alike.items():
        if spec and split_sources(spec) != [*parse_sources(spec)]:
            raise UserError(
                f"config: {field} = {spec!r}: its sources are read one after the other, and only "
                "those of data.train and data.replay have weights; name them without"
            )
    specs = [data.train, getattr(data, "replay", ""), *alike.values()]
    for source in (source for spec in specs if spec for source in parse_sources(spec)):
        parsed = parse_source(source)
        if parsed.is_hub:
            check_hub_name(parsed.name)
        elif not parsed.is_file:
            task_of(parsed.name)
        elif not Path(parsed.name).is_file():
            raise UserError(f"data: there is no file {parsed.name}")


def _check_sampling(config: Config) -> None:
    """UserError for sampling or rewards that a stage cannot follow."""
    rollout = config.rollout
    weights = parse_rewards(config.reward.scorers)
    for name in weights:
        if ".py:" in name:
            check_bound(name, "reward.scorers")
    named = [
        role for role, path in section_document(config, "init").items() if role != "policy" and path
    ]
    if "model" in weights and not named:
        raise UserError(
            "config: reward.scorers names a 'model', but there is no init.reward: name its run "
            "with --config.init.reward=…, or another reward with "
            "--config.reward.scorers=mine.py:function"
        )
    pair = 2 if config.stage == "online_preference" else 1
    longest = rollout.max_prompt_tokens + pair * rollout.max_new_tokens
    if longest > config.data.row_length:
        raise UserError(
            f"config: a prompt of rollout.max_prompt_tokens with {pair} answer(s) of "
            f"rollout.max_new_tokens has {longest} tokens, over data.row_length = "
            f"{config.data.row_length}"
        )


def _check_costs(config: Config) -> None:
    """UserError for a prompt to train on whose answers cannot be said to have the cost or not."""
    named = config.lagrange.cost
    for source in parse_sources(config.data.train) if named else ():
        for prompt in read_records(config, source, "prompt", "train"):
            try:
                COSTS[named](prompt, "")
            except UserError as error:
                raise UserError(f"config: lagrange.cost = {named!r}: {source}: {error}") from error


def _check_environment(config: Config) -> None:
    """UserError for an environment that is no file, and rewards of one that there is not."""
    named = config.environment.named if config.environment is not None else []
    if config.environment is not None:
        config.environment.find_python()
    for target in named:
        library, _, name = target.partition(":")
        if library in LIBRARIES and name:  # which its own process looks up
            continue
        file, _, name = target.rpartition(":")
        if not file.endswith(".py") or not name.isidentifier():
            raise UserError(
                f"config: environment names {target!r}: write mine.py:Name, or a library's, of "
                f"{', '.join(LIBRARIES)}, as library:name"
            )
        check_bound(target, "environment")
    scorers = parse_rewards(config.reward.scorers) if config.reward is not None else {}
    if "environment" in scorers and not named:
        raise UserError(
            "config: reward.scorers names 'environment', but there is none: name one with "
            "--config.environment=mine.py:Env"
        )
    if getattr(config.rollout, "given", "mask") == "train" and not named:
        raise UserError(
            "config: rollout.given = 'train' trains what an environment answers, but there is "
            "none: name one with --config.environment=mine.py:Env"
        )


def check_objective(config: Config) -> None:
    """UserError for what the sections of an on-policy config disagree on."""
    advantage, loss, samples = config.advantage, config.loss, config.rollout.samples
    updates = config.train.epochs * config.train.minibatches
    relative = advantage.baseline != "none" or advantage.scale == "group"
    if advantage.name == "gae" and config.critic is None:
        raise UserError(
            "config: advantage.name = 'gae' needs the section critic, which experiments/ppo.py has"
        )
    if advantage.name == "group" and samples < 2 and relative:
        raise UserError(
            f"config: rollout.samples = {samples}: a baseline over the samples of a prompt needs "
            "two or more of them"
        )
    answers = config.rollout.prompts * samples
    if config.kl.target and 5 * config.kl.horizon <= answers:
        raise UserError(
            f"config: kl.horizon = {config.kl.horizon:g} is a fifth of the {answers} answers of an "
            "iteration or less: the controller, which may take 0.2 x answers / horizon off the KL "
            "coefficient at once, would turn its sign; raise kl.horizon"
        )
    if config.lagrange.cost and config.rollout.filter_zero_std:
        raise UserError(
            "config: rollout.filter_zero_std leaves out prompts before lagrange.cost is charged, "
            "so answers that differ in their cost alone would teach nothing; set one of them"
        )
    if config.rollout.given == "train" and loss.importance != "none":
        raise UserError(
            f"config: loss.importance = {loss.importance!r} corrects for the sampler's log-probs, "
            "and what rollout.given = 'train' trains beside was never sampled; set one of them"
        )
    if advantage.name == "gae" and advantage.bootstrap and config.rollout.truncated == "mask":
        raise UserError(
            "config: advantage.bootstrap is of answers that were cut off, which rollout.truncated "
            "= 'mask' leaves out; set one of them"
        )
    if loss.name == "policy_gradient" and updates > 1:
        raise UserError(
            f"config: loss.name = 'policy_gradient' has no ratio: of {updates} updates on the same "
            "samples all but the first would be biased; set train.epochs and train.minibatches to "
            "1, or loss.name = 'ppo'"
        )
    if bool(loss.ptx_coefficient) != bool(config.data.ptx):
        raise UserError("config: loss.ptx_coefficient and data.ptx go together: set both or none")

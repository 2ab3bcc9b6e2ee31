"""The steps that a stage runs, lowered for devices that are not there, from shapes alone.

They are the functions that the stage calls, on batches of the shapes that it makes: rows without
padding, preferences of one pair a row (half of it the prompt), answers and prompts of the greatest
length. Left out are reading prompts before they are answered, and evaluations.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from rlhf_jax.config import Config, section_document
from rlhf_jax.data.batches import pad_rows
from rlhf_jax.data.packing import Arrays, Document, Group, pack_documents, pack_groups
from rlhf_jax.devices import ROWS, decoding_mesh, training_devices
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.row_passes import jitted_logprobs, rows_of
from rlhf_jax.hub.hf_config import read_config
from rlhf_jax.losses.cross_entropy import KEPT_LOGITS, PASSING_LOGITS
from rlhf_jax.models import init, transformer
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.lora import attach, param_count, quantize, split
from rlhf_jax.models.scoring import sequence_scores
from rlhf_jax.models.sharding import batch_shards, split_over
from rlhf_jax.rewards.scorers import parse_rewards
from rlhf_jax.rl.layout import SHORTEST, Rollout
from rlhf_jax.rl.on_policy import (
    make_trainer,
    policy_loss,
    trainable_rows,
    updates_per_iteration,
    value_loss,
)
from rlhf_jax.rl.rollouts import row_multiple, text_task, with_rows
from rlhf_jax.sampling import engine
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import Completion
from rlhf_jax.stages.chain import load_config
from rlhf_jax.stages.defaults import SAMPLING, module_of, resolve
from rlhf_jax.stages.reward import with_score_head
from rlhf_jax.tasks.prompts import PromptSet
from rlhf_jax.training.checkpoint import load_document
from rlhf_jax.training.learner import Learner, make_learner
from rlhf_jax.training.mesh import batch_sharding, mesh_of, shaped_at, shardings, step_tokens
from rlhf_jax.training.saved_model import Model, is_hub_directory

CHARACTERS = 256  # of a tokenizer of characters, whose number only its text tells


@dataclass(frozen=True)
class Step:
    """A compiled function that a stage calls.

    Attributes:
      name: what it does.
      lower: () → it, lowered.
      holds: kind → tree of all that lies on the devices meanwhile, its arguments among it.
      tokens: that a call works on, on all devices.
      flops: of a call, as `Model.flops_per_token` counts: attention's scores left out.
      attention: FLOPs of attention's scores on one device.
      kept, logits: bytes on one device, of what the forward pass keeps for the backward one as JAX
        traces it, and of the logits of a chunk.
      calls: in an update, or an iteration of a stage that samples.
    """

    name: str
    lower: Callable[[], Any]
    holds: Mapping[str, Any]
    tokens: int
    flops: float
    attention: float
    kept: int = 0
    logits: int = 0
    calls: float = 1


@dataclass(frozen=True)
class Site:
    """A config and where it would run."""

    config: Config
    mesh: Mesh | None = field(default=None)

    @cached_property
    def shape(self) -> ModelConfig:
        """The model's."""
        return model_shape(self.config)

    @cached_property
    def model(self) -> Model:
        """The model that the stage trains, as shapes."""
        adapter, key = self.config.adapter, jax.random.key(self.config.seed)

        def build(key: jax.Array) -> Any:
            params = init(self.shape, key)
            if adapter is None or not adapter.rank:
                return params
            return attach(quantize(params, adapter.base), adapter, key)

        params: Any = self.at(jax.eval_shape(build, key))
        adapted = adapter if adapter is not None and adapter.rank else None
        return Model(self.shape, params, None, adapter=adapted)  # type: ignore[arg-type]

    def at(self, tree: Any) -> Any:
        """The shapes of a tree that the parameters' rules place."""
        if self.mesh is None:
            alone = SingleDeviceSharding(training_devices()[0])
            return jax.tree.map(lambda leaf: shaped_at(leaf, alone), tree)
        return jax.tree.map(shaped_at, tree, shardings(self.mesh, tree))

    def rows(self, arrays: Arrays, count: int) -> dict[str, Any]:
        """The shapes of a batch of so many of the rows."""
        alone = SingleDeviceSharding(training_devices()[0])
        place = alone if self.mesh is None else batch_sharding(self.mesh)
        shapes = {k: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype) for k, x in arrays.items()}
        return jax.tree.map(lambda leaf: shaped_at(leaf, place), shapes)

    def attention(self, rows: float, passes: float = 1) -> float:
        """FLOPs of the scores of causal attention on one device, in so many forward passes."""
        shape, length = self.shape, self.config.data.row_length
        each = 2 * length**2 * shape.heads * shape.head_dim * shape.layers
        return passes * each * rows / (1 if self.mesh is None else self.mesh.size)


def model_shape(config: Config) -> ModelConfig:
    """The shape of the model that a stage trains, from its fields or from what it starts from.

    That is a Hugging Face directory's config.json, a finished run's, or what the experiment that
    it names would train. A vocabulary that a run would train is as large as it asks for; one of
    characters is said to have `CHARACTERS`.
    """
    if config.stage == "pretrain":
        vocabulary = config.tokenizer
        if vocabulary.kind == "bpe":
            return config.model.model(vocabulary.vocab_size)
        print(f"tokenizer.kind = {vocabulary.kind}: {CHARACTERS} characters are assumed")
        return config.model.model(CHARACTERS)
    if config.stage == "oracle":
        raise UserError("the oracle's models are made for CPUs: there is nothing to plan")
    start = config.init.policy
    if not start:
        raise UserError("config: init.policy is empty; set --config.init.policy=/path/to/model")
    if ".py" in start:
        shape = model_shape(resolve(load_config(start)))
    elif is_hub_directory(start):
        shape = read_config(Path(start))[1]
    else:
        fields = load_document(Path(start) / "model")["config"]
        shape = ModelConfig(**fields | {"attention": "reference"})
    head = "scalar" if config.stage == "reward" else "lm"
    return dataclasses.replace(shape, head=head, **dataclasses.asdict(config.compute)).validate()


def steps_of(config: Config) -> list[Step]:
    """The steps of a config's stage on the training devices."""
    site = Site(config, mesh_of(config))
    if config.stage == "policy":
        return _policy(site)
    learner, loss, model = _learner(site), _loss(site), site.model
    state = site.at(learner.init())
    holds = _trained(state, model.params)
    batch = site.rows(*_batch(site))
    steps = [_update(site, "update", learner, loss, state, batch, holds, updates_per(config))]
    beside = _reward_models(site)
    if config.stage == "preference" and config.train.eval_every:
        beside["other models"] = split(model.params)[0]
    steps[0] = dataclasses.replace(steps[0], holds=steps[0].holds | beside)
    if config.stage in ("preference", "online_preference"):
        before = holds | beside if config.stage != "preference" else {"parameters": model.params}
        steps.append(_reference(site, before))
    if config.stage in SAMPLING:
        steps += _sampling(site, model.params, holds | beside)
    return steps


def updates_per(config: Config) -> int:
    """Updates of a step of the training loop."""
    sampled = config.stage in ("policy", "online_preference")
    return updates_per_iteration(config) if sampled else 1


def _loss(site: Site) -> Callable:
    module = importlib.import_module(module_of(site.config.stage))
    return partial(module.loss, site.config, site.shape)


def _learner(site: Site) -> Learner:
    config = site.config
    return make_learner(
        config,
        config.optimizer,
        site.model.params,
        _loss(site),
        updates=config.train.steps * updates_per(config),
        mesh=site.mesh,
        ema_decay=getattr(config.train, "ema_decay", 0.0),
    )


def _trained(state: Any, params: Any) -> dict[str, Any]:
    return {
        "parameters": (state.params, split(params)[1]),
        "optimizer": (state.opt_state, state.ema_params),
    }


def _batch(site: Site) -> tuple[Arrays, int]:
    """(example rows, how many a batch has) of a stage that trains on what it is given."""
    config, length = site.config, site.config.data.row_length
    if config.stage in ("pretrain", "sft", "best_of_n"):
        whole = Document([1] * length, [0] + [1] * (length - 1))
        return pack_documents([whole], length)[0], config.batch.rows
    if config.stage == "online_preference":
        options, most = config.rollout, max(1, length // (2 * SHORTEST))
        answer, prompt = [1] * options.max_new_tokens, [1] * options.max_prompt_tokens
        groups = [Group(prompt, (answer, answer), i) for i in range(options.prompts)]
        rows, _ = pack_groups(groups, length, branches=2, most=most)
        multiple = row_multiple(config, site.mesh)
        count = -(-len(rows["valid"]) // multiple) * multiple // config.train.minibatches
    else:
        kto, most, count = config.loss.name == "kto", 1, config.batch.rows
        branches = 1 if config.loss.name == "pointwise" else 2 + kto
        answer = [1] * (length // 2 // branches)
        prompt = [1] * (length - branches * len(answer))
        rows, _ = pack_groups([Group(prompt, (answer,) * branches, 0)], length, branches=branches)
    rows = pad_rows(rows, rows=1, slots=length, groups=most)
    rows["reference_logprobs"] = np.zeros(rows["last"].shape, np.float32)
    if config.loss.name == "pointwise":
        rows["labels"] = np.zeros(rows["last"].shape, np.float32)
    return rows, count


def _update(
    site: Site,
    name: str,
    learner: Learner,
    loss: Callable,
    state: Any,
    batch: Mapping[str, Any],
    holds: Mapping[str, Any],
    calls: int,
) -> Step:
    config, shape = site.config, site.shape
    rows, length = batch["tokens"].shape
    tokens = rows * length
    parts = config.batch.microbatches * batch_shards(site.mesh)
    scored = config.stage == "reward" or name.endswith("critic")
    summed = config.stage in ("pretrain", "sft", "best_of_n")
    chunk = max(512, PASSING_LOGITS // shape.vocab_size)
    if not summed:
        chunk = max(1024, KEPT_LOGITS // shape.vocab_size)
    part = {k: jax.ShapeDtypeStruct((rows // config.batch.microbatches, *x.shape[1:]), x.dtype)
            for k, x in batch.items()}  # fmt: skip
    params = learner.params(state)
    return Step(
        name,
        partial(_lowered, learner.step, state, batch),
        {**holds, "batch": batch},
        tokens,
        Model(shape, params, None, adapter=site.model.adapter).flops_per_token() * tokens,  # type: ignore[arg-type]
        # The backward pass has five products of a score's size, the forward pass two.
        site.attention(rows, 3.5 + (shape.remat == "full")),
        _kept(split_over(site.mesh, loss), params, part) // batch_shards(site.mesh),
        0 if scored else 4 * shape.vocab_size * min(chunk, tokens // parts),
        calls,
    )


def _lowered(function: Any, *arguments: Any) -> Any:
    """What a jitted function, or a partial of one, is lowered to."""
    if isinstance(function, partial):
        return function.func.lower(*function.args, *arguments, **function.keywords)
    return function.lower(*arguments)


def _kept(loss: Callable, params: Any, batch: Mapping[str, Any]) -> int:
    """Bytes that the backward pass of a loss finds beside the parameters and the batch."""

    def backward(params: Any, batch: Any) -> Any:
        rng = jax.random.key(0)
        trained, frozen = split(params)

        def total(trained: Any) -> jax.Array:
            (total, _), *_ = loss(transformer_params(trained, frozen), batch, rng)
            return total

        return jax.tree.leaves(jax.vjp(total, trained)[1])

    from rlhf_jax.models.lora import combine as transformer_params

    jaxpr = jax.make_jaxpr(backward)(params, batch).jaxpr
    given = {id(x) for x in jaxpr.invars}
    found = {id(x): x.aval for x in jaxpr.outvars if id(x) not in given}
    return sum(x.size * x.dtype.itemsize for x in found.values())  # type: ignore[attr-defined]


def _pass_flops(site: Site, params: Any, tokens: int) -> float:
    return 2.0 * param_count(params) * tokens


def _reference(site: Site, holds: Mapping[str, Any]) -> Step:
    """The reference's log-probs of as many rows as go through it together."""
    arrays, _ = _batch(site)
    return _row_pass(
        site, "reference", partial(jitted_logprobs.lower, site.shape.forward), site.model.params,
        arrays, holds,
    )  # fmt: skip


def _row_pass(
    site: Site, name: str, lower: Callable, params: Any, arrays: Arrays, holds: Mapping[str, Any]
) -> Step:
    length = site.config.data.row_length
    rows = rows_of(step_tokens(site.config), length) * batch_shards(site.mesh)
    batch = site.rows(arrays, rows)

    def lowered() -> Any:
        if site.mesh is None:
            return lower(params, batch)
        with jax.set_mesh(site.mesh):
            return lower(params, batch)

    tokens = rows * length
    chunk = max(1024, KEPT_LOGITS // site.shape.vocab_size)
    return Step(
        name,
        lowered,
        {**holds, "batch": batch},
        tokens,
        _pass_flops(site, params, tokens),
        site.attention(rows),
        logits=4 * site.shape.vocab_size * min(chunk, tokens // batch_shards(site.mesh)),
    )


def _reward_models(site: Site) -> dict[str, Any]:
    """The reward models that score a stage's answers; several are held twice, also stacked."""
    count = _members(site.config)
    if not count:
        return {}
    one = site.at(jax.eval_shape(partial(init, _scalar(site)), jax.random.key(0)))
    return {"other models": [one] * (1 if count == 1 else 2 * count)}


def _members(config: Config) -> int:
    if config.stage not in SAMPLING or "model" not in parse_rewards(config.reward.scorers):
        return 0
    named = section_document(config, "init").items()
    return max(1, sum(role.startswith("reward") and bool(path) for role, path in named))


def _scalar(site: Site) -> ModelConfig:
    return dataclasses.replace(site.shape, head="scalar")


def _policy(site: Site) -> list[Step]:
    """Those of an iteration of on-policy training."""
    config, model, mesh = site.config, site.model, site.mesh
    texts = [_text_rows(config)] if config.loss.ptx_coefficient else None
    task = text_task(config, model, None, mesh, texts)  # type: ignore[arg-type]
    critic = None
    if task.values is not None:  # a reward model's body or the policy's, which have one shape
        critic = site.at(with_score_head(model, config.seed).params)
    trainer = make_trainer(config, task, model.params, critic, mesh=mesh)
    state = site.at(trainer.policy.init())
    others = [split(model.params)[0], *_reward_models(site).get("other models", [])]
    valued = None
    if trainer.critic is not None:
        valued = site.at(trainer.critic.init())
        others += [valued.params, valued.opt_state]
    holds = {**_trained(state, model.params), "other models": others}
    rows, scored = _rollout(site)
    updates = updates_per_iteration(config)
    size = len(scored["members"]) // config.train.minibatches
    own = updates > 1 or config.kl.placement == "reward"
    if not own:
        del scored["old_logprobs"]
    extra = task.extra_rows(0) if task.extra_rows is not None else {}
    batch = site.rows(scored, size) | site.rows(extra, config.batch.rows)
    loss = partial(policy_loss, config, task, config.loss.objective)
    steps = [_update(site, "update", trainer.policy, loss, state, batch, holds, updates)]
    if trainer.critic is not None:
        of_value = partial(value_loss, config, task)
        steps.append(
            _update(site, "update of the critic", trainer.critic, of_value, valued, batch, holds,
                    updates)
        )  # fmt: skip
    params = trainer.policy.params(state)
    part = site.rows(rows, size)
    tokens = math.prod(part["tokens"].shape)
    models = [params, model.params] if own else [model.params]
    flops = sum(_pass_flops(site, each, tokens) for each in models)
    chunk = max(1024, KEPT_LOGITS // site.shape.vocab_size)
    score = partial(trainer.score_rows.lower, params if own else None, model.params, part)  # type: ignore[attr-defined]
    steps.append(
        Step(
            "scoring", score, {**holds, "batch": part}, tokens, flops,
            site.attention(size, len(models)),
            logits=4 * site.shape.vocab_size * min(chunk, tokens // batch_shards(mesh)),
            calls=config.train.minibatches,
        )
    )  # fmt: skip
    if trainer.critic is not None:
        critic_params = trainer.critic.params(valued)
        steps.append(
            Step(
                "values", partial(trainer.value_rows.lower, critic_params, part),  # type: ignore[attr-defined]
                {**holds, "batch": part}, tokens, _pass_flops(site, critic_params, tokens),
                site.attention(size), calls=config.train.minibatches,
            )
        )  # fmt: skip
    return steps + _sampling(site, params, holds, rows)


def _text_rows(config: Config) -> Arrays:
    length = config.data.row_length
    return pack_documents([Document([1] * length, [0] + [1] * (length - 1))], length)[0]


def _rollout(site: Site) -> tuple[Arrays, Arrays]:
    """(rows of an iteration's answers, the same with what a loss reads of them)."""
    config, options = site.config, site.config.rollout
    limit = options.max_new_tokens
    answer = Completion([1] * limit, np.zeros(limit, np.float32), True)
    prompts = PromptSet([None] * options.prompts, [[1] * options.max_prompt_tokens] * options.prompts)  # type: ignore[list-item]
    answers = [answer] * (options.prompts * options.samples)
    rollout = Rollout.of(prompts, answers, [""] * len(answers), limit)
    rollout = with_rows(config, rollout, row_multiple(config, site.mesh))
    names = ["old_logprobs", "ref_logprobs", "advantages", "returns"]
    names += ["old_values"] if config.critic is not None else []
    values: dict[str, Any] = dict.fromkeys(names, np.zeros_like(rollout.mask))
    made = dataclasses.replace(rollout, weights=np.ones(len(answers), np.float32), **values)
    return rollout.rows, trainable_rows(made, 0.0)


def _sampling(
    site: Site, params: Any, holds: Mapping[str, Any], rows: Arrays | None = None
) -> list[Step]:
    """What it takes to answer prompts and to have reward models score the answers."""
    steps, config = [], site.config
    answers = config.rollout.slots
    if config.stage != "best_of_n":
        answers = config.rollout.prompts * config.rollout.samples
    if count := _members(config):
        reward = site.at(jax.eval_shape(partial(init, _scalar(site)), jax.random.key(0)))
        lower = jax.jit(partial(sequence_scores, _scalar(site))).lower
        arrays = rows if rows is not None else _batch(dataclasses.replace(site))[0]
        if "last" in arrays:
            each = _row_pass(site, "reward model", lower, reward, arrays, holds)
            total = len(arrays["tokens"]) * config.data.row_length
            calls = count * max(1.0, total / each.tokens)
            steps.append(dataclasses.replace(each, calls=calls, logits=0))
    decode = _decode(site, params, holds)
    rounds = -(-answers // config.rollout.slots) * config.rollout.max_new_tokens
    return [*steps, dataclasses.replace(decode, calls=rounds)]


def _decode(site: Site, params: Any, holds: Mapping[str, Any]) -> Step:
    """A token of every slot, by `engine.advance`."""
    options, shape = site.config.rollout, site.shape.forward
    sampling = Sampling(options.max_new_tokens, options.temperature)
    drawing = engine.Drawing.of(sampling, None, np.zeros(shape.vocab_size, bool))
    mesh = decoding_mesh(params, options.slots)
    whole = all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))
    made = transformer._decoding_params.lower(shape, params, whole)
    places = made.compile().output_shardings
    if mesh is not None:
        places = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), places)
    copy = jax.tree.map(shaped_at, made.out_info, places)
    length = options.max_prompt_tokens + options.max_new_tokens
    empty = partial(engine.empty, shape, options.slots, length, False, mesh)
    place: Any = SingleDeviceSharding(training_devices()[0])
    if mesh is not None:
        place = NamedSharding(mesh, PartitionSpec(ROWS))
    elif site.mesh is not None:
        place = NamedSharding(site.mesh, PartitionSpec())
    slots = jax.tree.map(lambda leaf: shaped_at(leaf, place), jax.eval_shape(empty))
    live = shaped_at(jnp.zeros(options.slots, bool), place)
    return Step(
        "decode a token",
        partial(engine.advance.lower, shape, copy, slots, drawing, live, 0, 2**30, mesh),  # type: ignore[attr-defined]
        {**holds, "decoding weights": copy, "cache": slots},
        options.slots,
        _pass_flops(site, params, options.slots),
        0.0,
        logits=4 * shape.vocab_size * options.slots // (1 if mesh is None else mesh.size),
    )


def device_bytes(tree: Any) -> int:
    """Bytes of a tree on one of the devices that it lies on."""
    leaves: Sequence[Any] = jax.tree.leaves(tree)
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * jax.dtypes.itemsize_bits(x.dtype) // 8
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        else 8 * math.prod(x.sharding.shard_shape(x.shape))
        for x in leaves
    )

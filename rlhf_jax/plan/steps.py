"""The steps that a stage runs, lowered for devices that are not there, from shapes alone.

They are the functions that the stage calls, on batches of the shapes that it makes: rows without
padding, one pair a row (half of it the prompt), prompts and answers of the greatest length. Left
out are reading prompts before they are answered, and evaluations.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from rlhf_jax.config import Config, section_document
from rlhf_jax.data.batches import pad_rows
from rlhf_jax.data.packing import Arrays, Document, Group, pack_documents, pack_groups
from rlhf_jax.devices import decoding_mesh, training_devices
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.row_passes import rows_of
from rlhf_jax.hub.hf_config import read_config
from rlhf_jax.losses.cross_entropy import KEPT_LOGITS, PASSING_LOGITS
from rlhf_jax.models import init, transformer
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.lora import attach, combine, param_count, quantize, split
from rlhf_jax.models.scoring import sequence_logprobs, sequence_scores
from rlhf_jax.models.sharding import batch_shards, split_over, without_fsdp
from rlhf_jax.rewards.scorers import parse_rewards
from rlhf_jax.rl import on_policy
from rlhf_jax.rl.layout import Rollout
from rlhf_jax.rl.rollouts import row_multiple, text_task, with_rows
from rlhf_jax.sampling import engine
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import Completion
from rlhf_jax.stages.best_of_n import BLOCK
from rlhf_jax.stages.chain import load_config
from rlhf_jax.stages.defaults import FED_BACK, SAMPLING, module_of, resolve
from rlhf_jax.stages.experiments import find_experiment, names_experiment
from rlhf_jax.stages.online_preference import pack_best_and_worst
from rlhf_jax.stages.reward import with_score_head
from rlhf_jax.tasks.prompts import PromptSet
from rlhf_jax.training.checkpoint import load_document
from rlhf_jax.training.learner import Learner, make_learner
from rlhf_jax.training.mesh import (
    batch_sharding,
    check_width,
    mesh_of,
    shaped_at,
    shardings,
    step_tokens,
)
from rlhf_jax.training.saved_model import Model, is_hub_directory

CHARACTERS = 256  # of a tokenizer of characters, whose number only its text tells
TEXT = ("pretrain", "sft", "best_of_n")  # stages that train on every token of a row
PASSES = 3.5  # of attention's scores in an update: two products forwards, five backwards


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
      logits, kept: bytes on one device, of the logits of a chunk, and of what the forward pass
        keeps for the backward one, as JAX traces it.
      calls: in an update, or an iteration of a stage that samples.
      passes: of a loop that ends by what it computes.
    """

    name: str
    lower: Callable[[], Any]
    holds: Mapping[str, Any]
    tokens: int
    flops: float
    attention: float
    logits: int
    calls: float
    kept: int = 0
    passes: int = 1


def model_shape(config: Config, source: str = "") -> ModelConfig:
    """The shape of the model that a stage trains, from its fields or from what it starts from.

    That is a Hugging Face directory's config.json, a finished run's, or what the experiment that
    is named would train. A vocabulary that a run would train is as large as it asks for; one of
    characters is taken to have `CHARACTERS`. `source` is the file that the config is from, beside
    which an experiment is looked for.
    """
    if config.stage == "oracle":
        raise UserError("the oracle's models are made for CPUs: there is nothing to plan")
    if config.stage in FED_BACK:
        raise UserError(f"{config.stage} trains as {config.stage.removeprefix('ai_')}: plan that")
    if config.stage == "pretrain":
        words = CHARACTERS if config.tokenizer.kind == "chars" else config.tokenizer.vocab_size
        print(f"vocabulary: {words} tokens, of a tokenizer that is not trained yet", flush=True)
        return config.model.model(words)
    start = config.init.policy
    if not start:
        raise UserError("config: init.policy is empty; set --config.init.policy=/path/to/model")
    head = "scalar" if config.stage == "reward" else "lm"
    return _computed(config, _shape_in(start, source), head)


def _shape_in(start: str, source: str = "") -> ModelConfig:
    """The shape of the model that a section init names."""
    if names_experiment(start):
        found = find_experiment(start, source)
        return model_shape(resolve(load_config(found)), found)
    if is_hub_directory(start):
        return read_config(Path(start))[1]
    fields = load_document(Path(start) / "model")["config"]
    return ModelConfig(**fields | {"attention": "reference"})


def _computed(config: Config, shape: ModelConfig, head: str) -> ModelConfig:
    """The shape under a head, computed as the config says."""
    return dataclasses.replace(shape, head=head, **dataclasses.asdict(config.compute)).validate()


def judge_shape(config: Config, policy: ModelConfig) -> ModelConfig | None:
    """The shape of the reward models that score a stage's answers; None if there are none.

    The models of an ensemble have one. Where none is named yet it is taken to be the policy's.
    """
    if config.stage not in SAMPLING or "model" not in parse_rewards(config.reward.scorers):
        return None
    if named := _reward_paths(config):
        return _computed(config, _shape_in(named[0]), "scalar")
    print("reward model: none is named, so it is taken to have the policy's shape", flush=True)
    return dataclasses.replace(policy, head="scalar")


def _reward_paths(config: Config) -> list[str]:
    named = section_document(config, "init").items()
    return [path for role, path in named if role.startswith("reward") and path]


def steps_of(config: Config) -> list[Step]:
    """The steps of a config's stage on the training devices."""
    shape = model_shape(config)
    check_width(config, shape.width)
    site = _Site(config, shape, judge_shape(config, shape), mesh_of(config))
    return _on_policy(site) if config.stage == "policy" else _by_loss(site)


@dataclass(frozen=True)
class _Site:
    """A config, the model of which it is, what judges its answers and where it would run."""

    config: Config
    shape: ModelConfig
    judge: ModelConfig | None
    mesh: Mesh | None

    def alone(self) -> SingleDeviceSharding:
        return SingleDeviceSharding(training_devices()[0])

    def at(self, tree: Any) -> Any:
        """The shapes of a tree, placed by the rules of parameters."""
        if self.mesh is None:
            return jax.tree.map(lambda leaf: shaped_at(leaf, self.alone()), tree)
        return jax.tree.map(shaped_at, tree, shardings(self.mesh, tree))

    def rows(self, arrays: Arrays, count: int) -> dict[str, Any]:
        """The shapes of a batch of so many rows."""
        place = self.alone() if self.mesh is None else batch_sharding(self.mesh)
        each = {k: np.broadcast_to(x[:1], (count, *x.shape[1:])) for k, x in arrays.items()}
        return {name: shaped_at(array, place) for name, array in each.items()}

    def model(self) -> Model:
        """The model that the stage trains."""
        adapter = self.config.adapter
        adapter = adapter if adapter is not None and adapter.rank else None

        def build(key: jax.Array) -> Any:
            params = init(self.shape, key)
            return attach(quantize(params, adapter.base), adapter, key) if adapter else params

        params = self.at(jax.eval_shape(build, jax.random.key(0)))
        return Model(self.shape, params, None, adapter=adapter)  # type: ignore[arg-type]

    def attention(self, rows: int, passes: float) -> float:
        """FLOPs of the scores of causal attention on one device."""
        shape, length = self.shape, self.config.data.row_length
        each = 2 * length**2 * shape.heads * shape.head_dim * shape.layers
        return passes * each * rows / (1 if self.mesh is None else self.mesh.size)

    def logits(self, tokens: int, numbers: int = KEPT_LOGITS, least: int = 1024) -> int:
        """Bytes of a chunk's logits on one device, of a pass over so many tokens of all."""
        words, mine = self.shape.vocab_size, tokens // batch_shards(self.mesh)
        return 4 * words * min(max(least, numbers // words), mine)

    def pass_size(self) -> int:
        """Rows that are scored together, where it isn't by minibatches."""
        rows = rows_of(step_tokens(self.config), self.config.data.row_length)
        return rows * batch_shards(self.mesh)


def _by_loss(site: _Site) -> list[Step]:
    """The steps of a stage that has a loss of its own."""
    config, model = site.config, site.model()
    sampled = config.stage == "online_preference"
    calls = on_policy.updates_per_iteration(config) if sampled else 1
    loss = partial(importlib.import_module(module_of(config.stage)).loss, config, site.shape)
    learner = make_learner(
        *(config, config.optimizer, model.params, loss),
        updates=config.train.steps * calls,
        mesh=site.mesh,
        ema_decay=getattr(config.train, "ema_decay", 0.0),
    )
    answers = _answers(site) if config.stage in SAMPLING else None
    rows, size = _rows(site, answers)
    state = site.at(learner.init())
    holds = _trained(state, model.params)
    if others := _reward_models(site):
        holds["other models"] = others
    if config.stage == "preference" and config.train.eval_every and config.eval.during:
        holds["other models"] = split(model.params)[0]  # the start is kept, for its KL
    batch = site.rows(rows, size)
    steps = [_update(site, "update", learner, loss, state, batch, holds, calls)]
    if "reference_logprobs" in rows:
        before = holds if sampled else {"parameters": model.params}
        function, count = partial(sequence_logprobs, site.shape.forward), calls * size
        steps.append(_pass(site, "reference", function, [model.params], rows, before, count))
    if answers is not None:
        steps += _sampling(site, learner.params(state), holds, answers)
    return steps


def _on_policy(site: _Site) -> list[Step]:
    """The steps of an iteration of on-policy training."""
    config, model = site.config, site.model()
    texts = [_text(config)] if config.loss.ptx_coefficient else None
    task: Any = text_task(config, model, None, site.mesh, texts)  # type: ignore[arg-type]
    critic: Any = None
    if task.values is not None:  # begins as a reward model's body or the policy's: one shape
        critic = site.at(with_score_head(model, config.seed).params)
    trainer = on_policy.make_trainer(config, task, model.params, critic, mesh=site.mesh)
    state, reference = site.at(trainer.policy.init()), trainer.reference
    holds = _trained(state, model.params)
    others = [split(reference)[0], *_reward_models(site)]
    updates, size = on_policy.updates_per_iteration(config), config.train.minibatches
    answers = _answers(site)
    count = len(answers.rows["members"])
    own = updates > 1 or config.kl.placement == "reward"
    if not own:
        answers = dataclasses.replace(answers, old_logprobs=None)
    batch = site.rows(on_policy.trainable_rows(answers, 0.0), count // size)
    if task.extra_rows is not None:
        batch |= site.rows(task.extra_rows(0), config.batch.rows)
    loss = partial(on_policy.policy_loss, config, task, config.loss.objective)
    steps = []
    if trainer.critic is not None:
        valued = site.at(trainer.critic.init())
        others += [valued.params, valued.opt_state]
        holds["other models"] = others
        of_value = partial(on_policy.value_loss, config, task)
        critic = trainer.critic.params(valued)
        more = site, "update of the critic", trainer.critic, of_value, valued, batch, holds, updates
        steps.append(_update(*more))
        of_rows = trainer.value_rows
        steps.append(_pass(site, "values", of_rows, [critic], answers.rows, holds, count, size))
    holds["other models"] = others
    steps.insert(0, _update(site, "update", trainer.policy, loss, state, batch, holds, updates))
    params = trainer.policy.params(state)
    score = trainer.score_rows if own else partial(trainer.score_rows, None)
    models = [params, reference] if own else [reference]
    steps.append(_pass(site, "scoring", score, models, answers.rows, holds, count, size))
    return steps + _sampling(site, params, holds, answers)


def _trained(state: Any, params: Any) -> dict[str, Any]:
    return {
        "parameters": (state.params, split(params)[1]),
        "optimizer": (state.opt_state, state.ema_params),
    }


def _text(config: Config) -> Arrays:
    length = config.data.row_length
    return pack_documents([Document([1] * length, [0] + [1] * (length - 1))], length)[0]


def _rows(site: _Site, answers: Rollout | None) -> tuple[Arrays, int]:
    """(rows that a stage with a loss trains on, how many an update has)."""
    config, length, count = site.config, site.config.data.row_length, site.config.batch.rows
    if config.stage in TEXT:
        return _text(config), count
    if config.stage == "online_preference":
        assert answers is not None
        rows, _ = pack_best_and_worst(config, answers, row_multiple(config, site.mesh))
        count = len(rows["valid"]) // config.train.minibatches
    else:
        branches = {"pointwise": 1, "kto": 3}.get(config.loss.name, 2)
        answer = (1,) * (length // 2 // branches)
        prompt = (1,) * (length - branches * len(answer))
        rows, _ = pack_groups([Group(prompt, (answer,) * branches, 0)], length, branches=branches)
        rows = pad_rows(rows, rows=1, slots=length, groups=1)
    of_sequences = np.zeros(rows["last"].shape, np.float32)
    if config.stage != "reward":
        rows["reference_logprobs"] = of_sequences
    elif config.loss.name == "pointwise":
        rows["labels"] = of_sequences
    return rows, count


def _answers(site: _Site) -> Rollout:
    """The scored answers of an iteration, or a block of best-of-n, all of the greatest length."""
    config, options = site.config, site.config.rollout
    limit, best = options.max_new_tokens, config.stage == "best_of_n"
    prompts, each = (BLOCK, config.best_of_n.n) if best else (options.prompts, options.samples)
    asked = PromptSet([None] * prompts, [[1] * options.max_prompt_tokens] * prompts)  # type: ignore[list-item]
    completions = [
        Completion([1 + i % each] * limit, np.zeros(limit, np.float32), True)
        for i in range(prompts * each)
    ]
    rollout = Rollout.of(asked, completions, [""] * len(completions), limit)
    multiple = site.pass_size() if best else row_multiple(config, site.mesh)
    rollout = with_rows(config, rollout, multiple)
    names = ["old_logprobs", "ref_logprobs", "advantages", "returns"]
    names += ["old_values"] if config.critic is not None else []
    values: dict[str, Any] = dict.fromkeys(names, np.zeros_like(rollout.mask))
    scores = np.arange(len(completions), dtype=np.float32)
    return dataclasses.replace(rollout, scores=scores, weights=np.ones_like(scores), **values)


def _update(
    site: _Site,
    name: str,
    learner: Learner,
    loss: Callable,
    state: Any,
    batch: Mapping[str, Any],
    holds: Mapping[str, Any],
    calls: int,
) -> Step:
    params, parts = learner.params(state), site.config.batch.microbatches
    rows, length = batch["tokens"].shape
    tokens = rows * length
    logits = site.logits(tokens // parts)
    if site.config.stage in TEXT:
        logits = site.logits(tokens // parts, PASSING_LOGITS, 512)
    model = dataclasses.replace(site.model(), params=params)
    part = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0] // parts, *x.shape[1:]), x.dtype), batch
    )
    return Step(
        name,
        partial(_lowered, learner.step, state, batch),
        {**holds, "batch": batch},
        tokens,
        model.flops_per_token() * tokens,
        site.attention(rows, PASSES + (site.shape.remat == "full")),
        0 if "score_head" in params else logits,
        calls,
        _kept(split_over(site.mesh, loss), params, part) // batch_shards(site.mesh),
    )


def _lowered(function: Any, *arguments: Any) -> Any:
    """What a jitted function, or one under an adapter, is lowered to."""
    frozen: dict[str, Any] = {}
    if isinstance(function, partial):
        function, frozen = function.func, function.keywords
    return function.lower(*arguments, **frozen)


def _kept(loss: Callable, params: Any, batch: Mapping[str, Any]) -> int:
    """Bytes that the backward pass of a loss finds beside the parameters and the batch."""

    def residuals(params: Any, batch: Any) -> Any:
        trained, frozen = split(params)

        def total(trained: Any) -> jax.Array:
            (total, _), *_ = loss(combine(trained, frozen), batch, jax.random.key(0))
            return total

        return jax.tree.leaves(jax.vjp(total, trained)[1])

    traced = jax.make_jaxpr(residuals)(params, batch).jaxpr
    given = {id(each) for each in traced.invars}
    found: Any = {id(each): each.aval for each in traced.outvars if id(each) not in given}
    return sum(each.size * each.dtype.itemsize for each in found.values())


def _pass(
    site: _Site,
    name: str,
    function: Callable,
    models: Sequence[Any],
    rows: Arrays,
    holds: Mapping[str, Any],
    count: int,
    parts: int = 0,
) -> Step:
    """A pass of models over `count` rows, in so many `parts`, or as many rows as go together."""
    size = count // parts if parts else site.pass_size()
    batch, tokens = site.rows(rows, size), size * rows["tokens"].shape[1]
    scores = any("score_head" in params for params in models)
    return Step(
        name,
        partial(_lowered, jax.jit(split_over(site.mesh, function)), *models, batch),
        {**holds, "batch": batch},
        tokens,
        sum(2.0 * param_count(params) * tokens for params in models),
        site.attention(size, len(models)),
        0 if scores else site.logits(tokens),
        count / size,
    )


def _reward_models(site: _Site) -> list[Any]:
    """The reward models that score a stage's answers; several are held twice, also stacked."""
    if site.judge is None:
        return []
    count = max(1, len(_reward_paths(site.config)))
    one = site.at(jax.eval_shape(partial(init, site.judge), jax.random.key(0)))
    return [one] * (1 if count == 1 else 2 * count)


def _sampling(site: _Site, params: Any, holds: Mapping[str, Any], answers: Rollout) -> list[Step]:
    """What it takes to answer prompts, and to have reward models score the answers."""
    options, steps = site.config.rollout, []
    if site.judge is not None:
        judges = _reward_models(site)
        rows = {k: x for k, x in answers.rows.items() if k not in ("members", "slots", "mask")}
        function = partial(sequence_scores, site.judge)
        each = (len(judges) + 1) // 2  # reward models
        count = len(rows["tokens"]) * each
        judged = dataclasses.replace(site, shape=site.judge)
        steps.append(_pass(judged, "reward model", function, judges[:1], rows, holds, count))
    rounds = -(-len(answers.completions) // options.slots)
    return [*steps, _decode(site, params, holds, rounds)]


def _decode(site: _Site, params: Any, holds: Mapping[str, Any], calls: int) -> Step:
    """A whole answer in every slot, by one call of `engine.advance`."""
    options, shape = site.config.rollout, site.shape.forward
    mesh = decoding_mesh(params, options.slots)
    places = tuple(without_fsdp(leaf.sharding) for leaf in jax.tree.leaves(params))
    copy = _results(transformer.lay_out_for_decoding.lower(shape, params, places))
    length = options.max_prompt_tokens + options.max_new_tokens
    empty = engine.empty.lower(shape, options.slots, length, False, mesh)
    slots = (
        _results(empty)
        if mesh
        else jax.tree.map(partial(shaped_at, place=site.alone()), empty.out_info)
    )
    sampling = Sampling(options.max_new_tokens, options.temperature)
    drawing = engine.Drawing.of(sampling, None, np.zeros(shape.vocab_size, bool))
    live = slots.active
    advance: Any = engine.advance
    return Step(
        f"decode {options.max_new_tokens} tokens",
        partial(advance.lower, shape, copy, slots, drawing, live, 0, 2**30, mesh),
        {**holds, "decoding weights": copy, "cache": slots},
        options.slots * options.max_new_tokens,
        2.0 * param_count(params) * options.slots * options.max_new_tokens,
        0.0,
        4 * shape.vocab_size * options.slots // batch_shards(mesh),
        calls,
        passes=options.max_new_tokens,
    )


def _results(lowered: Any) -> Any:
    """The shapes of a function's results, placed as its compiler puts them."""
    return jax.tree.map(shaped_at, lowered.out_info, lowered.compile().output_shardings)


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of shapes on one of the devices that each lies on."""

    def size(leaf: Any) -> int:
        wide = 8 if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf.dtype.itemsize
        return wide * math.prod(leaf.sharding.shard_shape(leaf.shape))

    return sum(map(size, jax.tree.leaves(tree)))

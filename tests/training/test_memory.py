"""What a compiled step holds: never all logits, one copy of what it trains, none of a reference."""

from __future__ import annotations

import functools
import math
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.packing import Document, Group, pack_documents, pack_groups
from rlhf_jax.losses.cross_entropy import token_cross_entropy
from rlhf_jax.models import ModelConfig, init, lora, transformer
from rlhf_jax.models.scoring import sequence_logprobs, target_statistics
from rlhf_jax.rl import on_policy
from rlhf_jax.stages import defaults, preference
from rlhf_jax.training.learner import make_learner
from rlhf_jax.training.mesh import make_mesh, shard_batch
from rlhf_jax.training.optimizer import make_optimizer
from rlhf_jax.training.state import init_state
from rlhf_jax.training.step import make_step

CHUNK = 1024
LENGTH, ANSWER, SHARE = 64, 24, 2
ROWS = 8 * CHUNK // LENGTH
SHAPE = ModelConfig(
    vocab_size=2048,  # so wide that nothing but logits comes near tokens × vocabulary
    layers=1,
    width=16,
    heads=2,
    kv_heads=1,
    head_dim=8,
    mlp_width=32,
    max_length=LENGTH,
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of CHUNK tokens, as a large vocabulary has them."""
    monkeypatch.setattr(sys.modules[token_cross_entropy.__module__], "KEPT_LOGITS", 0)


def documents():
    """Full rows, so that there are about as many targets as tokens."""
    rows = np.random.default_rng(0).integers(3, SHAPE.vocab_size, (ROWS, LENGTH)).tolist()
    return pack_documents([Document(r, [0] + [1] * (LENGTH - 1)) for r in rows], LENGTH)[0]


def groups():
    """A prompt and two answers a row."""
    ids = np.random.default_rng(0).integers(3, SHAPE.vocab_size, (ROWS, LENGTH)).tolist()
    cut = LENGTH - SHARE * ANSWER
    answers = [(r[:cut], (r[cut : cut + ANSWER], r[cut + ANSWER :])) for r in ids]
    return pack_groups([Group(p, a, i) for i, (p, a) in enumerate(answers)], LENGTH, branches=2)[0]


def language_loss(params, batch, rng):
    return token_cross_entropy(target_statistics(SHAPE, params, batch), batch["weights"])


def all_logits_loss(params, batch, rng):
    """What must not be done."""
    hidden = transformer.apply(
        SHAPE,
        params,
        batch["tokens"],
        positions=batch["positions"],
        segment_ids=batch["segment_ids"],
    ).hidden
    every = jax.nn.log_softmax(transformer.logits(SHAPE, params, hidden))
    targets = jnp.roll(batch["tokens"], -1, 1)[..., None]
    loss = -jnp.take_along_axis(every, targets, -1)[..., 0]
    return (jnp.sum(loss), jnp.float32(loss.size)), {}


def dpo_config(**settings):
    loss = {"name": "sigmoid", "beta": 0.1, "sft_coefficient": 0.5}
    config = defaults.base("preference", loss=loss, batch={"microbatches": 1}, **settings)
    return defaults.resolve(config)


def language_step(loss_fn):
    optimizer, _ = make_optimizer({"name": "adamw"}, 10)
    step = make_step(loss_fn, optimizer, max_grad_norm=1.0)
    return step, init_state(init(SHAPE, jax.random.key(0)), optimizer), documents()


def dpo_step():
    config = dpo_config()
    loss_fn = functools.partial(preference.loss, config, SHAPE)
    learner = make_learner(
        config, config.optimizer, init(SHAPE, jax.random.key(0)), loss_fn, updates=10
    )
    batch = groups()
    batch["reference_logprobs"] = np.zeros(batch["last"].shape, np.float32)
    return learner.step, learner.init(), batch


def policy_step():
    """The update of GRPO, with its KL to the reference in the loss."""
    task = on_policy.Task(
        rollout=lambda *_: None,
        statistics=functools.partial(target_statistics, SHAPE),
        values=None,
        exact_kl=None,
        dtype="float32",
    )
    train = {"steps": 10, "epochs": 1, "minibatches": 1}
    config = defaults.resolve(defaults.on_policy("grpo", train=train))
    start = init(SHAPE, jax.random.key(0))
    learner = on_policy.make_trainer(config, task, start).policy
    by_token = jnp.zeros((ROWS, SHARE, ANSWER))
    names = ("old_logprobs", "ref_logprobs", "behaviour_logprobs", "advantages", "returns", "mask")
    batch = groups() | dict.fromkeys(names, by_token)
    batch["slots"] = by_token.astype(jnp.int32)
    batch["sequence_weights"] = by_token[..., 0]
    batch["kl_coefficient"] = by_token[:, 0, 0]
    return learner.step, learner.init(), batch


def largest(compiled) -> int:
    """Elements of the largest array that the program names."""
    shapes = re.findall(r"\b[a-z]\w*\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def compiled_step(step, state, batch):
    return step.lower(state, jax.tree.map(jnp.asarray, batch)).compile()


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_all_logits_never_exist(name):
    if name == "grpo":
        step, state, batch = policy_step()
    else:
        step, state, batch = dpo_step() if name == "dpo" else language_step(language_loss)
    targets = batch["targets"].size
    assert targets > 4 * CHUNK
    compiled = compiled_step(step, state, batch)
    # Half of them is already far more than a few chunks; on the way are as many hidden states.
    assert largest(compiled) <= targets * SHAPE.vocab_size / 2
    chunk, states = 4 * CHUNK * SHAPE.vocab_size, 4 * batch["tokens"].size * SHAPE.width
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < 4 * targets * SHAPE.vocab_size
    assert temporary < 3 * chunk + 100 * states


def test_all_logits_would_be_seen():
    step, state, batch = language_step(all_logits_loss)
    compiled = compiled_step(step, state, batch)
    logits = batch["tokens"].size * SHAPE.vocab_size
    assert largest(compiled) >= logits
    assert compiled.memory_analysis().temp_size_in_bytes >= 4 * logits


def test_scoring_holds_no_more_logits_than_training():
    batch = jax.tree.map(jnp.asarray, groups())
    params = init(SHAPE, jax.random.key(0))
    compiled = jax.jit(functools.partial(sequence_logprobs, SHAPE)).lower(params, batch).compile()
    assert largest(compiled) <= batch["targets"].size * SHAPE.vocab_size / 2


def nbytes(tree) -> int:
    """On one device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "axes, microbatches", [(None, 1), ({"data": 2, "fsdp": 2, "tensor": 2}, 2)]
)
def test_a_step_writes_its_state_over_the_old_one(axes, microbatches):
    mesh = None if axes is None else make_mesh(axes)
    optimizer, _ = make_optimizer({"name": "adamw"}, 10)
    options = {"ema_decay": 0.9, "max_grad_norm": 1.0, "microbatches": microbatches}
    step = make_step(language_loss, optimizer, mesh=mesh, **options)
    state = init_state(init(SHAPE, jax.random.key(0)), optimizer, ema=True, mesh=mesh)
    batch = shard_batch(mesh, {name: x[:16] for name, x in documents().items()})
    analysis = step.lower(state, batch).compile().memory_analysis()
    assert analysis.alias_size_in_bytes == nbytes(state)
    after, _ = step(state, batch)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert nbytes(after) == analysis.alias_size_in_bytes


def test_an_adapters_step_holds_the_base_once_and_no_reference():
    config = dpo_config()
    adapter = lora.AdapterConfig(rank=2)
    base = init(SHAPE, jax.random.key(0))
    params = lora.attach(base, adapter, jax.random.key(1))
    loss_fn = functools.partial(preference.loss, config, SHAPE)
    learner = make_learner(config, config.optimizer, params, loss_fn, updates=10)
    state = learner.init()
    batch = {name: x[:8] for name, x in groups().items()}
    batch["reference_logprobs"] = np.zeros(batch["last"].shape, np.float32)
    batch = jax.device_put(batch)
    frozen = learner.step.keywords["frozen"]
    compiled = learner.step.func.lower(state, batch, frozen=frozen).compile()
    analysis = compiled.memory_analysis()
    assert analysis.alias_size_in_bytes == nbytes(state)
    assert nbytes(state) < nbytes(base) / 2
    beside = analysis.argument_size_in_bytes - nbytes(state) - nbytes(frozen)
    assert -nbytes(frozen) / 100 < beside <= nbytes(batch)
    whole = learner.params(state)
    assert all(
        x is y
        for x, y in zip(
            jax.tree.leaves(lora.without_adapter(whole)), jax.tree.leaves(base), strict=True
        )
    )

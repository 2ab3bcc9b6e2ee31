"""Tunix as the other side: python -m benchmarks.tunix_peer dpo|grpo SHAPE, where google-tunix is.

A Llama in float32; rows padded to one length, since Tunix compiles anew for every other.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax
import transformers
from flax import nnx
from tokenizers import Tokenizer
from tunix.models.llama3 import model as llama3
from tunix.rl import rl_cluster
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout
from tunix.sft import hooks
from tunix.sft.dpo import dpo_trainer

from benchmarks import work
from benchmarks.worker import Turns

ENOUGH = 400  # updates for which there is data
WARM = 2  # rounds


def model(shape: work.Shape) -> llama3.Llama3:
    """The shape as a model of Tunix, which would be bfloat16 by itself."""
    config = llama3.ModelConfig(
        num_layers=shape.layers,
        vocab_size=shape.vocab_size,
        embed_dim=shape.width,
        hidden_dim=shape.mlp_width,
        num_heads=shape.heads,
        head_dim=shape.width // shape.heads,
        num_kv_heads=shape.heads,
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    made = llama3.Llama3(config, rngs=nnx.Rngs(0))
    nnx.update(made, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(made)))
    return made


def optimizer(learning_rate: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate))


def take_turns(turns: Turns, steps: int) -> Callable[[float], None]:
    """To be called after every step with what it worked off; `steps` a turn."""
    done, units = 0, 0.0

    def stepped(count: float) -> None:
        nonlocal done, units
        done, units = done + 1, units + count
        if done < WARM * steps or done % steps:
            return
        if done == WARM * steps:
            turns.ready(**{f"tunix {name}": version(name) for name in ("google-tunix", "jax")})
        else:
            turns.done(units)
        units = 0.0
        turns.wait()

    return stepped


def padded(rows: list[list[int]], length: int, *, left: bool = False):
    """(tokens, mask) [N, length]; longer rows lose their end."""
    tokens = np.zeros((len(rows), length), np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        cut = row[:length]
        place = slice(length - len(cut), length) if left else slice(len(cut))
        tokens[i, place], mask[i, place] = cut, True
    return tokens, mask


def dpo(turns: Turns, shape: work.Shape, mesh: jax.sharding.Mesh) -> None:
    """DPOTrainer with the reference in every step."""
    stepped = take_turns(turns, shape.steps)

    class Hooks(hooks.TrainingHooks):
        def on_train_step_end(self, train_ctx, train_step, train_loss, *more, **named):
            float(train_loss)  # waits for it
            stepped(work.PAIRS)

        def ignored(self, *more, **named):
            pass

        on_train_start = on_train_end = on_train_step_start = ignored
        on_eval_step_start = on_eval_step_end = ignored

    prompt = int(work.PROMPT_SHARE * shape.context) + 1
    pairs = work.pairs(work.UPDATES * work.PAIRS, shape)
    batches = []
    for i in range(0, len(pairs), work.PAIRS):
        prompts, chosen, rejected = map(list, zip(*pairs[i : i + work.PAIRS], strict=True))
        ids, mask = padded(prompts, prompt, left=True)
        sides = [padded(x, shape.context + 1 - prompt) for x in (chosen, rejected)]
        batches.append(dpo_trainer.TrainingInput(
            prompt_ids=ids, prompt_mask=mask, chosen_ids=sides[0][0], chosen_mask=sides[0][1],
            rejected_ids=sides[1][0], rejected_mask=sides[1][1],
        ))  # fmt: skip
    config = dpo_trainer.DPOTrainingConfig(eval_every_n_steps=10**9, max_steps=ENOUGH)
    with mesh:
        trainer = dpo_trainer.DPOTrainer(model(shape), model(shape), optimizer(5e-6), config)
        trainer.with_training_hooks(Hooks())
        trainer.train(batches * (ENOUGH // len(batches)))


def grpo(turns: Turns, shape: work.Shape, mesh: jax.sharding.Mesh) -> None:
    """GRPOLearner with its own sampler, β = 0.04; a turn lasts from one reward to the next."""
    stepped = take_turns(turns, 1)

    def variety(prompts, completions, **more):
        scores = work.variety(prompts, completions)
        stepped(1.0)
        return scores

    role, last = rl_cluster.Role, shape.vocab_size - 1
    config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys((role.ACTOR, role.REFERENCE, role.ROLLOUT), mesh),
        rollout_engine="vanilla",
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optimizer(1e-6),
            eval_every_n_steps=10**9,
            max_steps=ENOUGH,
            mini_batch_size=work.GROUPS,
            train_micro_batch_size=work.GROUPS,
            rollout_micro_batch_size=work.GROUPS,
            compute_logps_micro_batch_size=work.GROUPS,
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=work.ANSWER,
            temperature=1.0,
            top_p=1.0,
            max_prompt_length=work.QUESTION,
            kv_cache_size=work.QUESTION + work.ANSWER + 44,
            eos_tokens=[last],
        ),
    )
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(work.tokenizer_json(shape)),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    rows = work.full_rows(64 * work.GROUPS, shape)[:, : work.QUESTION - 1]  # it adds the first
    prompts = [" ".join(f"w{i}" for i in row) for row in rows]
    batches = [
        {"prompts": np.array(prompts[i : i + work.GROUPS])}
        for i in range(0, len(prompts), work.GROUPS)
    ]
    with mesh:
        cluster = rl_cluster.RLCluster(
            actor=model(shape), reference=model(shape), tokenizer=words, cluster_config=config
        )
        learner = grpo_learner.GRPOLearner(
            cluster,
            algo_config=grpo_learner.GRPOConfig(num_generations=work.GROUP, beta=0.04),
            reward_fns=[variety],
        )
        learner.train(batches * (ENOUGH // len(batches)))


WORKS = {"dpo": dpo, "grpo": grpo}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("shape", choices=work.SHAPES)
    given = parser.parse_args()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    WORKS[given.work](Turns(), work.SHAPES[given.shape], mesh)


if __name__ == "__main__":
    main()

"""The other side of a benchmark: python -m benchmarks.peers WORK SHAPE, where torch and TRL are.

transformers with a plain loop for pre-training and generation, TRL's trainers for the rest;
float32, AdamW, clipping at 1, no gradient checkpointing. A trainer owns its loop, so a callback
takes turns from inside it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable

import torch
import transformers
from tokenizers import Tokenizer

from benchmarks import work
from benchmarks.worker import Turns, serve

ENOUGH = 400  # rounds for which a trainer is given data


def llama(shape: work.Shape, **options):
    """The shape as transformers' configuration."""
    return transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        intermediate_size=shape.mlp_width,
        max_position_embeddings=2 * shape.context,
        tie_word_embeddings=False,
        pad_token_id=work.PAD,
        bos_token_id=work.BOS,
        eos_token_id=work.EOS,
        **options,
    )


def language_model(shape: work.Shape) -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(llama(shape)).float()


def tokenizer(shape: work.Shape) -> transformers.PreTrainedTokenizerFast:
    """One whose words are the ids."""
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(work.tokenizer_json(shape)),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def plain_loop(model, rows) -> Callable[[], None]:
    """Updates of a language model on every batch of `rows`, padding left out of the loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run() -> None:
        for ids in rows:
            labels = ids.masked_fill(ids == work.PAD, -100)
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        float(loss)

    return run


def pretrain(turns: Turns, shape: work.Shape, given: argparse.Namespace) -> None:
    """An eager loop over full rows."""
    rows = torch.tensor(work.full_rows(shape.steps * shape.rows, shape)).long()
    run = plain_loop(language_model(shape).train(), rows.split(shape.rows))

    def round_() -> float:
        run()
        return float(rows.numel())

    serve(turns, round_, **versions())


def generate(turns: Turns, shape: work.Shape, given: argparse.Namespace) -> None:
    """`generate` with its cache, sampling at temperature 1."""
    model = language_model(shape).eval()
    ids = torch.tensor(work.full_rows(given.batch, shape)[:, : work.PROMPT]).long()
    options = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": work.GENERATED,
        "min_new_tokens": work.GENERATED,
        "do_sample": True,
        "top_k": 0,
        "temperature": 1.0,
        "pad_token_id": work.PAD,
        "use_cache": True,
    }

    def round_() -> float:
        with torch.inference_mode():
            found = model.generate(ids, **options)
        assert found.shape[1] == work.PROMPT + work.GENERATED
        return float(given.batch * work.GENERATED)

    serve(turns, round_, **versions())


def take_turns(turns: Turns, units: list[float], steps: int) -> transformers.TrainerCallback:
    """A callback that works off `steps` updates a turn; `units` are those of each batch, in order.

    A list, because the loader collates a batch ahead: the k-th update takes the k-th entry.
    """
    import trl

    warm = 2 * steps

    class Callback(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            done = state.global_step  # already counts this one
            if done < warm or done % steps:
                return
            if done == warm:
                turns.ready(trl=trl.__version__, **versions())
            else:
                turns.done(sum(units[done - steps : done]))
            turns.wait()

    return Callback()


def arguments(learning_rate: float) -> dict:
    """What all trainers share."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "bf16": False,
        "fp16": False,
        "gradient_checkpointing": False,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "optim": "adamw_torch",
        "max_steps": ENOUGH,
        "seed": 0,
    }


def counted(trainer, count, units: list[float]) -> None:
    """Has the trainer's collator note count(batch) of every batch it makes."""
    collate = trainer.data_collator

    def noted(examples):
        batch = collate(examples)
        units.append(count(batch))
        return batch

    trainer.data_collator = noted


def real_tokens(batch) -> float:
    if "attention_mask" in batch:
        return float(batch["attention_mask"].sum())
    return float((batch["input_ids"] != work.PAD).sum())


def sft_trainer(shape: work.Shape, given: argparse.Namespace):
    """SFTTrainer, a sequence a row, or with --packing several."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = work.sequences(work.UPDATES * shape.rows, shape)
    return SFTTrainer(
        model=language_model(shape),
        args=SFTConfig(
            **arguments(1e-4),
            per_device_train_batch_size=shape.rows,
            max_length=shape.context,
            packing=given.packing,
        ),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]),
        processing_class=tokenizer(shape),
    )


def sft(turns: Turns, shape: work.Shape, given: argparse.Namespace) -> None:
    """Updates of `sft_trainer`."""
    units: list[float] = []
    trainer = sft_trainer(shape, given)
    trainer.add_callback(take_turns(turns, units, shape.steps))
    counted(trainer, real_tokens, units)
    trainer.train()


def dpo(turns: Turns, shape: work.Shape, given: argparse.Namespace) -> None:
    """DPOTrainer with the reference in every step, or with --precomputed its log-probs before."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, chosen, rejected in work.pairs(work.UPDATES * work.PAIRS, shape)
    ]
    DPOTrainer._prepare_dataset = lambda self, dataset, *more, **named: dataset  # ids already
    units: list[float] = []
    trainer = DPOTrainer(
        model=language_model(shape),
        ref_model=None if given.precomputed else language_model(shape).eval(),
        args=DPOConfig(
            **arguments(5e-6),
            per_device_train_batch_size=work.PAIRS,
            max_length=2 * shape.context,
            precompute_ref_log_probs=given.precomputed,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(shape),
        callbacks=[take_turns(turns, units, shape.steps)],
    )
    counted(trainer, lambda batch: len(batch["input_ids"]) / 2, units)
    trainer.train()


def reward(turns: Turns, shape: work.Shape, given: argparse.Namespace) -> None:
    """RewardTrainer."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    rows = [
        {"chosen_ids": prompt + chosen, "rejected_ids": prompt + rejected}
        for prompt, chosen, rejected in work.pairs(work.UPDATES * work.PAIRS, shape)
    ]
    units: list[float] = []
    model = transformers.LlamaForSequenceClassification(llama(shape, num_labels=1)).float()
    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(
            **arguments(1e-5),
            per_device_train_batch_size=work.PAIRS,
            max_length=2 * shape.context,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(shape),
        callbacks=[take_turns(turns, units, shape.steps)],
    )
    counted(trainer, lambda batch: len(batch["input_ids"]) / 2, units)
    trainer.train()


def grpo(turns: Turns, shape: work.Shape, given: argparse.Namespace) -> None:
    """GRPOTrainer with transformers' `generate`, one update a set of samples, β = 0.04."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    words = tokenizer(shape)
    folder = tempfile.mkdtemp()  # it reads its reference from a path
    language_model(shape).save_pretrained(folder)
    words.save_pretrained(folder)
    rows = work.full_rows(64 * work.GROUPS, shape)[:, : work.QUESTION]
    prompts = [{"prompt": " ".join(f"w{i}" for i in row)} for row in rows]

    def variety(prompts, completions, **more):
        return work.variety(prompts, completions)

    trainer = GRPOTrainer(
        model=folder,
        args=GRPOConfig(
            **arguments(1e-6),
            per_device_train_batch_size=work.GROUPS * work.GROUP,
            num_generations=work.GROUP,
            max_completion_length=work.ANSWER,
            beta=0.04,
            temperature=1.0,
            generation_kwargs={"min_new_tokens": work.ANSWER},
        ),
        reward_funcs=variety,
        train_dataset=Dataset.from_list(prompts),
        processing_class=words,
        callbacks=[take_turns(turns, [1.0] * ENOUGH, 1)],
    )
    trainer.train()


def ppo(turns: Turns, shape: work.Shape, given: argparse.Namespace) -> None:
    """PPOTrainer of TRL before 1.1; reward model, critic and reference of the policy's shape."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    count = work.GROUPS * work.GROUP
    rows = work.full_rows(64 * work.GROUPS, shape)[:, : work.QUESTION].tolist()

    def scorer() -> transformers.PreTrainedModel:
        return transformers.LlamaForSequenceClassification(llama(shape, num_labels=1)).float()

    trainer = PPOTrainer(
        args=PPOConfig(
            **arguments(1e-6) | {"max_steps": -1},
            total_episodes=ENOUGH * count,
            per_device_train_batch_size=count,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=work.EPOCHS,
            local_rollout_forward_batch_size=count,
            response_length=work.ANSWER,
            temperature=1.0,
            num_sample_generations=0,
        ),
        processing_class=tokenizer(shape),
        model=language_model(shape),
        ref_model=language_model(shape),
        reward_model=scorer(),
        value_model=scorer(),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]),
        eval_dataset=Dataset.from_list([{"input_ids": row} for row in rows[:count]]),
        callbacks=[take_turns(turns, [1.0] * ENOUGH, 1)],
    )
    trainer.train()


def start(turns: Turns, shape: work.Shape, given: argparse.Namespace) -> None:
    """Until the first update of SFTTrainer, or with --compile of a plain loop that is compiled."""
    if given.compile:
        found = work.sequences(shape.rows, shape)
        rows = [row + [work.PAD] * (shape.context - len(row)) for row in found]
        plain_loop(torch.compile(language_model(shape).train()), [torch.tensor(rows)])()
        turns.ready(**versions())
        return
    trainer = sft_trainer(shape, given)

    class First(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            turns.ready(**versions())
            control.should_training_stop = True

    trainer.add_callback(First())
    trainer.train()


WORKS = {
    "pretrain": pretrain,
    "sft": sft,
    "dpo": dpo,
    "reward": reward,
    "generate": generate,
    "grpo": grpo,
    "ppo": ppo,
    "start": start,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("shape", choices=work.SHAPES)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--precomputed", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--bfloat16", action="store_true", help="float32's products in bfloat16")
    given = parser.parse_args()
    turns = Turns()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    if given.bfloat16:
        torch.set_float32_matmul_precision("medium")
    WORKS[given.work](turns, work.SHAPES[given.shape], given)


if __name__ == "__main__":
    main()

"""The other side of benchmarks.gpu: python -m benchmarks.gpu_peers PART [--reduced] → JSON lines.

transformers and TRL as their users run them on one GPU: float32 parameters, bfloat16 products
(autocast) in training, bfloat16 weights in generation, torch's fused attention ("sdpa").
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[name] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402 - after the environment is set
import transformers  # noqa: E402

from benchmarks import work  # noqa: E402
from benchmarks.gpu import FULL, REDUCED, Line, Size, variety  # noqa: E402
from benchmarks.peers import tokenizer  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def language_model(size: Size, dtype: torch.dtype) -> transformers.PreTrainedModel:
    shape = size.shape
    config = transformers.LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.mlp_width,
        max_position_embeddings=2 * shape.context,
        tie_word_embeddings=True,
        pad_token_id=work.PAD,
        bos_token_id=work.BOS,
        eos_token_id=work.EOS,
        attn_implementation="sdpa",
    )
    with torch.device(DEVICE):
        return transformers.LlamaForCausalLM(config).to(dtype)


def arguments(rate: float, updates: int) -> dict[str, Any]:
    """What all trainers share."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": DEVICE == "cpu",
        "bf16": DEVICE == "cuda",
        "gradient_checkpointing": False,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "max_steps": updates,
        "seed": 0,
    }


class Clock(transformers.TrainerCallback):
    """Seconds of every update but the first two."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **more):
        self._begun = _now()

    def on_step_end(self, args, state, control, **more):
        if state.global_step > 2:
            self.seconds.append(_now() - self._begun)


def _now() -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def sft(size: Size) -> Iterator[Line]:
    """SFTTrainer, a sequence a row, in the order of the data; tokens that are not padding count."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    shape, clock = size.shape, Clock()
    rows = work.sequences(8 * shape.rows, shape)
    counts: list[float] = []
    trainer = SFTTrainer(
        model=language_model(size, torch.float32),
        args=SFTConfig(
            **arguments(1e-5, 2 + size.steps),
            per_device_train_batch_size=shape.rows,
            max_length=shape.context,
        ),
        train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]),
        processing_class=tokenizer(size.shape),
        callbacks=[clock],
    )
    collate = trainer.data_collator

    def counted(examples):
        counts.append(float(sum(len(example["input_ids"]) for example in examples)))
        return collate(examples)

    trainer.data_collator = counted
    trainer.train()
    rate = sum(counts[2 : 2 + len(clock.seconds)]) / sum(clock.seconds)
    yield {"name": f"SFT, rows of {shape.context}", "rate": rate, "unit": "tokens"}


def decode(size: Size) -> Iterator[Line]:
    """`generate` with its cache, sampling; tokens beyond the first."""
    model = language_model(size, torch.bfloat16).eval()
    for batch in size.batches:
        ids = torch.tensor(work.full_rows(batch, size.shape)[:, : size.prompt]).long().to(DEVICE)

        def seconds(new: int, ids: torch.Tensor = ids) -> float:
            begun = _now()
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new,
                    min_new_tokens=new,
                    do_sample=True,
                    top_k=0,
                    pad_token_id=work.PAD,
                )
            return _now() - begun

        seconds(2)
        took = median(seconds(size.new) - seconds(1) for _ in range(min(2, size.repeats)))
        rate = batch * (size.new - 1) / took
        yield {"name": f"decoding, batch {batch}", "rate": rate, "unit": "tokens"}


def grpo(size: Size) -> Iterator[Line]:
    """GRPOTrainer with transformers' `generate`, one update a set of samples, β = 0.04."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    words, clock, folder = tokenizer(size.shape), Clock(), tempfile.mkdtemp()
    language_model(size, torch.float32).save_pretrained(folder)  # it reads its reference from it
    words.save_pretrained(folder)
    rows = work.full_rows(64 * size.groups, size.shape)[:, : size.question]

    def reward(completions, completion_ids=None, **more):
        return [variety(ids) for ids in completion_ids]

    GRPOTrainer(
        model=folder,
        args=GRPOConfig(
            **arguments(1e-6, 2 + size.repeats),
            per_device_train_batch_size=size.groups * size.group,
            num_generations=size.group,
            max_completion_length=size.answer,
            beta=0.04,
            temperature=1.0,
            generation_kwargs={"min_new_tokens": size.answer},
            model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        ),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(
            [{"prompt": " ".join(f"w{i}" for i in row)} for row in rows]
        ),
        processing_class=words,
        callbacks=[clock],
    ).train()
    name = f"GRPO, {size.groups} x {size.group} answers of {size.answer}"
    yield {"name": name, "rate": 1 / median(clock.seconds), "unit": "updates"}


def dpo(size: Size) -> Iterator[Line]:
    """DPOTrainer with the reference's log-probs computed before."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [
        {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
        for prompt, chosen, rejected in work.pairs(4 * size.pairs, size.shape)
    ]
    clock = Clock()
    DPOTrainer._prepare_dataset = lambda self, dataset, *more, **named: dataset  # ids already
    DPOTrainer(
        model=language_model(size, torch.float32),
        args=DPOConfig(
            **arguments(1e-5, 2 + size.steps),
            per_device_train_batch_size=size.pairs,
            max_length=2 * size.shape.context,
            precompute_ref_log_probs=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(size.shape),
        callbacks=[clock],
    ).train()
    rate = size.pairs / median(clock.seconds)
    yield {"name": "DPO, shared prompts", "rate": rate, "unit": "pairs"}


PARTS = {"sft": sft, "decode": decode, "grpo": grpo, "dpo": dpo}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--reduced", action="store_true")
    given = parser.parse_args()
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print
    torch.manual_seed(0)
    for line in PARTS[given.part](REDUCED if given.reduced else FULL):
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        print(json.dumps(line | {"versions": versions}), file=out, flush=True)


if __name__ == "__main__":
    main()

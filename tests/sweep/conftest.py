"""A pre-trained parent and preferences on it that train in seconds, judged by the town."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_jax.tasks.town.town import Town

EXPERIMENTS = """
from rlhf_jax.stages import defaults

TRAIN = dict(steps=4, log_every=1, checkpoint_every=2, tensorboard=False)


def get_config(stage):
    if stage == "pretrain":
        return defaults.base(
            "pretrain",
            model=defaults.model("tiny", layers=1, width=16, heads=1, kv_heads=1, head_dim=16,
                                 mlp_width=16),
            tokenizer=dict(kind="bpe", vocab_size=300),
            data=dict(train="{folder}/texts.jsonl", validation="{folder}/texts.jsonl",
                      row_length=128, over_long="split"),
            batch=dict(rows=1), optimizer=dict(learning_rate=1e-2), train=TRAIN,
        )
    records = "{folder}/chats.jsonl" if stage == "sft" else "{folder}/pairs.jsonl"
    config = defaults.base(
        stage, init=dict(policy="{folder}/tiny.py:pretrain"), batch=dict(rows=2),
        data=dict(train=records, validation=records, row_length=512),
        optimizer=dict(learning_rate=1e-2), train=TRAIN,
    )
    if stage != "reward":
        config.eval = dict(source="{folder}/prompts.jsonl", count=4, max_new_tokens=4)
    return config
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """The source of an experiment, `--config=<this>:preference`, with the variant pretrain."""
    folder, town = tmp_path_factory.mktemp("tiny"), Town()
    records = {
        "texts": [{"text": record.text} for record in town.texts("train", 40)],
        "chats": [
            {"messages": [turn.to_json() for turn in record.messages]}
            for record in town.demonstrations("train", 40)
        ],
        "pairs": [
            {
                "prompt": [turn.to_json() for turn in record.prompt],
                "chosen": record.chosen,
                "rejected": record.rejected,
            }
            for record in town.pairs("train", 16)
        ],
        "prompts": [
            {"messages": [turn.to_json() for turn in record.messages]} | dict(record.meta)
            for record in town.prompts("heldout", 4)
        ],
    }
    for name, lines in records.items():
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "tiny.py").write_text(EXPERIMENTS.replace("{folder}", str(folder)))
    return str(Path(folder) / "tiny.py")

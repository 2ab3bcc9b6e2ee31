"""The work that both sides of a benchmark do: shapes, data, and what it costs at the least.

Needs NumPy only, so that it can be imported in an environment without JAX, or without torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PAD, BOS, EOS, UNKNOWN, FIRST = 0, 1, 2, 3, 8  # ids below FIRST are no text


@dataclass(frozen=True)
class Shape:
    """A Llama: untied head, as many key-value heads as heads, float32."""

    layers: int
    width: int
    heads: int
    mlp_width: int
    vocab_size: int
    context: int
    rows: int  # sequences an update
    steps: int  # updates a round

    @property
    def body_numbers(self) -> int:
        """Parameters of the layers that are multiplied with every token."""
        return self.layers * (4 * self.width**2 + 3 * self.width * self.mlp_width)

    @property
    def head_numbers(self) -> int:
        """Parameters that make logits."""
        return self.width * self.vocab_size

    @property
    def matrix_numbers(self) -> int:
        """Both together: all parameters but the embedding and norms."""
        return self.body_numbers + self.head_numbers


SHAPES = {
    "tiny": Shape(4, 256, 4, 688, 4096, 256, rows=8, steps=4),
    "small": Shape(12, 768, 12, 2048, 32_000, 512, rows=4, steps=1),
}
UPDATES = 32  # for which there are sequences and pairs; then they come again
PROMPT_SHARE = 0.4  # of a sequence, in pairs
PAIRS = 8  # an update
GENERATED, PROMPT = 128, 64  # tokens of a completion and of its prompt
GROUPS, GROUP, ANSWER, QUESTION = 8, 8, 64, 32  # GRPO: prompts, samples of each, their tokens
EPOCHS = 4  # of PPO, over GROUPS × GROUP prompts with one sample each


def lengths(count: int, context: int, seed: int = 0) -> np.ndarray:
    """[count] log-normal lengths between 16 and the context, median 0.45 of it."""
    drawn = np.random.default_rng(seed).normal(np.log(0.45 * context), 0.6, count)
    return np.clip(np.exp(drawn).astype(int), 16, context)


def sequences(count: int, shape: Shape, seed: int = 0) -> list[list[int]]:
    """Uniformly random ids of such lengths."""
    random = np.random.default_rng(seed + 1)
    each = lengths(count, shape.context, seed)
    return [random.integers(FIRST, shape.vocab_size, n).tolist() for n in each]


def full_rows(count: int, shape: Shape, seed: int = 1) -> np.ndarray:
    """[count, context] random ids."""
    random = np.random.default_rng(seed)
    return random.integers(FIRST, shape.vocab_size, (count, shape.context), np.int32)


def pairs(count: int, shape: Shape) -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected): a sequence's beginning, its rest, the rest of another one."""
    found = []
    for one, other in zip(sequences(count, shape, 0), sequences(count, shape, 7), strict=True):
        cut = max(4, int(PROMPT_SHARE * len(one)))
        rest = other[cut:] or other[:8]
        found.append((one[:cut], [*one[cut:], EOS], [*rest, EOS]))
    return found


def tokenizer_json(shape: Shape) -> str:
    """A tokenizer.json whose words are the ids, since the data are ids."""
    special = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN}
    words = {f"w{i}": i for i in range(len(special), shape.vocab_size)}
    model = {"type": "WordLevel", "vocab": special | words, "unk_token": "<unk>"}
    unused = dict.fromkeys(
        ("truncation", "padding", "normalizer", "post_processor", "decoder"), None
    )
    split = {"type": "WhitespaceSplit"}
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "model": model}
    return json.dumps(content | unused)


def variety(prompts: Sequence[object], responses: Sequence[str]) -> list[float]:
    """The reward of GRPO: how many of a response's words are different ones."""
    return [len(set(r.split())) / max(1, len(r.split())) for r in responses]


def forward_flops(
    shape: Shape, prompt: int, answers: Sequence[int], *, logits: bool = True
) -> float:
    """Of one pass over answers of so many tokens, each after the same prompt of so many.

    Two a parameter and token and causal attention; logits of the answers' tokens only.
    """
    seen = prompt**2 / 2 + sum(n * prompt + n**2 / 2 for n in answers)
    body = 2.0 * shape.body_numbers * (prompt + sum(answers))
    head = 2.0 * shape.head_numbers * sum(answers) if logits else 0.0
    return body + head + 4.0 * shape.layers * shape.width * seen


def decoded_numbers(shape: Shape, batch: int, prompt: int, new: int) -> float:
    """Weights, and keys and values at half of the length, that a step of decoding reads."""
    return shape.matrix_numbers + batch * 2.0 * shape.layers * shape.width * (prompt + new / 2)


def numbers_read(name: str, shape: Shape, batch: int = 1) -> int:
    """How many numbers a work reads again and again: what fits a cache is read faster."""
    match name:
        case "generate":
            return int(decoded_numbers(shape, batch, PROMPT, GENERATED))
        case "grpo" | "ppo":
            return int(decoded_numbers(shape, GROUPS * GROUP, QUESTION, ANSWER))
    return shape.matrix_numbers


@dataclass(frozen=True)
class Limit:
    """What a machine can do: matrix products, and reading memory; bytes of a number it reads."""

    flops: float  # a second
    bytes: float  # a second
    number: int = 4

    def decoding(self, shape: Shape, prompts: int, samples: int, prompt: int, new: int) -> float:
        """Seconds in which so many samples of prompts can be had at the least.

        A step reads every weight once and the cache of every sample, or computes if that is slower.
        """
        batch, seen = prompts * samples, prompt + new / 2
        prefill = prompts * forward_flops(shape, prompt, [])
        products = batch * (2.0 * shape.matrix_numbers + 4.0 * shape.layers * shape.width * seen)
        numbers = decoded_numbers(shape, batch, prompt, new)
        step = max(products / self.flops, self.number * numbers / self.bytes)
        return prefill / self.flops + new * step


def least_seconds(name: str, shape: Shape, limit: Limit, batch: int = 1) -> float:
    """Seconds that one unit of a work takes at the least: a token, a pair, an iteration.

    Training is three forward passes, a prompt is read once for all answers to it, nothing is
    padded or computed twice, and log-probs of a sampled answer are known from its sampling.
    """
    match name:
        case "pretrain" | "sft":
            each = [shape.context] if name == "pretrain" else lengths(1000, shape.context).tolist()
            flops = 3 * sum(forward_flops(shape, 0, [n]) for n in each) / sum(each)
        case "dpo" | "reward":
            found = pairs(500, shape)
            passes = [
                forward_flops(shape, len(p), [len(c), len(r)], logits=name == "dpo")
                for p, c, r in found
            ]
            flops = 3 * sum(passes) / len(found)
        case "generate":
            return limit.decoding(shape, batch, 1, PROMPT, GENERATED) / (batch * GENERATED)
        case "grpo":
            one = forward_flops(shape, QUESTION, [ANSWER] * GROUP)
            flops = GROUPS * one * (3 + 1)  # and the reference
            sampling = limit.decoding(shape, GROUPS, GROUP, QUESTION, ANSWER)
            return sampling + flops / limit.flops
        case "ppo":
            count = GROUPS * GROUP
            policy = forward_flops(shape, QUESTION, [ANSWER])
            value = forward_flops(shape, QUESTION, [ANSWER], logits=False)
            # The reference; the reward and the values; and the epochs of both models.
            flops = count * (policy + 2 * value + 3 * EPOCHS * (policy + value))
            sampling = limit.decoding(shape, count, 1, QUESTION, ANSWER)
            return sampling + flops / limit.flops
        case _:
            raise ValueError(f"no limit of {name!r}")
    return flops / limit.flops

"""Answers of a model to seed prompts, and prompts that it writes after them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from rlhf_jax.data.conversation import render_prompt
from rlhf_jax.data.encode import naming
from rlhf_jax.data.records import Conversation, Message, Prompt, meta_of_seed
from rlhf_jax.errors import UserError
from rlhf_jax.filter.records import Bad, Item
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import Completion, generate
from rlhf_jax.training.saved_model import Model

SHOTS = 3  # seeds that a written prompt follows
ASK = """Here are messages that people sent to an assistant.

{shown}

Write another message of that kind, about something else. Write the message alone."""
_NUMBER = re.compile(r"^\s*\d+[.)]\s+")


@dataclass(frozen=True)
class Draw:
    """How a model's texts are drawn."""

    max_new_tokens: int
    temperature: float
    seed: int


def sample_answers(
    model: Model, run: str, seeds: Sequence[Item], samples: int, draw: Draw
) -> tuple[list[Item], list[Bad]]:
    """`samples` answers to each prompt, as conversations, and the prompts that leave no room.

    A record's id is its prompt's with the number of the answer; its meta says which `run` wrote it
    ("model"), and "finish_reason" whether it ended by itself, as engines write it: "stop" or
    "length". What the seed's says of its own reply is named so: see `meta_of_seed`. The same
    arguments give the same answers, bit for bit.
    """
    fitting, bad = _fitting(model, seeds, draw)
    items = []
    replies = _generate(model, [tokens for _, tokens in fitting], samples, draw)
    for number, reply in enumerate(replies):
        seed, sample = fitting[number // samples][0], number % samples
        assert isinstance(seed.record, Prompt)
        text = model.tokenizer.decode_text(reply.tokens)
        if "\0" in text:  # which no reader of records takes
            bad.append(Bad(seed.source, seed.line, "an answer has a NUL character"))
            continue
        ended = "stop" if reply.finished else "length"
        meta = {**meta_of_seed(seed.record.meta), "model": run, "finish_reason": ended}
        turns = (*seed.record.messages, Message("assistant", text))
        record = Conversation(f"{seed.record.id}#{sample + 1}", turns, meta)
        items.append(Item(record, seed.source, seed.line))
    return items, bad


def write_prompts(
    model: Model, run: str, seeds: Sequence[Item], count: int, draw: Draw
) -> tuple[list[Item], list[Bad]]:
    """Prompts that the model writes, each after `SHOTS` seeds (https://arxiv.org/abs/2212.10560).

    One that is empty, does not end, has a NUL character, or is a seed or another one again is among
    the second.

    Raises:
        UserError: fewer seeds than `SHOTS` are one message of a user.
    """
    single = [s for s in seeds if isinstance(s.record, Prompt) and len(s.record.messages) == 1]
    if len(single) < SHOTS:
        raise UserError(f"--write needs {SHOTS} prompts of one message, there are {len(single)}")
    asks, shown = [], []
    for number in range(count):
        shots = Random(f"write {draw.seed} {number}").sample(single, SHOTS)
        texts = [_text(shot) for shot in shots]
        listed = "\n".join(f"{n}. {text}" for n, text in enumerate(texts, 1))
        message = Message("user", ASK.format(shown=listed))
        asks.append(Item(Prompt(str(number), (message,)), f"{run}:written", number + 1))
        shown.append(", ".join(shot.place for shot in shots))
    fitting, bad = _fitting(model, asks, draw)
    known = {_text(seed).casefold() for seed in single}
    items = []
    replies = _generate(model, [tokens for _, tokens in fitting], 1, draw)
    for (ask, _), reply in zip(fitting, replies, strict=True):
        text = _NUMBER.sub("", model.tokenizer.decode_text(reply.tokens).strip())
        key = " ".join(text.split()).casefold()
        why = (
            "there already" if key in known
            else "empty" if not text
            else "without an end" if not reply.finished
            else "with a NUL character" if "\0" in text
            else ""
        )  # fmt: skip
        if why:
            bad.append(Bad(ask.source, ask.line, f"a written prompt is {why}: {text[:80]!r}"))
            continue
        known.add(key)
        meta = {"seeds": shown[ask.line - 1], "prompt_model": run}
        prompt = Prompt(f"written-{ask.line}", (Message("user", text),), meta)
        items.append(Item(prompt, ask.source, ask.line))
    return items, bad


def _text(seed: Item) -> str:
    assert isinstance(seed.record, Prompt)
    return " ".join(seed.record.messages[-1].content.split())


def _fitting(
    model: Model, seeds: Sequence[Item], draw: Draw
) -> tuple[list[tuple[Item, list[int]]], list[Bad]]:
    """The prompts that leave room for an answer, with their tokens, and the others."""
    fitting: list[tuple[Item, list[int]]] = []
    bad = []
    room = model.config.max_length - draw.max_new_tokens
    for seed in seeds:
        assert isinstance(seed.record, Prompt)
        with naming(seed.place):
            tokens = render_prompt(seed.record.messages, model.tokenizer)
        if len(tokens) <= room:
            fitting.append((seed, tokens))
        else:
            why = f"a prompt of {len(tokens):,} tokens leaves no room for an answer"
            bad.append(Bad(seed.source, seed.line, why))
    return fitting, bad


def _generate(
    model: Model, prompts: Sequence[Sequence[int]], samples: int, draw: Draw
) -> list[Completion]:
    sampling = Sampling(
        draw.max_new_tokens,
        draw.temperature,
        stop_ids=model.tokenizer.ends,
        samples_per_prompt=samples,
    )
    return generate(model.config, model.params, prompts, sampling, seed=draw.seed)

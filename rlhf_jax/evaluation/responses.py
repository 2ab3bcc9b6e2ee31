"""Answers of a model to held-out prompts, and how far it has moved from a reference on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_jax.data.conversation import render_prompt
from rlhf_jax.data.packing import Group, pack_groups
from rlhf_jax.data.records import Prompt
from rlhf_jax.evaluation.rows import in_record_order, response_logprobs, rows_of
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import generate
from rlhf_jax.training.saved_model import Model

SLOTS = 64  # replies sampled together at most
CACHED = 8  # tokens whose keys and values take about what a training step keeps of one, or less


@dataclass(frozen=True)
class Answer:
    """A sampled reply: its text, its tokens (with <|end|> if finished), whether it ended itself."""

    text: str
    tokens: tuple[int, ...]
    finished: bool


def answer(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int = 0,
    tokens: int,
) -> list[Answer]:
    """One reply to each prompt; greedy at temperature 0.

    `tokens` are those of a training step: as many replies are sampled together, `SLOTS` at most,
    as have `CACHED` times as many in their cache.
    """
    rendered = [render_prompt(prompt.messages, model.tokenizer) for prompt in prompts]
    longest = max((len(prompt) for prompt in rendered), default=0) + max_new_tokens
    completions = generate(
        model.config,
        model.params,
        rendered,
        Sampling(
            max_new_tokens,
            temperature,
            stop_ids=model.tokenizer.ends,
            batch_size=min(SLOTS, rows_of(CACHED * tokens, longest)),
        ),
        seed=seed,
    )
    return [
        Answer(model.tokenizer.decode_text(c.tokens), tuple(c.tokens), c.finished)
        for c in completions
    ]


def sequence_kl(
    model: Model,
    reference: Model,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    *,
    tokens: int,
) -> np.ndarray:
    """log π(y|x) − log π_ref(y|x) of each answer y, sampled from π at temperature 1: [N] nats.

    Its mean is the unbiased estimate (k1) of KL(π‖π_ref) a sequence. `tokens`: of a forward pass.
    """
    groups = [
        Group(render_prompt(p.messages, model.tokenizer), (a.tokens,), i)
        for i, (p, a) in enumerate(zip(prompts, answers, strict=True))
    ]
    longest = max(len(g.prompt) + len(g.branches[0]) for g in groups)
    rows, _ = pack_groups(groups, -(-longest // 64) * 64, branches=1)

    def logprobs(model: Model) -> np.ndarray:
        values = response_logprobs(model.config, model.params, rows, tokens)
        return in_record_order(values, rows)[:, 0]

    return logprobs(model) - logprobs(reference)

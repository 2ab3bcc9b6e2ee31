"""Answers of a model to held-out prompts, and how far it has moved from a reference on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.data.conversation import render_prompt
from rlhf_jax.data.packing import Arrays, Group, pack_groups
from rlhf_jax.data.records import Prompt
from rlhf_jax.environments.trajectories import Environments, trajectory_seeds
from rlhf_jax.evaluation.before_after import Values
from rlhf_jax.evaluation.row_passes import in_record_order, response_logprobs, rows_of
from rlhf_jax.evaluation.statistics import bootstrap_interval, with_interval
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import Completion, generate
from rlhf_jax.training.kept_results import kept_result, result_key
from rlhf_jax.training.saved_model import Model

SLOTS = 64  # replies sampled together at most
CACHED = 8  # tokens whose keys and values take about what a training step keeps of one, or less


@dataclass(frozen=True)
class Answer:
    """A sampled reply: its text, its tokens (with <|end|> if finished), whether it ended itself.

    `prompt` are the tokens before its own. Of one that an environment answers, `text` is its last
    turn's, `turns` are the texts of all and `given` the places of the answers among its tokens;
    `failed` says that the environment could not go on, so that it was cut off there.
    """

    text: str
    tokens: tuple[int, ...]
    finished: bool
    given: tuple[range, ...] = ()
    prompt: tuple[int, ...] = ()
    turns: tuple[str, ...] = ()
    failed: bool = False


def answer(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int = 0,
    tokens: int,
    environments: Environments | None = None,
    begin: int = 0,
) -> list[Answer]:
    """One reply to each prompt; greedy at temperature 0. `environments` answer its turns.

    `tokens` are those of a training step: as many replies are sampled together, `SLOTS` at most,
    as have `CACHED` times as many in their cache. `begin` is the first prompt's place among all
    that are answered under this seed, each by a random stream of its own.
    """
    places = range(begin, begin + len(prompts))
    play = None
    if environments is not None and prompts:
        seeds = trajectory_seeds(seed, places)
        play = environments.open(model.tokenizer, prompts, 1, seeds)
        rendered = play.prompts
    else:
        rendered = [render_prompt(prompt.messages, model.tokenizer) for prompt in prompts]
    longest = max((len(prompt) for prompt in rendered), default=0) + max_new_tokens
    sampling = Sampling(
        max_new_tokens,
        temperature,
        stop_ids=model.tokenizer.ends,
        batch_size=min(SLOTS, rows_of(CACHED * tokens, longest)),
        respond=None if play is None else play.respond,
    )
    replies = generate(model.config, model.params, rendered, sampling, seed=seed, prompt_ids=places)
    answers = [
        _answer_of(model, reply, prompt) for reply, prompt in zip(replies, rendered, strict=True)
    ]
    if play is None:
        return answers
    outcomes = zip(answers, play.trajectories, strict=True)
    return [replace(each, failed=bool(trajectory.fault)) for each, trajectory in outcomes]


def kept_answers(
    model: Model,
    directory: Path,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int = 0,
    tokens: int,
) -> list[Answer]:
    """`answer` without environments, by a model of a directory; see `kept_result`.

    Every run that starts from the model asks it the same.
    """
    rendered = [render_prompt(prompt.messages, model.tokenizer) for prompt in prompts]
    seed = seed if temperature else 0  # greedy answers have none
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    options |= {"seed": seed, "tokens": tokens}

    def compute() -> dict[str, np.ndarray]:
        answers = answer(model, prompts, **options)
        return {
            "tokens": np.array([t for each in answers for t in each.tokens], np.int32),
            "lengths": np.array([len(each.tokens) for each in answers], np.int32),
            "finished": np.array([each.finished for each in answers], bool),
        }

    key = result_key(__name__, model, directory, tokens, [rendered, options])
    kept = kept_result("answers", f"answers of {directory.name}", key, compute)
    replies = np.split(kept["tokens"], np.cumsum(kept["lengths"]))[:-1]
    return [
        _answer_of(model, Completion(reply.tolist(), np.zeros(0), bool(finished)), prompt)
        for reply, finished, prompt in zip(replies, kept["finished"], rendered, strict=True)
    ]


def _answer_of(model: Model, reply: Completion, prompt: Sequence[int]) -> Answer:
    return Answer(
        model.tokenizer.decode_text(reply.last_turn),
        *(tuple(reply.tokens), reply.finished, reply.given, tuple(prompt)),
        tuple(map(model.tokenizer.decode_text, reply.turns)),
    )


def pack_answers(answers: Sequence[Answer]) -> Arrays:
    """Rows of prompts, each with its one answer."""
    groups = [Group(a.prompt, (a.tokens,), i, (a.given,)) for i, a in enumerate(answers)]
    longest = max(len(g.prompt) + len(g.branches[0]) for g in groups)
    rows, _ = pack_groups(groups, -(-longest // 64) * 64, branches=1)
    return rows


def log_ratios(model: Model, reference: Model, rows: Arrays, tokens: int) -> np.ndarray:
    """log π(y|x) − log π_ref(y|x) of every packed answer y, in the records' order: [N] nats.

    Of answers sampled from π at temperature 1, its mean is the unbiased estimate (k1) of
    KL(π‖π_ref) per sequence. `tokens`: of a forward pass.
    """
    ours, theirs = (
        response_logprobs(each.config, each.params, rows, tokens) for each in (model, reference)
    )
    return in_record_order(ours - theirs, rows).ravel()


def kl_metrics(ratios: np.ndarray, seed: int) -> dict[str, float]:
    """eval/kl, nats per sequence, from `log_ratios` of sampled answers, with 95 % interval."""
    return with_interval("eval/kl", float(ratios.mean()), bootstrap_interval(ratios, seed))


def ending_metrics(answers: Sequence[Answer] | Sequence[Completion]) -> dict[str, float]:
    """Mean length in tokens of its own, and the share of answers that ended by themselves."""
    return {
        "eval/response_length": float(np.mean([_length(each) for each in answers])),
        "eval/eos_rate": float(np.mean([each.finished for each in answers])),
    }


def ending_values(answers: Sequence[Answer]) -> dict[str, Values]:
    """What `ending_metrics` averages, answer by answer."""
    return {
        "response_length": Values.of([_length(each) for each in answers]),
        "eos_rate": Values.of([each.finished for each in answers]),
    }


def _length(each: Answer | Completion) -> int:
    return len(each.tokens) - sum(map(len, each.given))

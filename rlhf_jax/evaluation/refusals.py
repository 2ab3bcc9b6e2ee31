"""What a model refuses of public sets of requests, in rates with Wilson's intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.data.records import Prompt
from rlhf_jax.evaluation.held_out_answers import answer
from rlhf_jax.evaluation.statistics import wilson_interval
from rlhf_jax.tasks.prompts import prompts_within
from rlhf_jax.tasks.refusals import refuses
from rlhf_jax.tasks.sources import read_source
from rlhf_jax.training.saved_model import Model

SMALL = 100_000_000
"""Parameters below which a model is not taken to understand such requests."""
TOKENS = 2048  # of a training step, as `answer` counts them


class Refused(NamedTuple):
    """How many of some prompts were refused: `rate` with its 95 % interval, empty replies apart."""

    of: str
    due: bool
    prompts: int
    rate: float
    low: float
    high: float
    empty: int


def count_refusals(prompts: Sequence[Prompt], replies: Sequence[str]) -> list[Refused]:
    """A line of all prompts where a refusal is due, of all where it is not, and of each type."""
    groups: dict[tuple[str, bool], list[str]] = {}
    for prompt, reply in zip(prompts, replies, strict=True):
        due = prompt.meta["refusal"] == "due"
        everything = "all to be refused" if due else "all to be answered"
        for name in (everything, prompt.meta["type"]):
            groups.setdefault((name, due), []).append(reply)
    lines = []
    for (name, due), texts in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0])):
        said, empty = sum(map(refuses, texts)), sum(not text.strip() for text in texts)
        bounds = wilson_interval(said, len(texts))
        lines.append(Refused(name, due, len(texts), said / len(texts), *bounds, empty))
    return lines


COLUMNS = ("prompts", "count", "refused", "95 %", "empty")


def table_rows(lines: Sequence[Refused]) -> list[list[Any]]:
    """A table's rows, under `COLUMNS`."""
    return [
        [
            each.of,
            each.prompts,
            f"{each.rate:.3f}",
            f"{each.low:.3f} to {each.high:.3f}",
            each.empty,
        ]
        for each in lines
    ]


def answer_requests(
    model: Model,
    name: str,
    *,
    count: int | None,
    max_new_tokens: int | None,
    temperature: float | None,
) -> tuple[list[Refused], list[dict[str, Any]]]:
    """(`count_refusals` of a set, its prompts with a model's replies); None: all, 64, greedy."""
    longest = max_new_tokens or 64
    room = model.config.max_length - longest
    records = read_source(name, "prompt", "validation")[:count]
    prompts = prompts_within(room, f"{name} prompts", records, model.tokenizer, "left out")
    answers = answer(
        model,
        prompts.records,
        max_new_tokens=longest,
        temperature=temperature or 0.0,
        tokens=TOKENS,
    )
    texts = [each.text for each in answers]
    samples = [
        {"set": name, "prompt": prompt.messages[-1].content, "reply": text, **prompt.meta}
        for prompt, text in zip(prompts.records, texts, strict=True)
    ]
    return count_refusals(prompts.records, texts), samples


def warning_of(parameters: int) -> str:
    """What is to be said of numbers of a model of so many parameters; "" if nothing is."""
    if parameters >= SMALL:
        return ""
    return (
        f"this model has {parameters:,} parameters: one of fewer than {SMALL:,}, as the town's, "
        "does not understand these requests, and its numbers here mean nothing"
    )


def document(lines: Mapping[str, Sequence[Refused]], warning: str) -> dict[str, Any]:
    """All of it as JSON values: {"warning", "sets": {name: […]}}."""
    sets = {name: [each._asdict() for each in of_set] for name, of_set in lines.items()}
    return {"warning": warning, "sets": sets}

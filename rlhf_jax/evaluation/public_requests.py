"""What a model refuses of public sets of requests, or rightly calls tools for, in rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_jax.data.records import Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.held_out_answers import answer
from rlhf_jax.evaluation.statistics import wilson_interval
from rlhf_jax.tasks.builders import task_of, verify
from rlhf_jax.tasks.call_sets import call_verdict
from rlhf_jax.tasks.prompts import prompts_within
from rlhf_jax.tasks.refusals import refuses
from rlhf_jax.tasks.sources import read_source
from rlhf_jax.training.saved_model import Model

SMALL = 100_000_000
"""Parameters below which a model is not taken to understand such requests."""
LONGEST = {"refusal": 64, "call": 256}
"""Tokens of a reply: its first 300 characters tell a refusal, a call is to be whole."""
TOKENS = 2048  # of a training step, as `answer` counts them


class Counted(NamedTuple):
    """How many of some prompts were refused, of a set of refusals, or else answered rightly.

    `rate` with its 95 % interval; replies that are empty are counted beside.
    """

    of: str
    prompts: int
    rate: float
    low: float
    high: float
    empty: int


_ALL = {"undue": "all to be answered", "due": "all to be refused"}


def count_replies(prompts: Sequence[Prompt], replies: Sequence[str]) -> list[Counted]:
    """A line of all prompts, or two where some are to be refused, and below it one of each type."""
    groups: dict[str, dict[str, list[tuple[bool, str]]]] = {}
    for prompt, reply in zip(prompts, replies, strict=True):
        everything = _ALL.get(prompt.meta.get("refusal", ""), "all")
        counts = refuses(reply) if "refusal" in prompt.meta else verify(prompt, reply).right
        types = groups.setdefault(everything, {})
        for name in (everything, prompt.meta["type"]):
            types.setdefault(name, []).append((counts, reply))
    lines = []
    for everything in (*_ALL.values(), "all"):
        types = groups.get(everything, {})
        for name in sorted(types, key=lambda name: (name != everything, name)):
            counted = types[name]
            said, empty = sum(c for c, _ in counted), sum(not text.strip() for _, text in counted)
            bounds = wilson_interval(said, len(counted))
            lines.append(Counted(name, len(counted), said / len(counted), *bounds, empty))
    return lines


COLUMNS = ("prompts", "count", "share", "95 %", "empty")


def table_rows(lines: Sequence[Counted]) -> list[list[Any]]:
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
) -> tuple[list[Counted], list[dict[str, Any]]]:
    """(`count_replies` of a set, its prompts with a model's replies).

    None: all prompts, `LONGEST` tokens, greedily.

    Args:
        count: of the prompts of each of the set's configs.

    Raises:
        UserError: no prompt fits, or the model's chat template does not show the tools.
    """
    task = task_of(name)
    longest = max_new_tokens or LONGEST["call" if task.verify is call_verdict else "refusal"]
    room = model.config.max_length - longest
    configs = task.kinds
    named = [f"{name}/{config}" for config in configs]
    records = [each for one in named for each in read_source(one, "prompt", "validation")[:count]]
    prompts = prompts_within(room, f"{name} prompts", records, model.tokenizer, "left out")
    if not prompts.records:
        raise UserError(
            f"no prompt of {name} fits this model's {model.config.max_length} tokens with an "
            f"answer of {longest}; lower --max-new-tokens, or take a model that reads more"
        )
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
    return count_replies(prompts.records, texts), samples


def warning_of(parameters: int) -> str:
    """What is to be said of numbers of a model of so many parameters; "" if nothing is."""
    if parameters >= SMALL:
        return ""
    return (
        f"this model has {parameters:,} parameters: one of fewer than {SMALL:,}, as the town's, "
        "does not understand these requests, and its numbers here mean nothing"
    )


def document(lines: Mapping[str, Sequence[Counted]], warning: str) -> dict[str, Any]:
    """All of it as JSON values: {"warning", "sets": {name: […]}}."""
    sets = {name: [each._asdict() for each in of_set] for name, of_set in lines.items()}
    return {"warning": warning, "sets": sets}

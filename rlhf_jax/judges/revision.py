"""Answers that a model criticises and revises under a principle: SFT data without new labels.

The first half of Constitutional AI (Bai et al., 2022), https://arxiv.org/abs/2212.08073
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

import numpy as np

from rlhf_jax.data.conversation import render_prompt
from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.digests import json_digest
from rlhf_jax.evaluation.held_out_answers import Answer
from rlhf_jax.judges.constitution import Principle
from rlhf_jax.judges.judge import PASS, Comparison, Judge, ask, gold
from rlhf_jax.judges.sampled import Pairs, Policy
from rlhf_jax.label.files import Line, prompt_fields
from rlhf_jax.report.tables import join_turns
from rlhf_jax.tasks.builders import verifier_of

FAULTY, FINE = "Something is wrong with it.", "Nothing is wrong with it."
"""The critiques of `examples`; an answer of which a critic says the latter is not revised."""


def asked_to_criticise(prompt: Prompt, answer: str, principle: Principle) -> Message:
    """The turn that asks for a critique; that for the revision follows the critique."""
    asked = join_turns([message.to_json() for message in prompt.messages])
    return Message("user", f"{asked}\nAnswer: {answer}\n{principle.critique}")


def revise(
    policy: Policy, critic: Policy, prompts: Sequence[Prompt], principles: Sequence[Principle]
) -> tuple[list[Line], dict[str, int]]:
    """A revised answer to each prompt under a principle drawn by lot, as a line of SFT data.

    The policy answers, the critic criticises and revises; what it finds `FINE` stays as it is. Left
    out, and counted, are prompts that its context does not hold with answer and critique, revisions
    that did not end or are empty, and what has a NUL character in any of its texts.
    """
    counts: Counter[str] = Counter()
    rng = Random(policy.seed)
    answers = policy.answers([*prompts], 0)
    drawn = [rng.choice(principles) for _ in prompts]
    turns: list[tuple[Message, ...]] = [
        (asked_to_criticise(prompt, answer.text, principle),)
        for prompt, answer, principle in zip(prompts, answers, drawn, strict=True)
    ]
    critiques = _said(critic, turns, 2)
    fine = [said is not None and said.text.strip() == FINE for said in critiques]
    turns = [
        (*turn, Message("assistant", said.text), Message("user", each.revision))
        if said and not kept
        else ()
        for turn, said, each, kept in zip(turns, critiques, drawn, fine, strict=True)
    ]
    revised = _said(critic, turns, 3)
    revisions = [a if kept else r for a, r, kept in zip(answers, revised, fine, strict=True)]
    lines: list[Line] = []
    for i, revision in enumerate(revisions):
        said = critiques[i]
        if said is None or revision is None:
            counts["too long to be revised"] += 1
        elif not revision.finished or not revision.text.strip():
            counts["not finished"] += 1
        elif "\0" in answers[i].text + said.text + revision.text:  # which no record may hold
            counts["a NUL character"] += 1
        else:
            line = prompt_fields(prompts[i].messages, prompts[i].meta)
            line |= {"completion": revision.text}
            line |= {"answer": answers[i].text, "critique": said.text, "principle": drawn[i].name}
            line |= {"models": {"answer": policy.name, "completion": critic.name}}
            lines.append(line | {"seed": policy.seed, "id": prompts[i].id})
            counts["found fine" if fine[i] else "revised"] += 1
    return lines, dict(counts)


def _said(model: Policy, turns: Sequence[Sequence[Message]], stream: int) -> list[Answer | None]:
    """A reply to each of the conversations; None where there is none or it leaves no room."""
    room, tokenizer = model.model.config.max_length - model.max_new_tokens, model.model.tokenizer
    fitting = [i for i, each in enumerate(turns)
               if each and len(render_prompt(each, tokenizer)) <= room]  # fmt: skip
    replies: list[Answer | None] = [None] * len(turns)
    asked = [Prompt(str(i), tuple(turns[i])) for i in fitting]
    for i, reply in zip(fitting, model.answers(asked, stream) if asked else [], strict=True):
        replies[i] = reply
    return replies


def examples(
    pairs: Pairs, principles: Sequence[Principle], seed: int
) -> tuple[list[Line], dict[str, int]]:
    """Gold-labelled critiques and revisions as SFT data, from which a model learns to give them.

    Where one answer of a pair passes a principle (see `judge.PASS`) and the other does not, this is
    called faulty, and that is its revision. As many answers that pass, drawn from all pairs, are
    called fine and left as they are; the others are counted.
    """
    lines: list[Line] = []
    rng, counts = Random(seed), Counter[str]()
    for principle in principles:
        faulty, fine = [], []
        for shown in pairs.of:
            sides = [shown.first, shown.second]
            sides.sort(key=lambda text: gold(shown.prompt, text, principle))
            worse, better = sides
            passing = [gold(shown.prompt, text, principle) >= PASS for text in sides]
            if passing[1]:
                fine.append((shown.prompt, better, FINE, better))
            if passing == [False, True]:
                faulty.append((shown.prompt, worse, FAULTY, better))
        few = rng.sample(fine, min(len(fine), len(faulty)))
        counts["faulty"] += len(faulty)
        counts["fine"] += len(few)
        counts["fine, not used"] += len(fine) - len(few)
        for prompt, answer, critique, revision in [*faulty, *few]:
            turns = [
                asked_to_criticise(prompt, answer, principle),
                Message("assistant", critique),
                Message("user", principle.revision),
                Message("assistant", revision),
            ]
            messages = [turn.to_json() for turn in turns]
            lines.append({"messages": messages, "principle": principle.name})
    rng.shuffle(lines)
    return lines, dict(counts)


def keep_preferred(
    judge: Judge, lines: Sequence[Line], prompts: Sequence[Prompt], principles: Sequence[Principle]
) -> tuple[list[Line], dict[str, int]]:
    """The lines with the first answer in place of every revision that a judge does not prefer.

    Each is judged under the principle that it was revised by; what the judge has no verdict on
    stays as it first was, too, and is counted by the reason. Returns them, and how many there are
    of what.
    """
    asked_of, counts = prompts_of(lines, prompts), Counter[str]()
    kept = [*lines]
    for principle in principles:
        asked = [
            i for i, line in enumerate(lines)
            if line["principle"] == principle.name and line["completion"] != line["answer"]
        ]  # fmt: skip
        if not asked:
            continue
        pairs = [Comparison(asked_of[i], lines[i]["completion"], lines[i]["answer"]) for i in asked]
        verdicts = ask(judge, pairs, principle)
        for reason, masked in verdicts.masked.items():
            counts[f"no verdict, {principle.name}: {reason}"] = masked
        for i, preferred in zip(asked, verdicts.preferred, strict=True):
            if not np.isnan(preferred):
                counts["revision preferred" if preferred > 0.5 else "answer kept"] += 1
            if not preferred > 0.5:
                kept[i] = lines[i] | {"completion": lines[i]["answer"], "revised": False}
    return kept, dict(counts)


def prompts_of(lines: Sequence[Line], prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompt of each line; an id alone does not tell those of several files apart."""
    by_text = {_name(p.id, prompt_fields(p.messages, {})): p for p in prompts}
    return [by_text[_name(line["id"], line)] for line in lines]


def _name(record: str, asked: Line) -> str:
    return json_digest([record, asked["prompt"], asked.get("tools")])


def gold_changes(
    lines: Sequence[Line], prompts: Sequence[Prompt], principles: Sequence[Principle]
) -> dict[str, dict[str, tuple[float, float]]]:
    """{group of prompts: {gold component: means of (answers, revisions)}}, "all" the last group.

    The components are those that the principles stand for, and "correct". It is empty where no
    verifier knows the prompts.
    """
    task = verifier_of([*prompts])
    if task is None or not lines:
        return {}
    asked = prompts_of(lines, prompts)
    known = {each.gold: each for each in principles if each.gold}
    known.setdefault("correct", Principle("correct", "", "", "", "correct"))
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(asked):
        groups.setdefault(prompt.meta.get(task.group, ""), []).append(i)

    def mean(chosen: Sequence[int], text: str, principle: Principle) -> float:
        return float(np.mean([gold(asked[i], lines[i][text], principle) for i in chosen]))

    return {
        group: {
            name: (mean(chosen, "answer", each), mean(chosen, "completion", each))
            for name, each in known.items()
        }
        for group, chosen in [*sorted(groups.items()), ("all", range(len(lines)))]
    }


def gold_table(
    lines: Sequence[Line], prompts: Sequence[Prompt], principles: Sequence[Principle]
) -> tuple[list[str], list[list[str]]]:
    """(columns, rows) of `gold_changes`; both are empty where that is."""
    changes = gold_changes(lines, prompts, principles)
    if not changes:
        return [], []
    task = verifier_of([*prompts])
    assert task is not None
    counts = Counter(p.meta.get(task.group, "") for p in prompts_of(lines, prompts))
    columns = [f"{name}{part}" for name in changes["all"] for part in ("", ", revised")]
    rows = [
        [group, f"{counts[group] if group in counts else len(lines):,}"]
        + [f"{value:.2f}" for both in components.values() for value in both]
        for group, components in changes.items()
    ]
    return ["group", "prompts", *columns], rows

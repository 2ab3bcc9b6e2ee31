"""What a judge makes for training: labelled pairs, and what a model learns to judge from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random

import numpy as np

from rlhf_jax.judges.card import better_side
from rlhf_jax.judges.constitution import Principle
from rlhf_jax.judges.judge import Comparison, Judge, ask, question
from rlhf_jax.judges.kinds import FIRST, SECOND
from rlhf_jax.judges.sampled import Pairs
from rlhf_jax.label.files import Line, make_comparison
from rlhf_jax.tasks.builders import verifier_of

_TOTAL = Principle("total", "", "", "", "total")


def label(
    judge: Judge, name: str, pairs: Pairs, principles: Sequence[Principle], seed: int
) -> tuple[list[Line], dict[str, int], dict[str, float]]:
    """Pairs as a judge prefers them, a line each; how many there are of what; agreement with gold.

    P(a ≻ b) is the mean over the principles and both orders; ½ is a tie, which readers of the file
    leave out. A pair that lacks a verdict under any principle is left out, and counted for each.
    """
    if not pairs.of:
        return [], dict(pairs.left_out), {}
    said = [ask(judge, pairs.of, principle) for principle in principles]
    values = np.mean([each.preferred for each in said], axis=0)
    values = np.where(np.isclose(values, 0.5, rtol=0, atol=1e-9), 0.5, values)  # rounded sums
    turned = np.any([each.flipped for each in said], axis=0)
    counts: Counter[str] = Counter(pairs.left_out)
    for principle, each in zip(principles, said, strict=True):
        for reason, masked in each.masked.items():
            counts[f"no verdict, {principle.name}: {reason}"] = masked
    lines: list[Line] = []
    for i in np.flatnonzero(~np.isnan(values)).tolist():
        shown = pairs.of[i]
        cut = {"cut": pairs.cut[i]} if i in pairs.cut else {}
        made = make_comparison(
            shown.prompt.messages, (shown.first, shown.second), shown.prompt.meta,
            models=pairs.models, seed=seed, more=cut,
        )  # fmt: skip
        line = made.preferred(int(values[i] < 0.5), tie=values[i] == 0.5)
        line |= {"labeler": name, "probability": round(float(max(values[i], 1 - values[i])), 6)}
        line |= {"pair": made.pair, "number": len(lines)}
        lines.append(line | ({"flipped": True} if turned[i] else {}))
        counts["ties" if values[i] == 0.5 else "labelled"] += 1
    return lines, dict(counts), _agreement(values, pairs)


def _agreement(values: np.ndarray, pairs: Pairs) -> dict[str, float]:
    """How often P(a ≻ b) and the verifier's total prefer the same side; {} where none knows it."""
    if verifier_of([each.prompt for each in pairs.of]) is None:
        return {}
    sides, better = np.sign(values - 0.5), better_side(pairs, _TOTAL)
    both = ~np.isnan(values) & (sides != 0) & (better != 0)
    if not both.any():
        return {}
    return {"agrees with gold": float((sides == better)[both].mean()), "of": int(both.sum())}


def examples(
    pairs: Pairs, principles: Sequence[Principle], seed: int
) -> tuple[list[Line], dict[str, int]]:
    """Gold-labelled comparisons as SFT data: from these a language model learns to be asked.

    Each pair is asked about under every principle by which gold prefers a side, in one order by
    lot; a principle that prefers neither is left out and counted.
    """
    rng, counts = Random(seed), Counter[str]()
    lines: list[Line] = []
    for principle in principles:
        for shown, better in zip(pairs.of, better_side(pairs, principle), strict=True):
            if not better:
                counts["equal by gold"] += 1
                continue
            asked: Comparison = shown if rng.random() < 0.5 else shown.swapped
            first = (better > 0) == (asked is shown)
            turns = [message.to_json() for message in question(asked, principle)]
            turns.append({"role": "assistant", "content": FIRST if first else SECOND})
            lines.append({"messages": turns, "principle": principle.name})
    rng.shuffle(lines)
    return lines, dict(counts) | {"written": len(lines)}

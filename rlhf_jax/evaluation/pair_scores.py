"""How well scores agree with held-out pairs and labels: accuracy, calibration, effect of length."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from rlhf_jax.data.packing import Arrays
from rlhf_jax.evaluation.before_after import Values
from rlhf_jax.evaluation.row_passes import in_record_order
from rlhf_jax.evaluation.statistics import (
    accuracy_by_bins,
    auc,
    calibration,
    correlation,
    preference_confidence,
    wilson_interval,
    with_interval,
)

Judged = tuple[dict[str, float], list[dict[str, Any]]]  # metrics, and figures to draw
LENGTH_EDGES = (-20.5, -10.5, -5.5, -0.5, 0.5, 5.5, 10.5, 20.5)  # tokens, chosen − rejected


def pair_values(values: np.ndarray, rows: Arrays) -> np.ndarray:
    """`in_record_order` of pairs' scores or log-probs, [B, P, 2] to [N, 2]; identical replies tie.

    Where the rows say that both replies are the same tokens, the rejected one gets the value of
    the chosen one: they are computed apart, and what rounding makes of them would pick a winner.
    """
    ordered = in_record_order(values, rows)
    if "identical" in rows:
        same = in_record_order(rows["identical"], rows)
        ordered[same, 1] = ordered[same, 0]
    return ordered


def evaluate_pairs(scores: np.ndarray, rows: Arrays) -> Judged:
    """(metrics, plots) of how scores judge labelled pairs.

    These are accuracy, ties ½, with its 95 % interval, and calibration. Pairs of one reply twice
    are ties too: they are counted, so that models are compared on the same pairs whatever these
    are.

    Args:
        scores: [N, 2] nats of the chosen and the rejected response in the order of the records: a
            reward model's, or DPO's β log π/π_ref.
        rows: the packed pairs, whose `lengths` are the tokens of the responses.
    """
    chosen, rejected = scores.T
    lengths = in_record_order(rows["lengths"], rows)
    correct = (chosen > rejected) + 0.5 * (chosen == rejected)
    interval = wilson_interval(float(correct.sum()), len(correct))
    differences = lengths[:, 0] - lengths[:, 1]
    reliability = calibration(*preference_confidence(chosen - rejected))
    by_length = accuracy_by_bins(differences, correct, LENGTH_EDGES)
    every = np.concatenate([chosen, rejected])
    metrics = {
        **with_interval("eval/accuracy", float(correct.mean()), interval),
        "eval/ece": reliability.ece,
        "eval/rewards/margins": float((chosen - rejected).mean()),
        "eval/rewards/chosen": float(chosen.mean()),
        "eval/rewards/rejected": float(rejected.mean()),
        "eval/length_correlation": correlation(every, lengths.T.ravel()),
        "eval/longer_is_chosen": float((1 + np.sign(differences)).mean() / 2),
    }
    plots = [
        {"kind": "reliability", "title": "Calibration"} | dataclasses.asdict(reliability),
        {
            "kind": "binned_accuracy",
            "title": "Accuracy by length difference",
            "xlabel": "chosen − rejected, tokens",
        }
        | dataclasses.asdict(by_length),
        {
            "kind": "histogram",
            "title": "Rewards of held-out responses",
            "values": {"chosen": chosen.tolist(), "rejected": rejected.tolist()},
            "xlabel": "nats",
        },
    ]
    return metrics, plots


def score_metrics(scores: np.ndarray, rows: Arrays) -> Judged:
    """(metrics, plots) of scores [B, P, 2] on held-out pairs."""
    ordered = pair_values(scores, rows)
    metrics, plots = evaluate_pairs(ordered, rows)
    spread = {"eval/score_mean": float(ordered.mean()), "eval/score_std": float(ordered.std())}
    return metrics | spread, plots


def label_metrics(scores: np.ndarray, rows: Arrays) -> Judged:
    """(metrics, plots) of scores [B, P, 1] on held-out labelled replies.

    Right is a score with the sign of label − ½ (0 counts ½); a label of ½ is left out of accuracy
    and AUC, the share of (good, bad) couples that are in order, which no threshold enters.
    """
    ordered = in_record_order(scores, rows)[:, 0].astype(np.float64)
    labels = in_record_order(rows["labels"], rows)[:, 0].astype(np.float64)
    good, bad = ordered[labels > 0.5], ordered[labels < 0.5]
    correct = (1 + np.sign(np.concatenate([good, -bad]))) / 2
    low, high = wilson_interval(float(correct.sum()), len(correct))
    reliability = calibration(1 / (1 + np.exp(-ordered)), labels)
    metrics = {
        "eval/loss": float(np.mean(np.logaddexp(0, ordered) - labels * ordered)),
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/ece": reliability.ece,
        "eval/score_mean": float(ordered.mean()),
        "eval/score_std": float(ordered.std()),
    }
    if len(correct):
        metrics["eval/accuracy"] = float(correct.mean())
    if len(good) and len(bad):
        metrics["eval/auc"] = auc(good, bad)
    plots = [
        {"kind": "reliability", "title": "Calibration"} | dataclasses.asdict(reliability),
        {
            "kind": "histogram",
            "title": "Scores of held-out replies",
            "values": {"good": good.tolist(), "bad": bad.tolist()},
            "xlabel": "nats",
        },
    ]
    return metrics, plots


def right_values(
    scores: np.ndarray, rows: Arrays, divisors: np.ndarray | int = 1
) -> dict[str, Values]:
    """Which records scores [B, P, K] get right, as `evaluate_pairs` and `label_metrics` count it.

    `divisors`, [N, K] in the order of the records: what scores are divided by first.
    """
    if "labels" in rows:
        score = in_record_order(scores, rows)[:, 0] / np.maximum(divisors, 1)
        sides = in_record_order(rows["labels"], rows)[:, 0] - 0.5
        right = (1 + np.sign(score * sides)) / 2
        return {"accuracy": Values.of(right * (sides != 0), sides != 0)}
    chosen, rejected = (pair_values(scores, rows) / np.maximum(divisors, 1)).T
    return {"accuracy": Values.of((1 + np.sign(chosen - rejected)) / 2)}

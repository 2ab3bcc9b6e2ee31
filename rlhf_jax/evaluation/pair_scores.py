"""How well scores order held-out pairs: accuracy, calibration, and what length alone explains."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from rlhf_jax.data.packing import Arrays
from rlhf_jax.evaluation.row_passes import in_record_order
from rlhf_jax.evaluation.statistics import (
    accuracy_by_bins,
    calibration,
    correlation,
    preference_confidence,
    wilson_interval,
)

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


def _correct(chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def preference_metrics(
    chosen: np.ndarray, rejected: np.ndarray, lengths: np.ndarray
) -> dict[str, float]:
    """Accuracy of scores on labelled pairs, ties ½, with its 95 % interval and its calibration.

    Pairs of one reply twice are ties too: they are counted, so that models are compared on the
    same pairs whatever these are.

    Args:
        chosen, rejected: [N] scores in nats: a reward model's, or DPO's β log π/π_ref.
        lengths: [N, 2] tokens of the chosen and the rejected response.
    """
    correct = _correct(chosen, rejected)
    low, high = wilson_interval(float(correct.sum()), len(correct))
    longer = np.sign(lengths[:, 0] - lengths[:, 1])
    return {
        "eval/accuracy": float(correct.mean()),
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/ece": calibration(*preference_confidence(chosen - rejected)).ece,
        "eval/rewards/margins": float((chosen - rejected).mean()),
        "eval/rewards/chosen": float(chosen.mean()),
        "eval/rewards/rejected": float(rejected.mean()),
        "eval/length_correlation": correlation(
            np.concatenate([chosen, rejected]), lengths.T.ravel()
        ),
        "eval/longer_is_chosen": float((1 + longer).mean() / 2),
    }


def preference_plots(
    chosen: np.ndarray, rejected: np.ndarray, lengths: np.ndarray
) -> list[dict[str, Any]]:
    """The report's figures of the same: reliability, accuracy by length difference, scores."""
    reliability = calibration(*preference_confidence(chosen - rejected))
    by_length = accuracy_by_bins(
        lengths[:, 0] - lengths[:, 1], _correct(chosen, rejected), LENGTH_EDGES
    )
    return [
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

"""What a run is worth: intervals and calibration, figures, the console summary and the report.

Nothing here imports Matplotlib, Jinja or Rich before the first figure, page or table.
"""

from rlhf_jax.evaluation.plots import Plot, draw, training_curves
from rlhf_jax.evaluation.report import environment, write_report
from rlhf_jax.evaluation.statistics import (
    BinnedAccuracy,
    Calibration,
    WinRate,
    accuracy_by_bins,
    bootstrap_interval,
    calibration,
    correlation,
    preference_confidence,
    wilson_interval,
    win_rate,
)
from rlhf_jax.evaluation.tables import format_numbers, print_summary

__all__ = [
    "BinnedAccuracy",
    "Calibration",
    "Plot",
    "WinRate",
    "accuracy_by_bins",
    "bootstrap_interval",
    "calibration",
    "correlation",
    "draw",
    "environment",
    "format_numbers",
    "preference_confidence",
    "print_summary",
    "training_curves",
    "wilson_interval",
    "win_rate",
    "write_report",
]

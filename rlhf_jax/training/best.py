"""The best of a run's evaluations by a metric, and when to stop waiting for a better one.

Which was the best is read from metrics.jsonl, so that a run that is killed and goes on, and so
takes some steps again, comes to the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlhf_jax import hosts
from rlhf_jax.errors import UserError, nearest
from rlhf_jax.training.meanings import is_less_better
from rlhf_jax.training.metrics import read_metrics


@dataclass(frozen=True)
class Best:
    """The search for the best evaluation of a run.

    Attributes:
      run: the run's directory; the best model is kept in its subdirectory `best`.
      metric: of the evaluations; "": none is looked for.
      patience: evaluations without a better one after which the run ends; 0: none does.
    """

    run: Path
    metric: str
    patience: int

    @property
    def path(self) -> Path:
        """Where the best model is kept."""
        return self.run / "best"

    def is_found(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the evaluation after that step is better than all before; the first one is.

        Raises:
            UserError: it has no such metric; the nearest that it has is named.
        """
        if not self.metric:
            return False
        if self.metric not in metrics:
            near = nearest(self.metric, metrics)
            raise UserError(
                f"train.best = {self.metric!r}: the evaluation has no such metric; did you mean "
                f"{near}? There are: {', '.join(sorted(metrics))}"
            )
        before = [value for at, value in self._values() if at < step]
        if before and self._worth(metrics[self.metric]) <= max(map(self._worth, before)):
            return False
        self.path.mkdir(exist_ok=True)
        return True

    def ends(self, step: int) -> bool:
        """Whether the run ends after that step, with `patience` evaluations since the best."""
        worths = [self._worth(v) for at, v in self._values() if at <= step] if self.patience else []
        if not worths:
            return False
        since = len(worths) - 1 - worths.index(max(worths))
        if since >= self.patience:
            print(f"{self.run} ends at step {step}: {since} evaluations without a better "
                  f"{self.metric}", flush=True)  # fmt: skip
        return since >= self.patience

    def tell(self) -> dict[str, float]:
        """Says which evaluation was the best, and returns its step as a metric."""
        step, value = max(self._values(), key=lambda each: (self._worth(each[1]), -each[0]))
        print(f"the best {self.metric} is {value:.4g}, of step {step}: that model is kept")
        return {"eval/best_step": float(step)}

    def _values(self) -> list[tuple[int, float]]:
        lines = hosts.by_first(lambda: read_metrics(self.run / "metrics.jsonl"))
        return [(int(line["step"]), line[self.metric]) for line in lines if self.metric in line]

    def _worth(self, value: float) -> float:
        if math.isnan(value):
            return -math.inf
        return -value if is_less_better(self.metric) else value

"""The reference's log-probs of packed preferences, computed once for all runs on the same data."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rlhf_jax.data import packing
from rlhf_jax.data.packing import Arrays
from rlhf_jax.evaluation.row_passes import response_logprobs
from rlhf_jax.training.kept_results import kept_result, result_key
from rlhf_jax.training.saved_model import Model


def reference_logprobs(
    reference: Model, directory: Path, arrays: Arrays, tokens: int
) -> np.ndarray:
    """log π_ref of every response of packed groups: f32 [B, P, K] nats; see `kept_result`.

    They depend on the model and the data only, so a restart, or a run with another β, finds them.

    Args:
      directory: where `reference` was loaded from.
      tokens: per forward pass.
    """

    def compute() -> dict[str, np.ndarray]:
        model = reference.config, reference.params
        return {"logprobs": response_logprobs(*model, arrays, tokens, name="reference")}

    key = cache_key(reference, directory, arrays, tokens)
    what = "the reference's log-probs"
    return kept_result("reference_logprobs", what, key, compute)["logprobs"]


def cache_key(reference: Model, directory: Path, arrays: Arrays, tokens: int) -> str:
    """What the log-probs are kept under; see `result_key`."""
    return result_key(__name__, reference, directory, tokens, packing.fingerprint(arrays))

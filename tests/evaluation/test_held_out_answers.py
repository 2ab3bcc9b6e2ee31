"""What is counted of an answer that an environment replied to: its own tokens alone."""

from __future__ import annotations

import numpy as np

from rlhf_jax.evaluation.held_out_answers import (
    Answer,
    ending_metrics,
    ending_values,
    log_ratios,
    pack_answers,
)
from rlhf_jax.evaluation.row_passes import response_logprobs
from tests.chat_model import make_chat_model

TURNS = Answer("x", (10, 11, 12, 13, 14), True, given=(range(1, 3),), prompt=(8, 9))
CUT = Answer("y", (15, 16), False, prompt=(8, 9, 10))


def test_lengths_are_of_what_a_model_has_said_itself():
    assert ending_metrics([TURNS, CUT]) == {"eval/response_length": 2.5, "eval/eos_rate": 0.5}
    values = ending_values([TURNS, CUT])
    assert values["response_length"].sums.tolist() == [3, 2]
    assert values["eos_rate"].sums.tolist() == [1, 0]


def test_a_kl_is_of_what_a_model_has_said_itself_after_all_that_it_read(tmp_path):
    ours, theirs = (make_chat_model(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    rows = pack_answers([TURNS, CUT])
    assert sorted(rows["targets"][rows["weights"] > 0].tolist()) == [10, 13, 14, 15, 16]
    ratios = log_ratios(ours, theirs, rows, 256)
    mine, other = (response_logprobs(m.config, m.params, rows, 256) for m in (ours, theirs))
    np.testing.assert_allclose(ratios.sum(), (mine - other).sum(), rtol=1e-6)
    assert ratios.shape == (2,) and (ratios == -log_ratios(theirs, ours, rows, 256)).all()

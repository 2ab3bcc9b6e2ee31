"""Which evaluation is the best, and when a run stops waiting for a better one."""

from __future__ import annotations

import json

import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.training.best import Best


@pytest.fixture
def losses(tmp_path):
    """A run that has evaluated these losses, every second step."""

    def write(*values, name="eval/loss"):
        lines = [{"step": 2 * i + 2, name: value} for i, value in enumerate(values)]
        lines.append({"step": 2 * len(values) + 1, "train/loss": 0.0})
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return tmp_path

    return write


def test_the_first_and_each_better_one_is_found(losses):
    best = Best(losses(3.0, 2.0, 2.5), "eval/loss", 0)
    assert best.is_found(2, {"eval/loss": 9.0})
    assert best.is_found(4, {"eval/loss": 2.9}) and not best.is_found(4, {"eval/loss": 3.0})
    # What is beyond the step is of a run that was killed and goes on from before it.
    assert best.is_found(6, {"eval/loss": 1.9}) and not best.is_found(6, {"eval/loss": 2.1})
    assert not best.is_found(6, {"eval/loss": float("nan")})
    assert best.tell() == {"eval/best_step": 4.0}
    more = Best(losses(3.0, 2.0, name="eval/accuracy"), "eval/accuracy", 0)
    assert more.is_found(6, {"eval/accuracy": 3.1}) and more.tell() == {"eval/best_step": 2.0}


@pytest.mark.parametrize(("patience", "ending"), [(0, None), (1, 6), (2, 8), (3, None)])
def test_it_ends_after_so_many_without_a_better_one(losses, patience, ending):
    best = Best(losses(3.0, 2.0, 2.5, 2.0, 1.0), "eval/loss", patience)
    ends = [step for step in (2, 4, 6, 8, 10) if best.ends(step)]
    assert ends[:1] == ([ending] if ending else [])


def test_a_metric_that_is_not_there_names_the_nearest(losses):
    with pytest.raises(UserError, match=r"'eval/los': .*did you mean eval/loss\? There are: eval"):
        Best(losses(), "eval/los", 0).is_found(2, {"eval/loss": 1.0, "eval/kl": 0.0})

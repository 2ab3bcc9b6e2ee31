"""Losses and advantages in a file of the user's own: what they compute, what is told of them."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import document
from rlhf_jax.errors import UserError
from rlhf_jax.losses.preference import Hinge, Pairs, preference_loss
from rlhf_jax.rl.layout import Rollout
from rlhf_jax.rl.objectives import advantages
from rlhf_jax.stages import defaults
from rlhf_jax.stages.chain import prepare
from rlhf_jax.stages.identity import made_from

MINE = """
import jax
import jax.numpy as jnp

import widths
from rlhf_jax.losses.policy import Objected


def hinge(pairs, *, beta):
    return jax.nn.relu(1 - beta * pairs.margins)


def cauchy(pairs, *, beta, width=widths.WIDTH):
    return jnp.log1p((1 - beta * pairs.margins) ** 2 / width)


def averaged(pairs):
    return pairs.margins.mean()


def raises(pairs):
    return pairs.margin


def without_default(pairs, *, width):
    return pairs.margins


def gradient(tokens, *, scale=1.0):
    return Objected(-scale * tokens.advantages * tokens.logprobs)


def centred(config, rollout, rewards, mask):
    totals = rewards.sum(-1, keepdims=True) * mask
    return totals - totals.mean(), totals


def one_number(config, rollout, rewards, mask):
    return rewards.mean(), rewards
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "widths.py").write_text("WIDTH = 2.0\n")
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return str(path)


def preference(**loss):
    return prepare(defaults.base("preference", init={"policy": "runs/sft"}, loss=loss))


def pairs():
    values = np.random.default_rng(0).normal(-9, 2, (4, 6)).astype(np.float32)
    lengths = jnp.full(6, 3.0)
    return Pairs(*map(jnp.asarray, values), lengths, lengths, jnp.ones(6))


def test_a_loss_of_ones_own_is_what_it_is_in_the_package(mine):
    own = preference(file=f"{mine}:hinge", beta=0.3).loss.objective
    (total, weight), metrics = preference_loss(own, pairs())
    (expected, _), others = preference_loss(Hinge(0.3), pairs())
    assert float(total) == float(expected) and weight == 6 and metrics.keys() == others.keys()


def test_its_options_are_fields_with_their_defaults(mine):
    config = preference(file=f"{mine}:cauchy", width=0.5)
    assert dataclasses.asdict(config.loss.objective) == {"beta": 0.1, "width": 0.5}
    assert preference(file=f"{mine}:cauchy").loss.objective.width == 2.0  # of the file beside it
    values = config.loss.objective(pairs())
    assert np.allclose(values, np.log1p((1 - 0.1 * pairs().margins) ** 2 / 0.5))
    recorded = document(config)["loss"]
    assert recorded["width"] == 0.5 and recorded["file"] == f"{mine}:cauchy"
    assert "name" not in recorded


def test_a_run_is_made_from_the_file_and_what_it_imports(mine, tmp_path):
    contents = made_from(preference(file=f"{mine}:cauchy"), {})["contents"]
    assert {f"loss.file: {mine}", f"loss.file: {tmp_path / 'widths.py'}"} <= contents.keys()


@pytest.mark.parametrize(
    "loss, message",
    [
        ({"file": "nowhere.py:f"}, "loss.file = 'nowhere.py:f': there is no file nowhere.py"),
        ({"file": "{mine}"}, "mine.py' names no function; write mine.py:function"),
        ({"file": "{mine}:cauchi"}, "has no function 'cauchi'; did you mean cauchy?"),
        ({"file": "{mine}:without_default"}, "its option width needs a default"),
        ({"file": "{mine}:cauchy", "width": -1.0}, r"loss.width must be in \[0, inf\)"),
        ({"file": "{mine}:cauchy", "width": "wide"}, "loss.width = 'wide' must be of type float"),
        ({"file": "{mine}:cauchy", "breadth": 1.0}, "has no option breadth, only beta, width"),
        ({"file": "{mine}:cauchy", "beta": 0.0}, "beta must be in"),
    ],
)
def test_mistakes_are_told_before_anything_runs(mine, loss, message):
    if "file" in loss:
        loss = loss | {"file": loss["file"].replace("{mine}", mine)}
    with pytest.raises(UserError, match=message):
        preference(**loss)


def test_a_name_beside_a_file_is_refused(mine):
    given = defaults.base("preference", init={"policy": "x"}, loss={"file": f"{mine}:cauchy"})
    with pytest.raises(UserError, match=r"loss\.name is read only with loss\.file empty"):
        prepare(given, ["loss.name"])
    prepare(given, ["loss.width"])


def test_what_it_raises_or_averages_is_told_with_its_line(mine):
    raises = preference(file=f"{mine}:raises").loss.objective
    line = MINE.split("\n").index("    return pairs.margin") + 1
    with pytest.raises(UserError, match=f"mine.py, line {line}: AttributeError"):
        preference_loss(raises, pairs())
    averaged = preference(file=f"{mine}:averaged").loss.objective
    with pytest.raises(UserError, match=r"returned the shape \(\) where \(6,\) is needed"):
        preference_loss(averaged, pairs())


def test_a_file_that_raises_is_told_with_its_line(tmp_path):
    (tmp_path / "broken.py").write_text("x = 1\ny = x + nothing\n")
    with pytest.raises(UserError, match=r"broken\.py, line 2: NameError"):
        preference(file=f"{tmp_path}/broken.py:f")


def on_policy(**sections):
    return prepare(defaults.on_policy("grpo", init={"policy": "x", "reward": "y"}, **sections))


def rollout() -> Rollout:
    """Four answers of three tokens, with the scores 1, 2, 3 and 6."""
    ones = np.ones((4, 3), np.float32)
    scores = np.array([1, 2, 3, 6], np.float32)
    return Rollout(ones, 0 * ones, np.ones(4, bool), scores=scores, weights=np.ones(4, np.float32))


def test_an_advantage_of_ones_own(mine):
    config = on_policy(advantage={"file": f"{mine}:centred"}, rollout={"samples": 2})
    made, _ = advantages(config, rollout(), jnp.asarray(0.0))
    assert np.allclose(made["advantages"][:, 0], [-2, -1, 0, 3])
    # The score is given for the last token: −2, −1, 0 and 3 from the mean of 3.
    assert "name" not in document(config)["advantage"]
    contents = made_from(config, {})["contents"]
    assert f"advantage.file: {mine}" in contents
    wrong = on_policy(advantage={"file": f"{mine}:one_number"}, rollout={"samples": 2})
    with pytest.raises(UserError, match=r"returned the shapes \(\) and \(4, 3\) where"):
        advantages(wrong, rollout(), jnp.asarray(0.0))
    with pytest.raises(UserError, match=r"advantage\.file = 'no\.py:f': there is no file"):
        on_policy(advantage={"file": "no.py:f"})


def test_a_policy_loss_of_ones_own(mine):
    config = on_policy(loss={"file": f"{mine}:gradient", "scale": 2.0}, rollout={"samples": 2})
    assert config.loss.objective.scale == 2.0

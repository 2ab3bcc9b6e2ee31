"""The loss of the preference stage, on log-probs given to it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.losses.preference import LOSSES
from rlhf_jax.stages import defaults, preference


def _config(**settings):
    settings = {"beta": 0.1, "options": "", "sft_coefficient": 0.0} | settings
    return defaults.base("preference", loss=settings)


def _loss(monkeypatch, logprobs, batch, **settings):
    config = _config(**settings)
    monkeypatch.setattr(preference, "sequence_logprobs", lambda *_: logprobs)
    return preference.loss(config, None, None, batch, None)


@pytest.mark.parametrize("coefficient", [0.0, 0.3])
def test_the_sft_term_makes_sigmoid_rpo(monkeypatch, coefficient):
    rng = np.random.default_rng(0)
    logprobs, reference = (jnp.asarray(-rng.uniform(1, 30, (3, 4, 2))) for _ in range(2))
    batch = {
        "reference_logprobs": reference,
        "lengths": jnp.asarray(rng.integers(1, 9, (3, 4, 2))),
        "valid": jnp.asarray(rng.integers(0, 2, (3, 4)), jnp.float32),
    }
    (total, weight), metrics = _loss(
        monkeypatch, logprobs, batch, name="sigmoid", sft_coefficient=coefficient
    )
    twin = {"name": "rpo", "options": f"sft_coefficient={coefficient}"}
    (expected, pairs), _ = _loss(monkeypatch, logprobs, batch, **twin)
    np.testing.assert_allclose([total, weight], [expected, pairs], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (total, weight), rtol=1e-5)
    valid = np.asarray(batch["valid"]) > 0
    nll = -np.asarray(logprobs / batch["lengths"])[..., preference.CHOSEN][valid]
    np.testing.assert_allclose(metrics["sft_loss"], [nll.sum(), valid.sum()], rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_held_out_rewards_are_those_of_the_loss(monkeypatch, name):
    rng = np.random.default_rng(1)
    logprobs, reference = (-rng.uniform(1, 30, (3, 4, 3)).astype(np.float32) for _ in range(2))
    batch = {
        "reference_logprobs": reference,
        "lengths": rng.integers(1, 9, (3, 4, 3)),
        "valid": rng.integers(0, 2, (3, 4)).astype(np.float32),
        "example_ids": np.arange(12).reshape(3, 4),
    }
    _, training = _loss(
        monkeypatch, jnp.asarray(logprobs), jax.tree.map(jnp.asarray, batch), name=name
    )
    pairs = batch | {"lengths": batch["lengths"][..., : preference.MISMATCHED]}
    held_out, _ = preference.implicit_rewards(
        _config(name=name), *(x[..., : preference.MISMATCHED] for x in (logprobs, reference)), pairs
    )
    total, weight = training["rewards/accuracies"]
    assert held_out["eval/accuracy"] == pytest.approx(float(total / weight), abs=1e-5)
    total, weight = training["rewards/margins"]
    assert held_out["eval/rewards/margins"] == pytest.approx(
        float(total / weight), rel=1e-5, abs=1e-5
    )

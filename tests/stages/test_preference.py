"""The loss of the preference stage, on log-probs given to it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.stages import defaults, preference


def _loss(monkeypatch, logprobs, batch, **settings):
    config = defaults.base(
        "preference", loss={"beta": 0.1, "options": "", "sft_coefficient": 0.0} | settings
    )
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

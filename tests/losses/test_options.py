"""Options of losses: what is accepted gives a loss and a gradient, what cannot is refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.config import own_fields
from rlhf_jax.errors import UserError
from rlhf_jax.losses.policy import OBJECTIVES, Tokens, policy_loss
from rlhf_jax.losses.preference import LOSSES, Pairs, preference_loss
from rlhf_jax.stages.defaults import base, on_policy, resolve

VALUES = (-1.0, 0.0, 1e-30, 0.3, 1e30)
# What an option is only read with.
BESIDE = {"alpha": {"divergence": "alpha"}, "clip_low": {"clip": "both"}}


def numbers(table):
    """(name of a loss, name of its option) of every option that is a number."""
    return [
        (name, option)
        for name, kind in table.items()
        for option, each in own_fields(kind).items()
        if each.type.startswith("float")
    ]


def built(kind, option, value):
    """The loss with such an option; None where it is refused by the option's name."""
    beside = {k: v for k, v in BESIDE.get(option, {}).items() if k in own_fields(kind)}
    try:
        return kind(**{option: value}, **beside)
    except ValueError as error:
        assert str(error).startswith(f"{option} must be in ") and f"got {value}" in str(error)
        return None


def preference(loss, chosen):
    references = (jnp.array([-3.5, -2.0]), jnp.array([-3.8, -2.5]))
    pairs = Pairs(
        chosen, jnp.array([-4.0, -1.5]), *(references if loss.uses_reference else (None, None)),
        jnp.array([3.0, 2.0]), jnp.array([5.0, 2.0]), jnp.ones(2), jnp.array([0.3, 0.3]),
    )  # fmt: skip
    return preference_loss(loss, pairs)[0][0]


def policy(objective, logprobs):
    old = jnp.array([[-1.2, -1.8], [-1.0, -0.7]])
    advantages = jnp.array([[1.0, -1.0], [-0.5, 2.0]])
    return policy_loss(objective, Tokens(logprobs, old, advantages, jnp.ones((2, 2))))[0][0]


@pytest.mark.parametrize(
    ("table", "loss", "at"),
    [
        (LOSSES, preference, jnp.array([-3.0, -2.2])),
        (OBJECTIVES, policy, jnp.array([[-1.0, -2.0], [-1.0, -0.5]])),
    ],
    ids=["preference", "policy"],
)
def test_an_option_is_refused_or_gives_finite_numbers(table, loss, at):
    cases = [
        (n, o, built(table[n], o, value), value) for n, o in numbers(table) for value in VALUES
    ]
    kept = [case for case in cases if case[2] is not None]

    @jax.jit
    def values():
        return [
            jax.value_and_grad(lambda x, made=made: loss(made, x))(at) for _, _, made, _ in kept
        ]

    for (name, option, _, value), (total, gradient) in zip(kept, values(), strict=True):
        assert np.isfinite(total) and np.isfinite(gradient).all(), (name, option, value)
    assert not [case for case in kept if case[3] < 0]


@pytest.mark.parametrize(
    ("name", "option", "value", "interval"),
    [
        ("sapo", "tau_negative", 0.0, "(0, inf)"),
        ("sapo", "tau_positive", 0.0, "(0, inf)"),
        ("cispo", "clip_low", 3.0, "[0, 1]"),
        ("cispo", "clip_high", 0.0, "(0, inf)"),
        ("ppo", "clip_low", 1.5, "[0, 1]"),
        ("gspo", "clip_low", 1.5, "[0, 1]"),
        ("ppo", "dual_clip", 1.0, "(1, inf)"),
        ("discopop", "temperature", 0.0, "(0, inf)"),
        ("ipo", "beta", 1e-30, "[1e-12, inf)"),
        ("sigmoid", "beta", 0.0, "(0, inf)"),
    ],
)
def test_a_user_is_told_the_range(name, option, value, interval):
    loss = {"name": name, option: value, **({"clip": "both"} if name == "cispo" else {})}
    with pytest.raises(UserError) as refused:
        resolve(
            on_policy("grpo", loss=loss) if name in OBJECTIVES else base("preference", loss=loss)
        )
    assert str(refused.value) == f"config: loss.{option} must be in {interval}, got {value}"

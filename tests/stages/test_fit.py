"""What a run says of itself as it starts, and how many steps its epochs are."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.models.lora import AdapterConfig, attach
from rlhf_jax.stages import checks, defaults
from rlhf_jax.stages.fit import Batches, say_devices, say_start, settled_steps

PARAMS = {
    "embedding": {"embedding": np.zeros((10, 4), np.float32)},
    "layers": {"attention": {"query": {"kernel": np.zeros((2, 4, 3), np.float32)}}},
}


def options(**sections):
    return defaults.resolve(defaults.base("sft", **sections))


def test_the_console_says_what_is_trained_and_how_far_the_steps_carry(capsys):
    config = options(batch={"rows": 4}, data={"row_length": 32})
    batches = Batches(None, {"a.jsonl": 60, "b.jsonl": 20}, [3.0, 1.0])
    say_start(config, PARAMS, None, batches, 30)
    device = jax.devices()[0].device_kind
    assert capsys.readouterr().out.splitlines() == [
        f"training on {len(checks.training_devices())} × {device}: 64 of 64 parameters",
        "a step is 4 rows of 32 tokens, 128 together; 30 steps are 1.5 epochs of 60 rows of "
        "a.jsonl, 1.5 epochs of 20 rows of b.jsonl",
    ]


def test_frozen_parameters_and_an_adapters_base_are_not_trained(capsys):
    say_devices(options(optimizer={"freeze": ("^embedding",)}), PARAMS, None)
    adapter = AdapterConfig(rank=1, targets="query")
    say_devices(options(), attach(PARAMS, adapter, jax.random.key(0)), None)
    frozen, adapted = capsys.readouterr().out.splitlines()
    assert frozen.endswith(": 24 of 64 parameters")
    assert adapted.endswith(": 14 of 78 parameters")  # 2 · (4 + 3)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (("layers", "embed"), "leaves nothing to train"),
        (("embeding",), r"'embeding' is in no parameter's name; did you mean 'embedding'\?"),
    ],
)
def test_what_freezes_all_or_nothing_is_refused(freeze, message):
    with pytest.raises(UserError, match=message):
        say_devices(options(optimizer={"freeze": freeze}), PARAMS, None)


@pytest.mark.parametrize(("epochs", "steps"), [(0.0, 7), (1.0, 20), (0.5, 10), (1.01, 21)])
def test_epochs_are_steps_over_all_rows(epochs, steps):
    config = options(batch={"rows": 4}, train={"steps": 7, "epochs": epochs})
    assert settled_steps(config, 80).steps == steps


def test_the_best_needs_evaluations_on_the_way():
    with pytest.raises(UserError, match=r"train\.best needs evaluations on the way"):
        checks.check(options(init={"policy": "x"}, train={"best": "eval/loss"}))
    checks.check(options(train={"best": "eval/loss", "eval_every": 2}))
    with pytest.raises(UserError, match="whether more or less of eval/tone is better"):
        checks.check(options(train={"best": "eval/tone", "eval_every": 2}))
    # A warm-up that may fit into the epochs is not compared with the steps in their place.
    longer = {"train": {"steps": 5, "epochs": 3.0}, "optimizer": {"warmup_steps": 9}}
    checks.check(options(**longer))

"""What every stage's real steps exchange on a mesh, and what of them lies on each device."""

from __future__ import annotations

import re

import jax
import pytest

from rlhf_jax.devices import planning_for
from rlhf_jax.models.lora import param_count
from rlhf_jax.plan import steps
from rlhf_jax.plan.compiled_text import count
from rlhf_jax.stages.defaults import resolve
from tests.plan.test_plan import STEPS, hub, pretraining, stages

DEVICES, LENGTH, WIDTH, INNER = 8, 64, 16, 32
SMALL = 4096  # bytes: sums of metrics, and gradients of the norms' scales
__all__ = ["hub"]


QUICK = ("preference",)
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STEPS]


@pytest.mark.parametrize("name", ["pretrain", *ALL])
def test_a_stage_on_eight_devices(name, hub):
    config = dict([("pretrain", pretraining(batch={"rows": 8})), *stages(hub)])[name]
    config.mesh.fsdp = DEVICES
    if "model" in config:
        config.model.mlp_width = INNER
    with planning_for(jax.devices()[:DEVICES]):
        found = steps.steps_of(resolve(config))
        texts = {step.name: step.lower().compile().as_text() for step in found}
    for step in found:
        check(step, texts[step.name])


def check(step: steps.Step, text: str) -> None:
    """Weights are gathered, their gradients scattered, and activations stay where they are."""
    counted = count(text, DEVICES)
    sizes = {kind: size for kind, (_, size) in counted.collectives.items()}
    if step.name.startswith("decode"):
        assert sizes == {}
        return
    assert sizes.pop("all-reduce", 0) < SMALL
    models = step.holds["parameters"]
    held = 4 * param_count(models[0] if isinstance(models, tuple) else models)
    updates = step.name.startswith("update")
    # A layer is gathered once more in the backward pass; the policy and its reference score. A
    # device has all hidden states for its words, and eight numbers at most for each target.
    times = 2 if updates or step.name == "scoring" else 1
    rows, targets = step.holds["batch"]["tokens"].shape[0], 0
    if "sources" in step.holds["batch"]:
        targets = step.holds["batch"]["sources"].size
    hidden = 4 * targets * WIDTH
    assert 0 < sizes.pop("all-gather") <= times * (held + SMALL + hidden + 4 * targets * 8)
    if updates:
        assert 0 < sizes.pop("reduce-scatter") <= (held + hidden) / DEVICES
    assert sizes.pop("all-to-all", 0) <= 2 * 4 * LENGTH * WIDTH * 8
    assert sizes == {}
    assert not re.search(rf"f32\[({rows},{LENGTH}|{rows * LENGTH}),{INNER}\]", text)
    assert re.search(rf"f32\[({rows // DEVICES},{LENGTH}|{rows // DEVICES * LENGTH}),", text)

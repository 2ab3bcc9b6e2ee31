"""What every stage's real steps exchange on a mesh, and what of them lies on each device."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import jax
import pytest

from rlhf_jax.devices import planning_for
from rlhf_jax.models.lora import param_count
from rlhf_jax.plan import steps
from rlhf_jax.plan.chips import devices_of
from rlhf_jax.plan.compiled_text import count
from rlhf_jax.stages.defaults import resolve
from tests.plan.test_plan import STEPS, hub, pretraining, stages
from tests.plan.test_plan_compilers import GPU, TPU

DEVICES = 8
__all__ = ["hub"]


@dataclass(frozen=True)
class Size:
    """Tokens a row, and widths of the model and of its MLPs."""

    length: int = 64
    width: int = 16
    inner: int = 32

    @property
    def small(self) -> int:
        """Bytes: sums of metrics, and gradients of the norms' scales."""
        return 4096 + 20 * self.width


QUICK = ("preference",)
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in STEPS]


@pytest.mark.parametrize("name", ["pretrain", *ALL])
def test_a_stage_on_eight_devices(name, hub):
    check_stage(name, hub, jax.devices()[:DEVICES], Size())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", *STEPS])
@pytest.mark.parametrize(
    "topology",
    [
        pytest.param("v5e:2x4", marks=pytest.mark.skipif(not TPU, reason="no libtpu")),
        pytest.param("h100:8", marks=pytest.mark.skipif(not GPU, reason="no CUDA plugin")),
    ],
)
def test_a_stage_on_eight_chips_that_are_not_there(topology, name, hub):
    size = Size(128, 256, 512)  # of smaller arrays a TPU's compiler makes all-reduces
    check_stage(name, hub, devices_of(topology)[1], size)


def check_stage(name: str, hub: str, devices: list, size: Size) -> None:
    """Compiles a stage's steps for eight devices, and checks each."""
    path, heads = Path(hub, "config.json"), size.width // 8
    document = {"hidden_size": size.width, "intermediate_size": size.inner}
    document |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2, "head_dim": 8}
    path.write_text(json.dumps(json.loads(path.read_text()) | document))
    config = dict([("pretrain", pretraining(batch={"rows": 8})), *stages(hub)])[name]
    config.mesh.fsdp, config.data.row_length = DEVICES, size.length
    if "model" in config:
        config.model.update(width=size.width, mlp_width=size.inner)
        config.model.update(heads=heads, kv_heads=heads // 2, head_dim=8)
    with planning_for(devices):
        found = steps.steps_of(resolve(config))
        texts = {step.name: step.lower().compile().as_text() for step in found}
    for step in found:
        check(step, texts[step.name], size)


def check(step: steps.Step, text: str, size: Size) -> None:
    """Weights are gathered, their gradients scattered, and activations stay where they are."""
    counted = count(text, DEVICES)
    sizes = {kind: moved for kind, (_, moved) in counted.collectives.items()}
    if step.name.startswith("decode"):
        assert sizes == {}
        return
    assert sizes.pop("all-reduce", 0) < size.small
    models = step.holds["parameters"]
    held = 4 * param_count(models[0] if isinstance(models, tuple) else models)
    updates = step.name.startswith("update")
    # A layer is gathered once more in the backward pass; the policy and its reference score. A
    # device has all hidden states for its words, and eight numbers at most for each target.
    times = 2 if updates or step.name == "scoring" else 1
    rows, targets = step.holds["batch"]["tokens"].shape[0], 0
    if "sources" in step.holds["batch"]:
        targets = step.holds["batch"]["sources"].size
    hidden = 4 * targets * size.width
    assert 0 < sizes.pop("all-gather") <= times * (held + size.small + hidden + 4 * targets * 8)
    if updates:
        assert 0 < sizes.pop("reduce-scatter") <= (held + hidden) / DEVICES
    assert sizes.pop("all-to-all", 0) <= 2 * 4 * size.length * size.width * 8
    assert sizes == {}
    length, inner = size.length, size.inner
    assert not re.search(rf"f32\[({rows},{length}|{rows * length}),{inner}\]", text)
    assert re.search(rf"f32\[({rows // DEVICES},{length}|{rows // DEVICES * length}),", text)

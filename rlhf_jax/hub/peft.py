"""Our adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax.errors import UserError
from rlhf_jax.hub.families import FAMILIES
from rlhf_jax.hub.hf_config import to_document
from rlhf_jax.hub.hf_weights import make_rules, rounded, save_tensors, weights_dtype
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.lora import AdapterConfig, own
from rlhf_jax.trees import named_leaves

_NAMES = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def write_adapter(
    directory: Path,
    config: ModelConfig,
    params: Mapping[str, Any],
    adapter: AdapterConfig,
    base: Path,
    *,
    dtype: str = "float32",
) -> None:
    """Writes the adapter, and a score head beside it, for `peft` to put on the model in `base`.

    Raises:
        UserError: an unknown dtype, one that cannot hold a number of the adapter, or a kernel with
            an adapter is only a part of one of the model type's tensors.
    """
    numpy_type = weights_dtype(dtype)
    kind, _ = to_document(config)
    tensors, targets = _adapter_tensors(kind, config, params)
    for name, tensor in tensors.items():
        tensors[name] = rounded(name, tensor, numpy_type)
    save_tensors(tensors, directory / "adapter_model.safetensors")
    scalar = config.head == "scalar"
    described = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scalar else "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(targets),
        "modules_to_save": ["score"] if scalar else None,
        "use_rslora": adapter.kind == "rslora",
        "use_dora": adapter.kind == "dora",
        "fan_in_fan_out": FAMILIES[kind].inputs_first,
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(described, indent=2) + "\n")


def _adapter_tensors(
    kind: str, config: ModelConfig, params: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], set[str]]:
    """The adapter's tensors by PEFT's names, and the names of the modules that have one."""
    family, prefix = FAMILIES[kind], "base_model.model."
    modules = {
        rule.ours[0].removesuffix("/kernel"): rule
        for rule in make_rules(family, config)
        if rule.based
    }
    tensors: dict[str, np.ndarray] = {}
    targets: set[str] = set()
    for name, leaf in named_leaves(own(params)).items():
        module, _, number = name.rpartition("/lora/")
        if number == "scale":
            continue
        if not module:
            tensors[f"{prefix}score.weight"] = np.asarray(leaf).T
            continue
        rule = modules.get(module)
        if rule is None or len(rule.ours) > 1:
            raise UserError(
                f"{module} is a part of one tensor in a {kind} model, so PEFT cannot hold its "
                "adapter: export the merged model (--merge)"
            )
        theirs = rule.theirs.removesuffix(".weight")
        targets.add(theirs.rpartition(".")[2])
        for i, value in enumerate(np.asarray(leaf)):
            key = f"{prefix}{family.bases[0]}{theirs.format(i=i)}.{_NAMES[number]}"
            tensors[key] = value.T
    return tensors, targets

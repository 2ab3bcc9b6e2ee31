"""A model as a finished stage leaves it: <run>/model and <run>/tokenizer.json."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.training.checkpoint import load_params, save_params


@dataclass(frozen=True)
class Model:
    """What a stage starts from and what it makes.

    `normalization` is the mean and the standard deviation of a reward model's scores of what the
    policy it began as answers; who optimises against it may take scores in units of that.
    """

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    normalization: tuple[float, float] | None = None

    def flops_per_token(self) -> float:
        """6 × parameters: forward and backward of the matrix products, attention left out."""
        return 6.0 * sum(x.size for x in jax.tree.leaves(self.params))


def save_model(workdir: str | os.PathLike[str], model: Model) -> None:
    """Writes the model into a run directory, atomically, over an older one if there is one."""
    document = {
        "config": dataclasses.asdict(model.config),
        "tokenizer_hash": model.tokenizer.hash,
        "normalization": model.normalization,
    }
    model.tokenizer.save(Path(workdir) / "tokenizer.json")
    save_params(Path(workdir) / "model", model.params, document)


def load_model(workdir: str | os.PathLike[str], **changes: Any) -> Model:
    """The model of a finished run, with `changes` to fields of its config.

    Raises:
        UserError: there is none, it is damaged, it was trained with another tokenizer, or its
            config has a field this version lacks.
    """
    params, document = load_params(Path(workdir) / "model")
    tokenizer = Tokenizer.load(Path(workdir) / "tokenizer.json")
    if tokenizer.hash != document["tokenizer_hash"]:
        raise UserError(f"{workdir}/tokenizer.json is not the tokenizer its model was trained with")
    fields = document["config"] | changes
    unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(ModelConfig)})
    if unknown:
        raise UserError(
            f"the model in {workdir} was saved by another version: this one knows no "
            f"model.{unknown[0]}; train it anew"
        )
    stated = document.get("normalization")  # older versions wrote none
    normalization = (float(stated[0]), float(stated[1])) if stated else None
    return Model(ModelConfig(**fields).validate(), params, tokenizer, normalization)

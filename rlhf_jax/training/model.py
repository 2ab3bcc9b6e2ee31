"""A model as a finished stage leaves it, <run>/model and its tokenizer, or as it came.

A directory of Hugging Face files is read where a run's directory is: `init.policy` may name one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.data.chat import AnyTokenizer
from rlhf_jax.data.hub_tokenizer import HubTokenizer
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.errors import UserError
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.hf_config import read_config
from rlhf_jax.models.hf_weights import read_weights
from rlhf_jax.training.checkpoint import load_params, save_params


@dataclass(frozen=True)
class Model:
    """What a stage starts from and what it makes.

    `normalization` is the mean and the standard deviation of a reward model's scores of what the
    policy it began as answers; who optimises against it may take scores in units of that.
    """

    config: ModelConfig
    params: Any
    tokenizer: AnyTokenizer
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
    _save_tokenizer(Path(workdir), model.tokenizer)
    save_params(Path(workdir) / "model", model.params, document)


def load_model(workdir: str | os.PathLike[str], **changes: Any) -> Model:
    """The model of a finished run or a Hugging Face directory, with `changes` to its config.

    Raises:
        UserError: there is none, it is damaged, it was trained with another tokenizer, or its
            config has a field this version lacks.
    """
    if is_hub_directory(workdir):
        return _load_hub(Path(workdir), changes)
    params, document = load_params(Path(workdir) / "model")
    tokenizer = _load_tokenizer(Path(workdir))
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


def is_hub_directory(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a Hugging Face model, by its config.json."""
    try:
        document = json.loads((Path(path) / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and "model_type" in document


def _load_hub(directory: Path, changes: Mapping[str, Any]) -> Model:
    kind, config = read_config(directory)
    tokenizer = HubTokenizer.load(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is "
            f"{config.vocab_size}"
        )
    config = dataclasses.replace(config, **changes).validate()
    return Model(config, read_weights(directory, kind, config), tokenizer)


def _save_tokenizer(workdir: Path, tokenizer: AnyTokenizer) -> None:
    if isinstance(tokenizer, Tokenizer):
        tokenizer.save(workdir / "tokenizer.json")
        return
    (workdir / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(workdir / "tokenizer")


def _load_tokenizer(workdir: Path) -> AnyTokenizer:
    if (workdir / "tokenizer").is_dir():
        return HubTokenizer.load(workdir / "tokenizer")
    return Tokenizer.load(workdir / "tokenizer.json")


def fingerprint(directory: Path) -> str:
    """Tells Hugging Face directories apart: names, sizes, and both ends of what the files hold."""
    digest = hashlib.sha256()
    for path in sorted(p for p in directory.iterdir() if p.suffix in (".json", ".safetensors")):
        with open(path, "rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            digest.update(file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:12]

"""A model as a finished stage leaves it in <run>/model with its tokenizer, or as it came.

A directory of Hugging Face files is read like a run's: `init.policy` may name one.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from rlhf_jax import hosts
from rlhf_jax.config import Config
from rlhf_jax.data import packing
from rlhf_jax.data.conversation import Tokenizer
from rlhf_jax.data.tokenizer import OwnTokenizer
from rlhf_jax.digests import file_digest, json_digest
from rlhf_jax.errors import UserError
from rlhf_jax.files import check_fields, read_object
from rlhf_jax.hub.hf_config import read_config
from rlhf_jax.hub.hf_weights import read_weights
from rlhf_jax.hub.hub_tokenizer import HubTokenizer
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.models.lora import (
    AdapterConfig,
    attach,
    combine,
    merge,
    own,
    param_count,
    quantize,
    split,
)
from rlhf_jax.models.transformer import init
from rlhf_jax.training.checkpoint import load_document, load_params, save_params
from rlhf_jax.training.mesh import mesh_of, placed, sharding
from rlhf_jax.training.rundir import SUMMARY
from rlhf_jax.trees import named_leaves

_READ = (".json", ".jinja", ".safetensors")  # suffixes of a Hugging Face directory's files


@dataclass(frozen=True, eq=False)
class Base:
    """The weights of a directory, which are never changed; models under adapters may share them.

    `form` says how they are held: see `AdapterConfig.base`.
    """

    directory: Path
    fingerprint: str
    form: str
    mesh: Mesh | None
    params: Any

    @property
    def released(self) -> bool:
        """Whether training has given up the arrays."""
        leaves = jax.tree.leaves(self.params)
        return any(isinstance(x, jax.Array) and x.is_deleted() for x in leaves)


_bases: weakref.WeakValueDictionary[tuple, Base] = weakref.WeakValueDictionary()


@dataclass(frozen=True)
class Model:
    """A model that a stage starts from or makes.

    `params` hold the adapter if there is one, and `base` is then what it is on. `normalization` is
    the mean and the standard deviation of a reward model's scores of answers by the policy that it
    began as; whoever optimises against it may take scores in these units.
    """

    config: ModelConfig
    params: Any
    tokenizer: Tokenizer
    normalization: tuple[float, float] | None = None
    adapter: AdapterConfig | None = None
    base: Base | None = None

    def flops_per_token(self) -> float:
        """FLOPs of training: 6 × parameters, 4 × where they are frozen, attention left out."""
        trained = sum(x.size for x in jax.tree.leaves(split(self.params)[0]))
        if self.adapter is None:
            return 6.0 * trained
        return 4.0 * param_count(self.params) + 6.0 * trained


def save_model(workdir: str | os.PathLike[str], model: Model) -> None:
    """Writes the model into a run directory, atomically, over an older one if there is one.

    For a model under an adapter only what its base lacks is written, and where the base lies.
    """
    document: dict[str, Any] = {
        "config": dataclasses.asdict(model.config),
        "tokenizer_hash": model.tokenizer.hash,
        "normalization": model.normalization,
    }
    params, base = model.params, model.base
    if model.adapter is not None:
        assert base is not None
        params = own(params)
        document["adapter"] = dataclasses.asdict(model.adapter)
        document["base"] = {"directory": str(base.directory), "fingerprint": base.fingerprint}
    document["weights"] = packing.fingerprint(named_leaves(params))
    hosts.by_first(lambda: model.tokenizer.save(Path(workdir)))
    save_params(Path(workdir) / "model", params, document)


def load_model(
    workdir: str | os.PathLike[str], *, mesh: Mesh | None = None, **changes: Any
) -> Model:
    """The model of a finished run or a Hugging Face directory, with `changes` to its config.

    On a mesh every weight is read to where it belongs; the whole is never on one device.

    Raises:
        UserError: there is none, it is damaged, it was trained with another tokenizer, its config
            has a field this version lacks or other parameters, or the base its adapter is on has
            moved or changed.
    """
    directory = Path(workdir).resolve()
    if is_hub_directory(directory):
        return _load_hub(directory, mesh, changes)
    if not (directory / "model").is_dir() and not (directory / SUMMARY).exists():
        there = what_is_there(directory)
        raise UserError(f"{workdir} is not the directory of a finished run{there}")
    document = _read_document(directory / "model")
    tokenizer = load_tokenizer(directory)
    if tokenizer.hash != document["tokenizer_hash"]:
        raise UserError(f"{workdir}/tokenizer.json is not the tokenizer its model was trained with")
    # What a kernel needs is had where it was trained, perhaps not here.
    fields = document["config"] | {"attention": "reference"} | changes
    unknown = sorted(set(fields) - {field.name for field in dataclasses.fields(ModelConfig)})
    if unknown:
        raise UserError(
            f"the model in {workdir} was saved by another version: this one knows no "
            f"model.{unknown[0]}; train it anew"
        )
    stated = document.get("normalization")  # older versions wrote none
    try:
        config = ModelConfig(**fields).validate()
        normalization = (float(stated[0]), float(stated[1])) if stated else None
        adapter = AdapterConfig(**document["adapter"]).validate() if "adapter" in document else None
    except (IndexError, TypeError, ValueError) as error:
        raise UserError(
            f"{directory}/model/data.json is not as this package writes it: {str(error)[:200]}"
        ) from error
    if adapter is None:
        base = _share_base(directory, "float32", mesh, partial(_load_run, directory, config, mesh))
        return Model(config, base.params, tokenizer, normalization, base=base)
    below = Path(document["base"]["directory"])
    if not below.is_dir():
        raise UserError(f"{directory} is an adapter on {below}, which is not there")
    if fingerprint(below) != document["base"]["fingerprint"]:
        raise UserError(f"{directory} is an adapter on {below}, which has changed since")
    base = _load_base(below, adapter.base, mesh)
    added, _ = load_params(directory / "model", mesh=mesh)
    body = {k: v for k, v in base.params.items() if k != "lm_head" or config.head == "lm"}
    params = combine(added, body)
    return Model(config, params, tokenizer, normalization, adapter, base)


def load_like(config: Config, workdir: str | os.PathLike[str]) -> Model:
    """`load_model` on the config's mesh, computed as it says."""
    changes = {} if config.compute is None else dataclasses.asdict(config.compute)
    return load_model(workdir, mesh=mesh_of(config), **changes)


def load_speaker(workdir: str | os.PathLike[str]) -> Model:
    """`load_model` of a language model; UserError too if it is a reward model."""
    model = load_model(workdir)
    if model.config.head != "lm":
        raise UserError(f"{workdir} is a reward model; it does not speak")
    return model


def _read_document(directory: Path) -> dict[str, Any]:
    """The document that `save_model` wrote, with fields of the right types."""
    document, path = load_document(directory), directory / "data.json"
    check_fields(path, document, {"config": dict, "tokenizer_hash": str})
    check_fields(path, document, {"normalization": list | None}, required=False)
    if "adapter" in document:
        check_fields(path, document, {"adapter": dict, "base": dict})
        check_fields(path, document["base"], {"directory": str, "fingerprint": str})
    return document


def as_trainable(model: Model, adapter: AdapterConfig, seed: int) -> Model:
    """The model with what `adapter` asks for: a fresh one, the model's own, or none.

    A model that has an adapter goes on with it if `adapter` is the same. If `adapter` is none
    (rank 0) it is merged, and all weights are trained.

    Raises:
        UserError: the model has another adapter, or `adapter` does not fit it.
    """
    adapter.validate()
    if model.adapter == adapter or (model.adapter is None and not adapter.rank):
        return model
    base = model.base
    assert base is not None
    if model.adapter is None:
        base = _load_base(base.directory, adapter.base, base.mesh)
        params = placed(base.mesh, attach(base.params, adapter, jax.random.key(seed)))
        return dataclasses.replace(model, params=params, adapter=adapter, base=base)
    if adapter.rank:
        asked = dataclasses.asdict(adapter)
        name = next(k for k, v in dataclasses.asdict(model.adapter).items() if v != asked[k])
        raise UserError(
            f"the model has an adapter with {name} = {getattr(model.adapter, name)!r}, the "
            f"config asks for {asked[name]!r}: give the same adapter, or export the model "
            "with --merge and start from that"
        )
    print(f"the adapter on {base.directory} is merged: all weights are trained", flush=True)
    return dataclasses.replace(model, params=merge(model.params), adapter=None, base=None)


def _share_base(directory: Path, form: str, mesh: Mesh | None, load: Callable[[], Any]) -> Base:
    """The weights that `load` reads of a directory, once while any model of them is alive."""
    now, key = fingerprint(directory), (str(directory), form, mesh)
    base = _bases.get(key)
    if base is None or base.fingerprint != now or base.released:
        base = Base(directory, now, form, mesh, load())
        _bases[key] = base
    return base


def _load_base(directory: Path, form: str, mesh: Mesh | None) -> Base:
    """The weights of a directory, its layers' kernels in the form that `form` names."""
    if form == "float32":
        base = load_model(directory, mesh=mesh).base
        assert base is not None
        return base

    def load() -> Any:
        return placed(mesh, quantize(load_model(directory, mesh=mesh).params, form))

    return _share_base(directory, form, mesh, load)


def is_hub_directory(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds a Hugging Face model, by its config.json.

    Raises:
        UserError: there is a config.json that holds no JSON object.
    """
    config = Path(path) / "config.json"
    return config.exists() and "model_type" in read_object(config)


def what_is_there(directory: Path) -> str:
    """What is where a run or a model was looked for, and what to do about it."""
    if not directory.exists():
        return (
            ", and there is no such directory; a model of the Hub is downloaded beforehand, as by "
            "hf download NAME --local-dir DIRECTORY"
        )
    if (directory / "adapter_config.json").exists():
        return " but an adapter of PEFT; merge it into its model, and name what that is saved to"
    if (directory / "config.json").exists():
        return ": it has not ended; its command goes on with it"
    return ", and has no config.json of a model"


def _load_run(directory: Path, config: ModelConfig, mesh: Mesh | None) -> Any:
    """The parameters that a run has saved, which have to be those of its model's config."""
    params, _ = load_params(directory / "model", mesh=mesh)
    fresh = jax.eval_shape(partial(init, config), jax.random.key(0))
    there, stated = (
        {name: leaf.shape for name, leaf in named_leaves(tree).items()} for tree in (params, fresh)
    )
    for name in sorted({*there, *stated}):
        if there.get(name) != stated.get(name):
            raise UserError(
                f"the model in {directory} is of another version: {name} has the shape "
                f"{there.get(name, 'none')}, in its config {stated.get(name, 'none')}; train anew"
            )
    return params


def _load_hub(directory: Path, mesh: Mesh | None, changes: Mapping[str, Any]) -> Model:
    kind, config = read_config(directory)
    tokenizer = HubTokenizer.load(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model's vocab_size is "
            f"{config.vocab_size}"
        )
    place = None if mesh is None else partial(sharding, mesh)
    base = _share_base(
        directory, "float32", mesh, lambda: read_weights(directory, kind, config, place)
    )
    edges = [-1, *sorted(tokenizer.ids), config.vocab_size]
    unused = tuple((a + 1, b) for a, b in itertools.pairwise(edges) if b - a > 1)
    config = dataclasses.replace(config, **{"unused": unused, **changes}).validate()
    return Model(config, base.params, tokenizer, base=base)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Reads the tokenizer of a run or a Hugging Face directory; UserError if it cannot."""
    if is_hub_directory(directory):
        return HubTokenizer.load(directory)
    if (directory / "tokenizer").is_dir():
        return HubTokenizer.load(directory / "tokenizer")
    return OwnTokenizer.load(directory / "tokenizer.json")


def fingerprint(directory: Path) -> str:
    """Tells directories of models apart by all that is read of them: weights, tokenizer, config.

    For a run that is what its model's document states, the same whenever the numbers are the same
    (the files that Orbax writes differ each time); for Hugging Face's it is the files' contents.
    """
    if is_hub_directory(directory):
        files = {p.name: p for p in directory.iterdir() if p.suffix in _READ}
        templates = directory.glob("additional_chat_templates/*.jinja")
        files |= {f"{path.parent.name}/{path.name}": path for path in templates}
        stated: Any = [(name, file_digest(path)) for name, path in sorted(files.items())]
    else:
        stated = load_document(directory / "model")
        if "weights" not in stated:  # saved by an older version
            stated["weights"] = file_digest(directory / "model" / "manifest.json")
        if "base" in stated:  # wherever it lies
            check_fields(directory / "model/data.json", stated, {"base": {"what": str}})
            stated["base"] = stated["base"].get("fingerprint")
    return json_digest(stated)

"""Writes a model for other tools: `python -m rlhf_jax.export --workdir=runs/dpo --out=dpo-hf`.

The directory loads in transformers: a language model, or a reward model for sequence
classification, with its tokenizer and chat template, and a card that says how it was made. A model
under an adapter is written as PEFT's adapter; with `--merge` as a whole model. What other readers
make of it is in benchmarks/READERS.md. `--push=owner/name` uploads it to the Hugging Face Hub, as
who is logged in there (`hf auth login`, or $HF_TOKEN). Exit codes: 0 done, 2 the user's mistake,
1 a bug.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_jax import __version__
from rlhf_jax.commands import Parser, run
from rlhf_jax.errors import UserError

if TYPE_CHECKING:
    from rlhf_jax.training.saved_model import Model


def export(
    workdir: Path, out: Path, *, dtype: str | None, shard_bytes: int, merge: bool = False
) -> None:
    """Writes the model of a finished run into `out`.

    An adapter names its base by path; a base that is one of our runs is written into `out`/base.
    Without a `dtype` weights are written as Hugging Face's files held them if they are still those,
    or an adapter merged into those, and in float32 if all were trained.

    Raises:
        UserError: there is no such model, no model type of transformers computes what it does, or
            `out` holds something already.
    """
    from rlhf_jax.hub.hf_weights import stored_dtype, write_weights
    from rlhf_jax.hub.peft import write_adapter
    from rlhf_jax.model_card import model_card
    from rlhf_jax.models import lora
    from rlhf_jax.training.saved_model import is_hub_directory, load_model

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty directory")
    if shard_bytes < 1:
        raise UserError(f"--shard-bytes = {shard_bytes} must be at least 1")
    model = load_model(workdir)
    base = None if model.base is None else model.base.directory
    from_hub = base is not None and is_hub_directory(base)
    what = "reward model" if model.config.head == "scalar" else "language model"
    library, written = "transformers", dtype or "float32"
    with _filling(out):
        if model.adapter is not None and base is not None and not merge:
            beside = base if from_hub else (out / "base").resolve()
            write_adapter(out, model.config, model.params, model.adapter, beside, dtype=written)
            if not from_hub:
                export(base, out / "base", dtype=dtype, shard_bytes=shard_bytes)
            what, library = f"LoRA adapter of a {what}", "peft"
        else:
            if dtype is None and from_hub and base is not None:
                written = stored_dtype(base)
                print(f"weights are written in {written}, as in {base}; --dtype names another",
                      flush=True)  # fmt: skip
            params = model.params if model.adapter is None else lora.merge(model.params)
            ids = _special_ids(model)
            write_weights(
                out, model.config, params, dtype=written, shard_bytes=shard_bytes, extra=ids
            )
        card = model_card(workdir, out.resolve().name, what=what, dtype=written, library=library)
        (out / "README.md").write_text(card, "utf-8")
        model.tokenizer.export(out)


@contextmanager
def _filling(out: Path) -> Iterator[None]:
    """Makes a directory, which is left empty by whatever ends what happens inside early."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        raise


def _special_ids(model: Model) -> dict[str, Any]:
    """The tokenizer's, for config.json, but for a padding token that would move a score."""
    ids = model.tokenizer.special_ids
    if model.config.head == "scalar" and ids["pad_token_id"] in model.tokenizer.ends:
        ids["pad_token_id"] = None
        print(
            "no pad_token_id is written: it would be that of the token that ends a reply, before "
            "which transformers would then read the score",
            flush=True,
        )
    return ids


def check_push(name: str) -> None:
    """UserError for what is seen to be wrong before a model is written: name, library, login."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"--push={name}: a repository of the Hub is named owner/name")
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import LocalTokenNotFoundError
    except ImportError as error:
        raise UserError("--push needs the package huggingface_hub: pip install it") from error
    try:
        HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise UserError("--push needs a login: run `hf auth login`, or set HF_TOKEN") from error
    except Exception as error:  # of the library, or of what it sends by: refused, no network
        raise UserError(f"--push: the Hub says {_line(error)}") from error


def push(out: Path, name: str, *, public: bool) -> str:
    """Uploads a directory as the model `owner/name`, which is made if need be; returns its address.

    Raises:
        UserError: the Hub refuses, or it is an adapter; what is written stays.
    """
    from huggingface_hub import HfApi

    if (out / "adapter_config.json").exists():
        raise UserError(
            f"{out} is an adapter, which names its base by a path on this machine; with --merge "
            "the whole model is written and uploaded"
        )
    api = HfApi()
    try:
        address = api.create_repo(name, private=not public, exist_ok=True)
        message = f"Written by rlhf_jax {__version__}"
        api.upload_folder(repo_id=name, folder_path=out, commit_message=message)
    except Exception as error:  # as above
        raise UserError(
            f"--push={name}: the Hub says {_line(error)}; {out} is whole: `hf upload {name} {out}`"
        ) from error
    return str(address)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    parser = Parser(prog="python -m rlhf_jax.export", description="Writes a model for others.")
    parser.add_argument("--workdir", required=True, help="a finished run")
    parser.add_argument("--out", required=True, help="the directory to write, new or empty")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; default: as weights came")
    parser.add_argument("--shard-bytes", type=int, default=5 * 10**9, help="the most a file holds")
    parser.add_argument("--merge", action="store_true", help="fold the adapter into the weights")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload it to the Hugging Face Hub")
    parser.add_argument("--public", action="store_true", help="a repository that is made is public")

    def command(given: argparse.Namespace) -> None:
        out, options = Path(given.out), {"dtype": given.dtype, "shard_bytes": given.shard_bytes}
        if given.public and not given.push:
            raise UserError("--public is of a repository of --push")
        if given.push:
            check_push(given.push)
        export(Path(given.workdir), out, merge=given.merge, **options)
        print(f"written: {out}", flush=True)
        if given.push:
            print(f"uploaded: {push(out, given.push, public=given.public)}", flush=True)

    return run(parser, command, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Writes a model for other tools: `python -m rlhf_jax.export --workdir=runs/dpo --out=dpo-hf`.

The directory loads in transformers: a language model, or a reward model for sequence
classification, with its tokenizer and chat template. A model under an adapter is written as PEFT's
adapter; with `--merge` as a whole model. Exit codes: 0 done, 2 the user's mistake, 1 a bug.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_jax.commands import Parser, run
from rlhf_jax.errors import UserError


def export(workdir: Path, out: Path, *, dtype: str, shard_bytes: int, merge: bool = False) -> None:
    """Writes the model of a finished run into `out`.

    An adapter names its base by path; a base that is one of our runs is written into `out`/base.

    Raises:
        UserError: there is no such model, no model type of transformers computes what it does, or
            `out` holds something already.
    """
    from rlhf_jax.models import lora
    from rlhf_jax.models.hf_weights import write_weights
    from rlhf_jax.models.peft import write_adapter
    from rlhf_jax.training.model import is_hub_directory, load_model

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty directory")
    if shard_bytes < 1:
        raise UserError(f"--shard-bytes = {shard_bytes} must be at least 1")
    model = load_model(workdir)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = model.tokenizer
    if model.adapter is not None and model.base is not None and not merge:
        base, given = model.base.directory, is_hub_directory(model.base.directory)
        named = base if given else (out / "base").resolve()
        write_adapter(out, model.config, model.params, model.adapter, named, dtype=dtype)
        if not given:
            export(base, out / "base", dtype=dtype, shard_bytes=shard_bytes)
    else:
        params = model.params if model.adapter is None else lora.merge(model.params)
        special = {"bos_token_id": tokenizer.bos, "eos_token_id": list(tokenizer.ends)}
        special |= {"pad_token_id": tokenizer.pad}
        write_weights(
            out, model.config, params, dtype=dtype, shard_bytes=shard_bytes, extra=special
        )
    tokenizer.export(out)  # last, so that a model that cannot be written leaves an empty directory


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    parser = Parser(prog="python -m rlhf_jax.export", description="Writes a model for others.")
    parser.add_argument("--workdir", required=True, help="a finished run")
    parser.add_argument("--out", required=True, help="the directory to write, new or empty")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--shard-bytes", type=int, default=5 * 10**9, help="the most a file holds")
    parser.add_argument("--merge", action="store_true", help="fold the adapter into the weights")

    def command(given: argparse.Namespace) -> None:
        out, options = Path(given.out), {"dtype": given.dtype, "shard_bytes": given.shard_bytes}
        export(Path(given.workdir), out, merge=given.merge, **options)
        print(f"written: {out}", flush=True)

    return run(parser, command, argv)


if __name__ == "__main__":
    sys.exit(main())

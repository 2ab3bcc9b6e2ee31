"""Says what to do where the host's or a device's memory is not enough for a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ml_collections import ConfigDict

from rlhf_jax.config import document, leaves
from rlhf_jax.errors import UserError, lack_of_memory
from rlhf_jax.stages.defaults import resolve

# Fields whose smaller values need less, those that change least of a run first.
_SMALLER = (
    *("rollout.slots", "batch.rows", "data.row_length", "rollout.max_new_tokens"),
    *("model.width", "model.layers", "oracle.threads"),
)


@contextmanager
def naming_memory(config: ConfigDict, workdir: Path | None = None) -> Iterator[None]:
    """Within it a lack of memory becomes a UserError that names the fields to change.

    Args:
        config: of the stage that is run.
        workdir: its run directory; None: none is written.
    """
    try:
        yield
    except Exception as error:
        asked = lack_of_memory(error)
        if asked is None:
            raise
        fields = "; ".join(smaller_fields(config))
        state = "" if workdir is None else f". {_state(workdir)}"
        raise UserError(f"memory ran out: {asked}. Less is needed with {fields}{state}") from error


def smaller_fields(config: ConfigDict) -> Iterator[str]:
    """The fields this config has that lower what is held at a time, and which way."""
    found = leaves(document(resolve(config)))
    if 1 <= found.get("batch.microbatches", 0) < found["batch.rows"]:
        yield f"a larger --config.batch.microbatches (now {found['batch.microbatches']})"
    for name in ("compute.remat", "model.remat"):
        if found.get(name, "full") != "full":
            yield f"--config.{name}=full (now {found[name]})"
    smaller = [
        f"--config.{name} (now {found[name]})" for name in _SMALLER if found.get(name, 1) > 1
    ]
    if smaller:
        yield f"a smaller {', '.join(smaller)}"
    if "eval.max_new_tokens" in found:
        now = found["eval.max_new_tokens"]
        yield f"in evaluations, a smaller --config.eval.max_new_tokens (now {now})"


def _state(workdir: Path) -> str:
    """Says which checkpoints of the run are kept, and how to go on from them."""
    steps = [p.name for p in workdir.glob("checkpoints/*") if p.name.isdecimal()]
    if not steps:
        return f"{workdir} has no checkpoint yet: the run begins anew"
    return (
        f"{workdir} keeps its checkpoint of step {int(max(steps))}: once more memory is free the "
        "same command goes on from it; with other values of these fields, but those of eval, it is "
        "another run, which --rerun begins anew"
    )

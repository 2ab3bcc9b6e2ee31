"""Comparing what two runs are made from: their configs, and the rest that decides a result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rlhf_jax.digests import json_digest

# Prefixes of dotted names: differences that a resumed run may have from what it was made from.
# Every other difference would silently make it another run, and is refused.
FREE = (
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.log_every",
    "train.max_skipped",
    "train.tensorboard",
    "train.wandb",
)
# Free as well, unless evaluations choose the model that is kept (train.best).
FREE_EVALUATION = ("contents.eval", "eval", "train.eval_every")


def plain(config) -> dict[str, Any]:
    """A ConfigDict or mapping as JSON has it: dicts, lists, numbers, strings."""
    text = config.to_json() if hasattr(config, "to_json") else json.dumps(dict(config))
    return json.loads(text)


def changes(old: Mapping, new: Mapping) -> dict[str, tuple[Any, Any]]:
    """{dotted field: (old value, new value)} of what differs; a missing field is "absent"."""
    old, new = _flatten(old), _flatten(new)
    pairs = {k: (old.get(k, "absent"), new.get(k, "absent")) for k in {**old, **new}}
    return {k: pair for k, pair in sorted(pairs.items()) if pair[0] != pair[1]}


def deciding(
    changed: Mapping[str, tuple[Any, Any]], config: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Those of the differences that make a run of that config another one."""
    free = FREE if config.get("train", {}).get("best") else FREE + FREE_EVALUATION
    return {
        name: pair
        for name, pair in changed.items()
        if not any(name == prefix or name.startswith(prefix + ".") for prefix in free)
    }


def lengthens(decides: Mapping[str, tuple[Any, Any]]) -> bool:
    """Whether all that makes it another run is that it is to take more steps."""
    if not decides or not set(decides) <= {"train.steps", "train.epochs"}:
        return False
    return all("absent" not in pair and pair[0] < pair[1] for pair in decides.values())


def decaying(config: Mapping[str, Any]) -> list[str]:
    """The learning rates that depend on how many steps there are, as "optimizer.schedule = …"."""
    sections = [name for name in ("optimizer", "critic") if name in config]
    schedules = {name: config[name].get("schedule") for name in sections}
    return [
        f"{name}.schedule = {schedule!r}"
        for name, schedule in schedules.items()
        if schedule != "constant"
    ]


def config_hash(config: Mapping[str, Any], made_from: Mapping[str, Any]) -> str:
    """A digest of a run's config and what else decides its result, which the commit does not."""
    return json_digest([config, {k: v for k, v in made_from.items() if k != "commit"}])


def tell_changes(
    changed: Mapping[str, tuple[Any, Any]], limit: int = 5, of_files: str = "has changed"
) -> str:
    """Says in one line what differs: a config's fields with their values, then files by name."""
    texts: dict[str, list[str]] = {"": [], "contents": [], "parents": [], "code": []}
    follows = []  # from another difference, unless the older run recorded nothing
    for name, (before, after) in changed.items():
        kind, _, what = name.partition(".")
        if kind not in texts:
            texts[""].append(f"{name}: {before!r} -> {after!r}")
        elif "absent" in (before, after):
            follows.append(f"{name}: {before!r} -> {after!r}")
        else:
            what = f"the model of init.{what}" if kind == "parents" else what
            texts[kind].append(f"{what} {of_files}")
    told = [text for each in texts.values() for text in each] or follows
    more = f" and {len(told) - limit} more" if len(told) > limit else ""
    return ", ".join(told[:limit]) + more


def _flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= (
            _flatten(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
        )
    return flat

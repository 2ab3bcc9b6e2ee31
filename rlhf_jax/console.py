"""The lines that a run prints about its data, and its warnings about data."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from rlhf_jax.config import Config

FEW = 30  # records; a metric of fewer comes with a warning


def say(subject: str, counts: Mapping[str, Any]) -> None:
    """Prints one line of counts: what was read, packed, dropped."""
    shown = (
        f"{k} {v:.1%}" if isinstance(v, float) else f"{k} {v:,}" for k, v in counts.items() if v
    )
    print(f"{subject}: {', '.join(shown)}", flush=True)


def say_encoded(
    config: Config, what: str, counts: Mapping[str, int], further: Mapping[str, Any]
) -> None:
    """Says the counts of `data.encode`, and warns if records did not fit."""
    shown = {name: count for name, count in counts.items() if name != "keeps_95"}
    say(what, shown | dict(further))
    # Raw text beside prompts is split, which loses none.
    policy = getattr(config.data, "over_long", "split")
    for fate in ("dropped", "truncated"):
        warn_over_long(
            what, counts[fate], counts["records"], counts.get("keeps_95", 0),
            f"{fate}, longer than data.row_length = {config.data.row_length} tokens "
            f"(data.over_long = {policy!r})",
        )  # fmt: skip


def warn_over_long(what: str, lost: int, records: int, keeps_95: int, why: str) -> None:
    """Warns of records that do not fit, if any do not."""
    if lost:
        logging.warning(
            "%s: %s of %s records (%.1f %%) are %s; %s would keep 95 %%",
            what, f"{lost:,}", f"{records:,}", 100 * lost / records, why, f"{keeps_95:,}",
        )  # fmt: skip


def say_stripped(what: str, stripped: int, turns: int) -> None:
    """Prints that some of the assistant's turns are left untrained, if they are, and what to do."""
    if stripped:
        print(
            f"warning: {what}: {stripped:,} of {turns:,} replies are left untrained: once the "
            "conversation goes on the chat template writes them otherwise than they are generated "
            "(it strips thoughts, or ends only the last reply); "
            "--config.data.stripped_turns=expand trains them in records of their own",
            flush=True,
        )


def few_records(what: str, count: int) -> list[dict[str, Any]]:
    """Warns of a metric of fewer than FEW records; returns the report's table of it, if any."""
    if count >= FEW:
        return []
    note = f"Measured on {count} {what}, fewer than {FEW}: the numbers may be chance."
    logging.warning("%s", note)
    return [{
        "section": "changes",
        "title": f"Few {what}",
        "columns": ["of", "records"],
        "rows": [[what, count]],
        "note": note,
    }]  # fmt: skip

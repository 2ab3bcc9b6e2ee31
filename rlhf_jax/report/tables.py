"""Numbers as text, and the short table and samples that end a run on the console."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from math import isfinite
from numbers import Integral, Real
from typing import IO, Any

# name in summary.json: a reader's name for it, its unit, its format
METRICS: dict[str, tuple[str, str, str]] = {
    "eval/gold_win_rate": ("Gold win rate", "against the starting model", ".1%"),
    "eval/gold_reward": ("Gold reward", "held-out prompts", ".3f"),
    "eval/correct/facts": ("Facts right", "told in raw text only", ".1%"),
    "eval/pass_at_1": ("Pass@1", "held out", ".1%"),
    "eval/pass^8": ("Pass^8", "eight episodes in a row", ".1%"),
    "eval/needless_calls": ("Needless calls", "of episodes that need none", ".1%"),
    "eval/invalid_calls": ("Invalid calls", "of an episode's calls", ".1%"),
    "eval/accuracy": ("Accuracy", "held out", ".1%"),
    "eval/reward_model/accuracy": ("Reward model's accuracy", "same pairs", ".1%"),
    "eval/bpb": ("Bits per byte", "held out", ".3f"),
    "eval/loss": ("Loss", "nats per token, held out", ".3f"),
    "eval/token_accuracy": ("Token accuracy", "held out", ".1%"),
    "eval/logps/chosen": ("Log-prob of chosen", "nats per reply", ".2f"),
    "eval/logps/rejected": ("Log-prob of rejected", "nats per reply", ".2f"),
    "eval/kl": ("KL to the reference", "nats per sequence", ".2f"),
    "eval/response_length": ("Response length", "tokens", ".1f"),
    "eval/proxy_reward": ("Proxy reward", "what was trained on", ".3f"),
    "eval/ece": ("Calibration error", "ECE", ".3f"),
    "eval/eos_rate": ("Finished answers", "ended by the model", ".1%"),
    "train/tokens_per_second": ("Throughput", "tokens/s", ",.0f"),
}


def format_metric(name: str, value: float | None) -> str:
    """Formats the value of a metric in the metric's own format; a dash where it is missing."""
    spec = METRICS[name][2] if name in METRICS else ".3f"
    if value is None or not isfinite(value):
        return "–"
    return format(value, spec).replace("%", "\u00a0%").replace("-", "\u2212")


def with_unit(name: str) -> str:
    """The label of one of `METRICS` with its unit, if it has one: Response length (tokens)."""
    label, note, _ = METRICS[name]
    unit = note.partition(" per ")[0]
    return f"{label} ({unit})" if unit in ("nats", "tokens", "tokens/s") else label


def format_numbers(values: Sequence[Any]) -> list[str]:
    """Formats numbers that are read together with the same number of decimals.

    Integers stay integers, missing values (None, NaN) become a dash, text is left as it is.
    """
    numbers = [v for v in values if _is_number(v)]
    largest = max(map(abs, numbers), default=0)
    if all(isinstance(v, Integral) for v in numbers):
        spec = ",d"
    elif 0 < largest < 1e-2:
        spec = ".2e"
    else:
        spec = f",.{0 if largest >= 1000 else 1 if largest >= 100 else 2 if largest >= 10 else 3}f"
    return [_format_cell(v, spec) for v in values]


def format_columns(rows: Sequence[Sequence[Any]]) -> list[list[str]]:
    """Formats the cells of a table, the numbers of a column with the same decimals."""
    columns = [format_numbers(column) for column in zip(*rows, strict=True)]
    return [list(row) for row in zip(*columns, strict=True)]


def format_percent(value: float) -> str:
    """Formats 0.784 as "78.4 %" (with a no-break space)."""
    return f"{100 * value:.1f}\u00a0%"


def format_seconds(seconds: float | None) -> str:
    """Formats wall time as a person says it: "48 s", "5 min 12 s", "3 h 07 min"; None as a dash."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def join_turns(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """Returns a prompt as one text; where it has several turns, each starts with its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def make_printable(text: str) -> str:
    """Replaces control characters other than line breaks and tabs by U+FFFD."""
    return "".join(
        "\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    samples: Sequence[Mapping[str, Any]] = (),
    *,
    file: IO[str] | None = None,
) -> None:
    """Prints a table, then samples side by side.

    Colours and width follow the terminal; into a pipe or a file it is plain text of 120 columns,
    or of $COLUMNS. Text of models and users is printed as text: neither markup nor terminal escapes
    in it have any effect.

    Args:
        title: one line above the table.
        columns: headings; the first column is text, the others are numbers.
        rows: sequences as long as `columns`; the numbers of a row share their decimals.
        samples: records of samples.jsonl, `{"prompt": …, "responses": {name: text}}`.
        file: where to; standard output if None.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, highlight=False, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 120
    console.print()
    console.print(Text(make_printable(title), style="bold"), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for i, heading in enumerate(columns):
        table.add_column(Text(heading), justify="right" if i else "left", overflow="fold")
    for label, *values in rows:
        table.add_row(Text(str(label)), *map(Text, format_numbers(values)))
    console.print(table)
    for sample in samples:
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(justify="right", style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        prompt = make_printable(join_turns(sample["prompt"]))
        grid.add_row(Text("prompt"), Text(prompt, style="italic"))
        for name, response in sample["responses"].items():
            grid.add_row(Text(name), Text(make_printable(response) or "(empty)"))
        console.print(grid)
        console.print()


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def _format_cell(value: Any, spec: str) -> str:
    if _is_number(value):
        return format(value, spec).replace("-", "\u2212")
    return "–" if value is None or value != value else str(value)

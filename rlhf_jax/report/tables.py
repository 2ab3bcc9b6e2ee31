"""Numbers as text, and the short table and samples that end a run on the console."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from math import isfinite
from numbers import Integral, Real
from typing import IO, Any


def format_numbers(values: Sequence[Any]) -> list[str]:
    """Formats numbers that are read together with the same number of decimals.

    Integers stay integers, missing values (None, NaN) become a dash, text is left as it is.
    """
    numbers = [v for v in values if _is_number(v)]
    if all(isinstance(v, Integral) for v in numbers):
        spec = ",d"
    else:
        largest = max(abs(v) for v in numbers)
        if 0 < largest < 1e-2:
            spec = ".2e"
        else:
            spec = (
                f",.{0 if largest >= 1000 else 1 if largest >= 100 else 2 if largest >= 10 else 3}f"
            )
    return [_format(v, spec) for v in values]


def format_percent(value: float) -> str:
    """0.784 → "78.4 %" (with a no-break space)."""
    return f"{100 * value:.1f}\u00a0%"


def format_seconds(seconds: float | None) -> str:
    """Wall time as a person says it: "48 s", "5 min 12 s", "3 h 07 min"; a dash for None."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def prompt_text(prompt: str | Sequence[Mapping[str, str]]) -> str:
    """A prompt as one text; of several turns each starts with its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def print_summary(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    samples: Sequence[Mapping[str, Any]] = (),
    *,
    file: IO[str] | None = None,
) -> None:
    """Prints the table that ends a run, then samples side by side.

    Colours and width follow the terminal; into a pipe or a file it is plain text. Text of models
    and users is printed as text: neither markup nor terminal escapes in it have any effect.

    Args:
        title: one line above the table.
        columns: headings; the first column is text, the others are numbers.
        rows: one sequence a row, as long as `columns`; the numbers of a row share their decimals.
        samples: records of samples.jsonl, `{"prompt": …, "responses": {name: text}}`.
        file: where to; standard output if None.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    print_table(title, columns, rows, file=file)
    console = Console(file=file, highlight=False, markup=False, emoji=False)
    for sample in samples:
        responses = sample["responses"]
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(justify="right", style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        grid.add_row(Text("prompt"), Text(printable(prompt_text(sample["prompt"])), style="italic"))
        for name, response in responses.items():
            grid.add_row(Text(name), Text(printable(response) or "(empty)"))
        console.print(grid)
        console.print()


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    file: IO[str] | None = None,
) -> None:
    """Prints a title and a table: see `print_summary`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=file, highlight=False, markup=False, emoji=False)
    console.print()
    console.print(Text(printable(title), style="bold"), soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for i, heading in enumerate(columns):
        table.add_column(Text(heading), justify="right" if i else "left")
    for label, *values in rows:
        table.add_row(Text(str(label)), *map(Text, format_numbers(values)))
    console.print(table)


def printable(text: str) -> str:
    """`text` with control characters other than line breaks and tabs replaced by U+FFFD."""
    return "".join(
        "\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


def _format(value: Any, spec: str) -> str:
    if _is_number(value):
        return format(value, spec).replace("-", "\u2212")
    if value is None or value != value:
        return "–"
    return str(value)

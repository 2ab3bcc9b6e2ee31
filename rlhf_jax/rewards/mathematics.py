r"""The scorer "math", for the process of a `worker`: no one knows how long algebra takes.

The package math-verify reads and compares expressions (LaTeX and plain); nothing is evaluated as
Python. What it misreads (`\$18`, 1.234,5, 1e3, mixed numbers) is rewritten or compared before.
"""

from __future__ import annotations

import contextlib
import logging
import re
import resource
import sys
from collections.abc import Sequence

from math_verify import parse, verify

from rlhf_jax.tasks.stated_answers import number, stated_answer, whole_number, without_separators

_SHORT = 200  # characters of an expression without $ around it
_LONGEST = 4000  # characters of a response that are read: its end
_MEMORY = 8 << 30  # bytes this process may map; a power tower ends in a MemoryError

logging.getLogger("math_verify").setLevel(logging.CRITICAL)
with contextlib.suppress(ValueError, OSError):
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
sys.set_int_max_str_digits(2000)


def equal(
    prompts: Sequence[object], responses: Sequence[str], answers: Sequence[str]
) -> list[bool]:
    """Whether each response's answer equals its reference."""
    return [_equal(*pair) for pair in zip(answers, responses, strict=True)]


def _equal(reference: str, response: str) -> bool:
    response = response[-_LONGEST:]
    stated = stated_answer(reference)
    expected = whole_number(reference if stated is None else stated)
    if expected is not None:
        answer = number(response)
        if answer == expected:
            return True
        given = stated_answer(response)
        percent = "%" in reference + response
        if answer is not None and not percent and whole_number(given or response) is not None:
            return abs(answer - expected) <= abs(expected) / 10**6
    gold = (
        f"${expected}$"
        if expected is not None and "%" not in reference
        else _shown(reference, reference=True)
    )
    try:  # both without their own time-outs, whose signals know the main thread only
        return verify(
            parse(gold, parsing_timeout=None),
            parse(_shown(response), parsing_timeout=None),
            timeout_seconds=None,
        )
    except Exception:  # of sympy, for any odd text; MemoryError is one too
        return False


def _shown(text: str, *, reference: bool = False) -> str:
    """The stated answer, or else the text, as math-verify finds an expression in it."""
    stated = stated_answer(text)
    shown = without_separators(text if stated is None else stated)
    if not re.search(r"\$|\\[(\[]", shown):
        command = "\\" in shown and (stated is not None or len(shown) < _SHORT)
        if reference or command or not re.search(r"[A-Za-z]{2}", shown):
            return f"${shown.rstrip('.')}$"
    return shown if stated is None else f"The final answer is {shown}"

"""The scorer "regex", for the process of a `worker`: a search may take longer than anyone waits."""

from __future__ import annotations

import re
from collections.abc import Sequence


def search(prompts: Sequence[object], responses: Sequence[str], pattern: str) -> list[bool]:
    """Whether the pattern is found in each response."""
    return [re.search(pattern, response) is not None for response in responses]

"""A model's own chat template: messages → the text between which its tokens are found.

Rendering happens in a process of its own (`template_worker`), so that no template can hang, fill
the memory or reach anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.child import Child, ChildFault
from rlhf_jax.errors import UserError

SECONDS = 10.0  # for the renderings of one request, and for the process's start
MEMORY = 1 << 29  # bytes of the process
CHARACTERS = 4_000_000  # of one rendering
DEFAULT, TOOL_USE = "default", "tool_use"  # the latter is of conversations with tools
_WORKER = Path(__file__).with_name("template_worker.py")


class Template:
    """A Jinja chat template and the special tokens it may name; read when it first renders.

    One that is `for_tools` is given an empty list where there are none, as such templates expect.
    """

    def __init__(self, source: str, variables: Mapping[str, str], *, for_tools: bool = False):
        self.source, self.variables, self.for_tools = source, dict(variables), for_tools
        arguments = {"source": source, "variables": self.variables, "characters": CHARACTERS}
        self._child = Child(
            str(_WORKER), "read_template", arguments, SECONDS, memory=MEMORY, isolated=True
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """The text of the conversation; raises as `render_all`."""
        whole = (range(len(messages)), add_generation_prompt)
        return self.render_all(messages, [whole], tools=tools)[0]

    def render_all(
        self,
        messages: Sequence[Mapping[str, Any]],
        renderings: Sequence[tuple[Sequence[int], bool]],
        *,
        tools: Sequence[Any] | None = None,
    ) -> list[str]:
        """Texts of several conversations, each (places of its messages, add_generation_prompt).

        Raises:
            UserError: it is no Jinja template, refuses the messages, fails, takes longer than
                `SECONDS` or writes more than `CHARACTERS`.
        """
        pairs = [(list(places), opened) for places, opened in renderings]
        tools = [] if tools is None and self.for_tools else tools
        given = {"messages": list(messages), "tools": tools}
        # An answer is about as long as one rendering may be.
        at_once = max(1, CHARACTERS // len(json.dumps(given)))
        texts: list[str] = []
        try:
            for i in range(0, len(pairs), at_once):
                texts += self._child.call(given | {"renderings": pairs[i : i + at_once]}, SECONDS)
        except ChildFault as fault:
            raise UserError(f"the chat template {_say(fault)}") from fault
        return texts


def _say(fault: ChildFault) -> str:
    if fault.reason == "timed out":
        return f"takes longer than {SECONDS:g} s"
    if fault.reason == "died":
        return "ended its process: it needs too much memory"
    if fault.error == "UndefinedError" and "'strftime_now'" in fault.detail:
        return (
            "asks for today's date (strftime_now), and a prompt must not depend on the day: write "
            "a date into a copy of it"
        )
    if fault.error == "MemoryError":
        return "fails: it needs too much memory"
    if fault.error == "RecursionError":
        return "fails: it is nested too deeply"
    return f"fails: {fault.detail.removeprefix('raised ')[:300]}"

"""Renders a chat template that came with a model, in a `child` that has nothing to lose.

The template runs in Jinja's immutable sandbox. `strftime_now` does not exist here: a prompt must
not depend on the day. Nothing of this package can be imported here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text: here it is just text."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Refused(Exception):
    pass


def _refuse(message: str) -> None:
    raise _Refused(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def read_template(
    source: str, variables: dict[str, str], characters: int
) -> Callable[..., list[str]]:
    """The function that renders conversations, each to at most so many characters."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    template = environment.from_string(source)

    def render(
        messages: list[Any], tools: Any, renderings: list[tuple[list[int], bool]]
    ) -> list[str]:
        """Texts of conversations, each (places of its messages, add_generation_prompt)."""
        texts = []
        for places, opened in renderings:
            given = {"messages": [messages[i] for i in places], "add_generation_prompt": opened}
            parts, size = [], 0
            # transformers gives templates `documents` too, None where there are none.
            for part in template.generate(**variables, tools=tools, documents=None, **given):
                parts.append(part)
                size += len(part)
                if size > characters:
                    _refuse(f"it writes more than {characters:,} characters")
            texts.append("".join(parts))
        return texts

    return render

"""Renders a chat template that came with a model, in a process that has nothing to lose.

    python template_worker.py MEMORY_BYTES MAX_CHARACTERS

reads JSON, one object a line: first {"template", "variables"}, then {"messages", "tools",
"renderings"}, these each the places of its messages and its "add_generation_prompt"; answers each
line with {"texts"} or {"error"}. The template runs in
Jinja's immutable sandbox under a limit of memory; its caller kills what takes too long.
`strftime_now` does not exist here: a prompt must not depend on the day.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

import jinja2
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


def _environment() -> ImmutableSandboxedEnvironment:
    def refuse(message: str) -> None:
        raise _Refused(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    return environment


def _render(template: jinja2.Template, variables: dict[str, Any], most: int) -> str:
    parts, size = [], 0
    for part in template.generate(**variables):
        parts.append(part)
        size += len(part)
        if size > most:
            raise _Refused(f"it writes more than {most:,} characters")
    return "".join(parts)


def main() -> None:
    memory, most = map(int, sys.argv[1:3])
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    template, variables = None, {}
    for line in sys.stdin:
        reply: dict[str, Any] = {}
        try:
            request = json.loads(line)
            if template is None:
                variables = request["variables"]
                template = _environment().from_string(request["template"])
            else:
                given, wanted = request["messages"], request.pop("renderings")
                reply["texts"] = [
                    _render(
                        template,
                        variables
                        | request
                        | {"messages": [given[i] for i in places], "add_generation_prompt": opened},
                        most,
                    )
                    for places, opened in wanted
                ]
        except MemoryError:
            reply = {"error": "it needs too much memory"}
        except RecursionError:
            reply = {"error": "it is nested too deeply"}
        except Exception as error:  # whatever a stranger's template does
            reply = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()

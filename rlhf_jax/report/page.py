"""The HTML that every page is made of: autoescaped templates and a figure's SVG and CSV in them."""

from __future__ import annotations

import base64
import re
from functools import cache
from importlib import resources
from typing import Any

from rlhf_jax.report.figure import Plot
from rlhf_jax.report.tables import format_numbers


def template(name: str) -> Any:
    """The template of that name in this package, e.g. "report.html.jinja"."""
    return _environment().get_template(name)


@cache
def _environment() -> Any:
    import jinja2
    from markupsafe import Markup

    def csv_link(plot: Plot) -> str:
        return "data:text/csv;charset=utf-8;base64," + base64.b64encode(plot.csv.encode()).decode()

    files = resources.files(__package__)
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda name: files.joinpath(name).read_text("utf-8")),
    )
    environment.filters["svg"] = lambda plot: Markup(plot.svg)
    environment.filters["csv"] = csv_link
    environment.filters["slug"] = lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    environment.filters["num"] = lambda value: format_numbers([value])[0]
    return environment

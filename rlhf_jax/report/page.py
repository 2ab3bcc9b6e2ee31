"""HTML from templates that escape every text, with figures as SVG and their points as CSV."""

from __future__ import annotations

import base64
import re
from functools import cache
from importlib import resources
from typing import Any

from rlhf_jax.report.figure import Plot
from rlhf_jax.report.tables import format_numbers


def render_page(name: str, **values: Any) -> str:
    """Fills the template of that name in this package, e.g. "report.html.jinja"."""
    return _make_environment().get_template(name).render(values)


@cache
def _make_environment() -> Any:
    import jinja2
    from markupsafe import Markup

    def link_csv(plot: Plot) -> str:
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
    environment.filters["csv"] = link_csv
    environment.filters["slug"] = lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    environment.filters["num"] = lambda value: format_numbers([value])[0]
    return environment

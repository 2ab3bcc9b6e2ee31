"""What --help says: the commands, the experiments, and the fields of a config.

Nothing is listed here a second time: a command's line is the first of its module's docstring, an
experiment's that of its file, and a field's default, bounds and comment are read where it is made.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import shutil
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.config import Config, own_fields
from rlhf_jax.stages.defaults import STAGES
from rlhf_jax.stages.experiments import PACKAGED

PACKAGE = Path(__file__).parent
FIELDS = """\
A field is an option of a section of the config. --config.SECTION.FIELD=VALUE sets it for a run:

    python -m rlhf_jax.main --config=dpo --config.loss.beta=0.2 --workdir=runs/beta

--config=NAME[:VARIANT] is an experiment of the list, or a file of yours; with it
    --help       its variants and its fields, each with its value and what it is
    --print      the config as it would be run, in JSON, and nothing is run
    --preflight  the data it would train on, and nothing is run
    --workdir    the directory of the run (default: runs/NAME[-VARIANT])
    --parents    the directory where the runs are that it starts from (default: beside it)
    --rerun      if the run there was made from something else: keep that one, run this one
--version says which rlhf_jax and jax these are."""


def commands() -> dict[str, str]:
    """The modules of the package that are commands, with a line each."""
    files = {path.stem: path for path in PACKAGE.glob("*.py")}
    files |= {path.parent.name: path for path in PACKAGE.glob("*/__main__.py")}
    texts = {name: path.read_text("utf-8") for name, path in files.items()}
    return {
        name: _first_line(text)
        for name, text in sorted(texts.items())
        if not name.startswith("_") and "\ndef main(argv" in text
    }


def overview() -> str:
    """The commands, the packaged experiments and what a field is."""
    experiments = {
        path.stem: _first_line(path.read_text("utf-8")) for path in sorted(PACKAGED.glob("*.py"))
    }
    parts = ["From raw text to an aligned language model, in JAX."]
    parts += ["", "Commands (python -m rlhf_jax.NAME, or rlhf-jax NAME; --help says more of each):"]
    parts += _listed(commands())
    parts += ["", "Experiments (python -m rlhf_jax.main --config=NAME, or rlhf-jax --config=NAME):"]
    return "\n".join([*parts, *_listed(experiments), "", FIELDS])


def config_help(config: ConfigDict, source: str) -> str:
    """What the file of a config says of itself, then its fields by section.

    A line is `field=value`, the field's comment, its bounds and, where the config states another
    value, its default.
    """
    text = Path(source.partition(":")[0]).read_text("utf-8")
    parts = [ast.get_docstring(ast.parse(text)) or source, ""]
    parts += [f"The fields of the stage {config.stage}, as --config.SECTION.FIELD=VALUE sets them:"]
    parts += ["", "seed", *_listed({f"seed={config.get('seed', 0)}": "of all that is drawn"})]
    for name in [each.name for each in fields(Config)]:
        section = STAGES[config.stage].get(name)
        if section is not None and name in config and fields(section):
            about = (section.__doc__ or "").partition("\n")[0]
            parts += ["", f"{name}: {about}", *_listed(_field_lines(section, config[name]))]
    return "\n".join(parts)


def _field_lines(section: type, given: ConfigDict) -> dict[str, str]:
    """{field=value: what it is} of a section, with the options of the loss that it names."""
    lines = _told(section, given)
    for each in fields(section):
        if "prefix" in each.metadata:
            lines[f"{each.metadata['prefix']}1, …"] = _comments(section).get(each.name, "")
        table = each.metadata.get("variants", {})
        if not table:
            continue
        chosen = given.get("name", own_fields(section)["name"].default)
        lines |= _told(table[chosen], given)
        others = {
            name: ", ".join(own_fields(kind)) for name, kind in table.items() if name != chosen
        }
        told = "; ".join(f"{name}: {options}" for name, options in others.items() if options)
        lines["(of others)"] = f"the options of {told}"
    return lines


def _told(section: type, given: ConfigDict) -> dict[str, str]:
    """{field=value: comment (limits)} of a dataclass's own fields."""
    comments, lines = _comments(section), {}
    for name, each in own_fields(section).items():
        value = given.get(name, each.default)
        limits, comment = each.metadata, comments.get(name, "")
        notes, choices = [], limits.get("choices", ())
        if not all(choice in comment for choice in choices):
            notes.append(f"one of {', '.join(choices)}")
        if limits.get("least") is not None:
            notes.append(f"at least {limits['least']}")
        if limits.get("within"):
            notes.append(f"in {limits['within']}")
        if limits.get("only"):
            notes.append(f"read only with {limits['only']}")
        if value != each.default:
            notes.append(f"default {_text(each.default)}")
        told = f" ({'; '.join(notes)})" if notes else ""
        lines[f"{name}={_text(value)}"] = f"{comment}{told}".strip()
    return lines


def _text(value: Any) -> str:
    """A value as the command line takes it; an empty text in quotes."""
    if isinstance(value, tuple | list):
        value = ",".join(map(str, value))
    return '""' if value == "" else str(value)


def _comments(section: type) -> dict[str, str]:
    """What is said of each field of a dataclass: behind it, above it, or in the docstring."""
    comments: dict[str, str] = {}
    for each in reversed(section.__mro__[:-1]):
        comments |= _documented(inspect.getdoc(each) or "")
        source = textwrap.dedent(inspect.getsource(each))
        behind = _comment_tokens(source)
        whole = {
            n for n, line in enumerate(source.splitlines(), 1) if line.lstrip().startswith("#")
        }
        (node,) = ast.parse(source).body
        assert isinstance(node, ast.ClassDef)
        for made in node.body:
            if isinstance(made, ast.AnnAssign) and isinstance(made.target, ast.Name):
                first, last = made.lineno, made.end_lineno or made.lineno
                lines = [n for n in range(first, last + 1) if n in behind]
                above = first
                while not lines and above - 1 in whole:
                    above -= 1
                lines = lines or [*range(above, first)]
                if lines:
                    comments[made.target.id] = " ".join(behind[n] for n in lines)
    return comments


def _comment_tokens(source: str) -> dict[int, str]:
    """The comments of a source by their lines, without their #."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def _documented(docstring: str) -> dict[str, str]:
    """The entries "name: text" of a docstring's Attributes."""
    _, _, listed = docstring.partition("Attributes:\n")
    entries = re.findall(r"^  (\w+): (.+(?:\n    .+)*)", listed, re.M)
    return {name: " ".join(text.split()) for name, text in entries}


def _first_line(text: str) -> str:
    """The first line of a file's docstring, without a command that it shows."""
    line = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return re.sub(r"(: `.*|; times are.*|; on a 2-core.*)$", ".", line).replace("..", ".")


def _listed(entries: dict[str, str]) -> Iterator[str]:
    """Lines with a column of names and one of texts, as wide as the terminal is."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    column = min(max(map(len, entries), default=0), 30) + 2
    for name, text in entries.items():
        opening = f"  {name:{column}}"
        if len(name) > column - 2:
            yield opening
            opening = " " * (column + 2)
        yield from textwrap.wrap(
            text,
            width,
            initial_indent=opening,
            subsequent_indent=" " * (column + 2),
            break_long_words=False,
            break_on_hyphens=False,
        ) or [opening.rstrip()]

"""Where experiments are found: a user's by their path, those that come with the package by name."""

from __future__ import annotations

from pathlib import Path

from rlhf_jax.errors import UserError, nearest

_BESIDE = Path(__file__).parents[1] / "experiments"  # as setup.py installs them
PACKAGED = _BESIDE if _BESIDE.is_dir() else _BESIDE.parents[1] / "experiments"
CONSTITUTION = PACKAGED / "constitution.json"


def names_experiment(source: str) -> bool:
    """Whether what a config names as a parent is "file.py[:variant]", not a directory."""
    return source.partition(":")[0].endswith(".py")


def find_experiment(source: str, named_in: str = "") -> str:
    """The path of "file.py[:variant]" or, of a packaged experiment, "name[:variant]".

    What a config names as its parent is first looked for beside it: what experiments/dpo.py calls
    experiments/sft.py, or sft.py, is the file of that name in its own directory. Then the path is
    what it is from the working directory, and last the name is that of a packaged experiment.

    Args:
        source: what is looked for.
        named_in: the source of the config that names it, "" for the command line.

    Raises:
        UserError: there is no such file, nor a packaged experiment of that name.
    """
    file, colon, variant = source.partition(":")
    path, home = Path(file), Path(named_in.partition(":")[0]).parent
    places = [path]
    if path.parent in (Path(), Path("experiments")):
        if named_in and path.parent.name in ("", home.name):
            places.insert(0, home / path.name)
        places.append(PACKAGED / path.with_suffix(".py").name)
    for place in places:
        if place.is_file():
            return f"{place}{colon}{variant}"
    known = sorted(each.stem for each in PACKAGED.glob("*.py"))
    named = f"{named_in} names {source!r}" if named_in else source
    if path.suffix == ".py":
        raise UserError(f"{named}: there is no file {file}; packaged are {', '.join(known)}")
    raise UserError(
        f"{named}: there is no experiment {file}; did you mean {nearest(file, known)}? There are: "
        f"{', '.join(known)}; of yours give the path, as mine.py"
    )

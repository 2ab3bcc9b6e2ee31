"""Runs an experiment, its parents first: `python -m rlhf_jax.main --config=experiments/dpo.py`.

Flags become a config, the config names a stage, the stage runs in a run directory; parents named
by `config.init` run first. With --help, --print or --preflight nothing runs: the config's fields,
its values, or what it would train on are shown. With --rerun a run that was made from something
else is kept under another name and run again. On a cluster the same line runs in one process per
host (see `hosts`); JAX finds the processes by itself, or --coordinator, --processes and --process
name them.

Exit codes: 0 done, 75 stopped but resumable (it was told to, or a disk is full), 2 the user's
mistake, 1 a bug, 130 stopped at once by a second signal.
"""

from __future__ import annotations

import contextlib
import json
import platform
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rlhf_jax import __version__
from rlhf_jax.commands import show_warnings
from rlhf_jax.errors import (
    EXIT_DONE,
    EXIT_RESUMABLE,
    EXIT_USER,
    NoRoom,
    Preempted,
    UserError,
    lack_of_room,
    mistake_in,
)
from rlhf_jax.files import tolerate_full_logs
from rlhf_jax.malloc import tune_collector, tune_malloc
from rlhf_jax.stopping import listen, stop_point

if TYPE_CHECKING:
    from ml_collections import ConfigDict


# Of the sections that are named by one field of theirs.
_SHORT = {
    "config.environment": "config.environment.file",
    "config.tools": "config.environment.tools",
}


def parse(argv: list[str]):
    """Returns (config, its source "file.py[:variant]", names of fields set, the other flags)."""
    from absl import flags
    from ml_collections import config_flags

    argv = [*_with_found_config(argv)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        flag_values=values,
        sys_argv=[sys.argv[0], *argv],
        lock_config=False,  # the options of a loss are no fields before it is named
        accept_new_attributes=True,
    )
    flags.DEFINE_string("workdir", None, "run directory", flag_values=values)
    flags.DEFINE_string("parents", None, "directory of the parents' runs", flag_values=values)
    flags.DEFINE_boolean("help", False, "say what there is", short_name="h", flag_values=values)
    flags.DEFINE_boolean("version", False, "say which this is", flag_values=values)
    flags.DEFINE_boolean("print", False, "print the config and run nothing", flag_values=values)
    flags.DEFINE_boolean("preflight", False, "show the data and run nothing", flag_values=values)
    flags.DEFINE_boolean("rerun", False, "run again what has changed", flag_values=values)
    flags.DEFINE_string("coordinator", None, "host:port of process 0", flag_values=values)
    flags.DEFINE_integer("processes", None, "how many, one a host", flag_values=values)
    flags.DEFINE_integer("process", None, "which of them this is", flag_values=values)
    try:
        rest = values([sys.argv[0], *argv])[1:]
    except UserError:
        raise
    except Exception as error:
        mistake = mistake_in(_config_file(argv), error)
        if mistake is not None:
            raise mistake from error
        known = (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError)
        if not isinstance(error, known):
            raise
        text = " ".join(str(error.args[0] if error.args else error).split())
        if not isinstance(error, ValueError):  # which is of a value
            text = _unknown_field(argv) or text
        raise UserError(f"in the command line: {text}") from error
    if rest:
        raise UserError(
            f"unexpected argument {rest[0]!r}; overrides look like --config.train.steps=9"
        )
    if values.config is None:
        if values.help or values.version:
            return None, "", [], values
        raise UserError("no --config given; try --config=dpo, or --help")
    source = config_flags.get_config_filename(values["config"])
    return values.config, source, _stated(argv), values


def _stated(argv: list[str]) -> list[str]:
    """The dotted names of the fields that flags set."""
    names = (arg.lstrip("-").partition("=")[0].removeprefix("no") for arg in argv)
    return [name.removeprefix("config.") for name in names if name.startswith("config.")]


def _unknown_field(argv: list[str]) -> str | None:
    """A line about the first field set that the stage has not got, None if it has them all."""
    from rlhf_jax.stages.defaults import unknown_field

    others = [arg for arg in argv if not arg.lstrip("-").startswith(("config.", "noconfig."))]
    if len(others) == len(argv):
        return None
    config, *_ = parse(others)
    if "stage" not in config:
        return None
    lines = (unknown_field(config.stage, name) for name in _stated(argv))
    return next(filter(None, lines), None)


def _with_found_config(argv: list[str]) -> Iterator[str]:
    """The arguments with the file of the experiment that --config names in place of its name."""
    from rlhf_jax.stages.experiments import find_experiment

    follows = False
    for argument in argv:
        name, equals, value = argument.partition("=")
        is_flag = name in ("-config", "--config")
        if follows:
            argument = find_experiment(argument)
        elif is_flag and equals:
            argument = f"{name}={find_experiment(value)}"
        elif short := _SHORT.get(name.lstrip("-")):
            argument = f"--{short}{equals}{value}"
        follows = is_flag and not equals
        yield argument


def _config_file(argv: list[str]) -> str:
    """The file that --config names, without its variant; "" for none."""
    for flag, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = flag.lstrip("-").partition("=")
        if name == "config":
            return (value if equals else following).partition(":")[0]
    return ""


def _shown(config: ConfigDict | None, source: str, stated: list[str], values: Any) -> str:
    """What --version, --help or --print asks to see; "" if none of them is given."""
    if values.version:
        import jax

        return f"rlhf_jax {__version__}, jax {jax.__version__}, Python {platform.python_version()}"
    if values.help:
        from rlhf_jax.usage import config_help, overview

        return overview() if config is None else config_help(config, source)
    if values.print and config is not None:
        from rlhf_jax.config import document
        from rlhf_jax.stages.chain import prepare

        with contextlib.redirect_stdout(sys.stderr):  # what is said of the data, beside the JSON
            prepared = prepare(config, stated)
        return json.dumps(document(prepared), indent=2, ensure_ascii=False)
    return ""


def main(argv: list[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    values = None
    try:
        config, source, stated, values = parse(sys.argv[1:] if argv is None else argv)
        if shown := _shown(config, source, stated, values):
            print(shown)
            return EXIT_DONE
        from rlhf_jax import hosts
        from rlhf_jax.cache import keep_compilations
        from rlhf_jax.devices import split_cores
        from rlhf_jax.stages import chain, preflight
        from rlhf_jax.stages.memory import naming_memory

        if argv is None:  # a process of its own
            show_warnings()
            hosts.start(values.coordinator, values.processes, values.process)
            if hosts.count() == 1:
                split_cores()
            keep_compilations()
        if values.preflight:
            with naming_memory(config):
                preflight.preflight(config, source, values.workdir, stated, values.parents)
        else:
            places = {"workdir": values.workdir, "parents": values.parents}
            chain.run(config, source, **places, stated=stated, rerun=values.rerun)
        stop_point(together=True)
        return EXIT_DONE
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER
    except Preempted as stop:
        print(f"stopped: {stop}", file=sys.stderr)
        return EXIT_RESUMABLE
    except Exception as error:  # of a file that is not written with `files.room_for`
        reason = lack_of_room(error)
        if reason is None:
            raise
        path = getattr(error, "filename", None) or (values and values.workdir) or "runs"
        print(f"stopped: {NoRoom(path, None, reason)}", file=sys.stderr)
        return EXIT_RESUMABLE


if __name__ == "__main__":
    tune_malloc()
    tune_collector()
    listen()
    tolerate_full_logs()
    sys.exit(main())

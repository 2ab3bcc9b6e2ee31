"""The front door: `python -m rlhf_jax.main --config=experiments/dpo.py [--config.train.steps=100]`.

Flags become a config, the config names a stage, the stage runs in a run directory; parents named
by `config.init` run first. With --preflight nothing runs: what it would train on is shown. With
--rerun a run that was made from something else is kept under another name and run again. On a
cluster the same line runs in one process per host (see `hosts`); JAX finds the processes by itself,
or --coordinator, --processes and --process name them.

Exit codes: 0 done, 75 stopped but resumable (it was told to, or a disk is full), 2 the user's
mistake, 1 a bug, 130 stopped at once by a second signal.
"""

from __future__ import annotations

import os
import sys

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


def parse(argv: list[str]):
    """Returns (config, its source "file.py[:variant]", names of fields set, the other flags)."""
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        flag_values=values,
        sys_argv=[sys.argv[0], *argv],
        lock_config=False,  # the options of a loss are no fields before it is named
        accept_new_attributes=True,
    )
    flags.DEFINE_string("workdir", None, "run directory", flag_values=values)
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
        if " " not in text:  # the bare name of a section that the stage lacks
            text = _unknown_field(argv) or text
        raise UserError(f"in the command line: {text}") from error
    if rest:
        raise UserError(
            f"unexpected argument {rest[0]!r}; overrides look like --config.train.steps=9"
        )
    if values.config is None:
        raise UserError("no --config given; try --config=experiments/dpo.py")
    source = config_flags.get_config_filename(values["config"])
    if not os.path.isfile(source.partition(":")[0]):
        raise UserError(f"--config={source}: there is no such file")
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


def _config_file(argv: list[str]) -> str:
    """The file that --config names, without its variant; "" for none."""
    for flag, following in zip(argv, [*argv[1:], ""], strict=True):
        name, equals, value = flag.lstrip("-").partition("=")
        if name == "config":
            return (value if equals else following).partition(":")[0]
    return ""


def main(argv: list[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    values = None
    try:
        config, source, stated, values = parse(sys.argv[1:] if argv is None else argv)
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
                preflight.preflight(config, source, values.workdir, stated)
        else:
            chain.run(config, source, values.workdir, stated, rerun=values.rerun)
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

"""`python -m rlhf_jax`, installed as `rlhf-jax`: every command of the package by its name.

`rlhf-jax chat --workdir=runs/dpo` is `python -m rlhf_jax.chat --workdir=runs/dpo`; flags without a
command are those of `rlhf_jax.main`, and nothing at all says what there is.
"""

from __future__ import annotations

import runpy
import sys

from rlhf_jax.errors import EXIT_USER, nearest


def main() -> None:
    """Runs the command that this process's command line names."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name.startswith("-"):
        name, rest = "main", [name, *rest]
    from rlhf_jax.usage import commands

    if name not in commands():
        near = nearest(name, commands())
        print(f"error: there is no command {name!r}; did you mean {near}?", file=sys.stderr)
        sys.exit(EXIT_USER)
    sys.argv[1:] = rest
    runpy.run_module(f"rlhf_jax.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

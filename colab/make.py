"""Makes the notebooks of this folder from their sources: runs NAME.py and keeps what it shows.

    pip install jupytext nbclient ipykernel && python colab/make.py [--small] [NAME…]

Each is run from its first cell to its last in a directory of its own; a cell that raises ends it.
With --small it trains a few steps only, and nothing is written.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = sorted(path for path in HERE.glob("*.py") if path.name != Path(__file__).name)


def read(source: Path):
    """The notebook of a source, as nbformat has it, without outputs."""
    import jupytext

    notebook = jupytext.read(source)
    notebook.metadata.pop("jupytext", None)
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"{source.stem}-{i}"  # random ones would change with every making
    return notebook


def execute(notebook, directory: str | Path, small: bool = False):
    """Runs all cells in a directory, with this Python.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised.
    """
    from nbclient import NotebookClient

    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    environment |= {"RLHF_JAX_NOTEBOOK": "small"} if small else {}
    # The installed kernel "python3" may be another Python's.
    manager = _kernel([sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])
    resources = {"metadata": {"path": str(directory)}}
    client = NotebookClient(notebook, km=manager, timeout=1800, resources=resources)
    return client.execute(env=environment)


def _kernel(command: list[str]):
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    manager = AsyncKernelManager()
    manager._kernel_spec = KernelSpec(argv=command, display_name="Python 3", language="python")
    return manager


def main() -> None:
    """Runs one command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("names", nargs="*", choices=[[], *(path.stem for path in SOURCES)])
    given = parser.parse_args()
    for source in SOURCES:
        if given.names and source.stem not in given.names:
            continue
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as directory:
            notebook = execute(read(source), directory, given.small)
        if not given.small:
            import nbformat

            for cell in notebook.cells:
                cell.metadata.pop("execution", None)  # the times of its making
                if cell.cell_type == "code":
                    # Warnings and progress bars are of the machine and not of the story.
                    cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
            nbformat.write(notebook, source.with_suffix(".ipynb"))
        seconds = round(time.monotonic() - start)
        minutes = f"{seconds // 60} min {seconds % 60:02} s"
        print(f"{source.stem}: all cells ran in {minutes}", flush=True)


if __name__ == "__main__":
    main()

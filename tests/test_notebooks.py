"""The notebooks of colab/: what is committed is what their sources say, and all their cells run."""

from __future__ import annotations

import json

import pytest

from colab import make

names = pytest.mark.parametrize("source", make.SOURCES, ids=lambda path: path.stem)


@names
def test_the_notebook_is_of_its_source(source):
    committed = json.loads(source.with_suffix(".ipynb").read_text("utf-8"))
    expected = make.read(source)
    cells = [("".join(cell["source"]), cell["cell_type"]) for cell in committed["cells"]]
    assert cells == [(cell.source, cell.cell_type) for cell in expected.cells]
    for key in ("accelerator", "colab", "kernelspec"):
        assert committed["metadata"][key] == expected.metadata[key]
    code = [cell for cell in committed["cells"] if cell["cell_type"] == "code"]
    # Each was run, in order and to its end.
    assert [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    shown = [output for cell in code for output in cell["outputs"]]
    assert all(output["output_type"] != "error" for output in shown)
    assert all(output.get("name") != "stderr" for output in shown)
    assert source.with_suffix(".ipynb").stat().st_size < 500_000


def test_all_begin_alike():
    # What installs on Colab is put right in all of them or in none.
    firsts = {
        next(c.source for c in make.read(s).cells if c.cell_type == "code") for s in make.SOURCES
    }
    assert len(firsts) == 1


@pytest.mark.slow
@names
def test_all_cells_run(source, tmp_path):
    notebook = make.execute(make.read(source), tmp_path, small=True)
    assert all(cell.get("execution_count") for cell in notebook.cells if cell.cell_type == "code")

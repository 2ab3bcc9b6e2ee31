"""The rows of the benchmark of compiled steps name configs and chips that there are."""

from __future__ import annotations

import json

import pytest

from benchmarks.compiled import ROWS, SMOLLM2
from rlhf_jax.main import parse
from rlhf_jax.plan.chips import CHIPS
from rlhf_jax.plan.steps import model_shape
from rlhf_jax.stages.defaults import resolve


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_is_a_config_on_a_topology(row, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
    config = resolve(parse(row.flags(tmp_path))[0])
    shape = model_shape(config)
    assert row.topology.partition(":")[0] in CHIPS
    assert shape.attention == row.kernel
    assert shape.remat == row.remat
    assert shape.layers == {"1b": 16, "8b": 32}.get(row.shape, 30)
    assert config.batch.rows == row.rows

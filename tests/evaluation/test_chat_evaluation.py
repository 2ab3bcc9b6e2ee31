"""What a run's answers are compared with."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from rlhf_jax.data.packing import Group, pack_groups
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.evaluation.chat_evaluation import _ancestors
from rlhf_jax.evaluation.held_out_answers import log_ratios
from rlhf_jax.models import ModelConfig, init
from rlhf_jax.stages.defaults import Compute, MeshAxes
from rlhf_jax.training.saved_model import Model, load_model, save_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_has_no_kl_to_its_start_by_what_it_computes_in(tmp_path, dtype):
    """The start was saved computing in float32; the run that is evaluated may not compute so."""
    tokenizer = train_bpe(["How are you? Fine, thank you."], 270)
    sizes = {"layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp_width": 32}
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, max_length=64, init_std=0.5, **sizes)
    (tmp_path / "sft").mkdir()
    save_model(tmp_path / "sft", Model(shape, init(shape, jax.random.key(0)), tokenizer))
    model = load_model(tmp_path / "sft", compute_dtype=dtype)
    config = SimpleNamespace(compute=Compute(compute_dtype=dtype), mesh=MeshAxes())
    start = _ancestors(config, {"sft": tmp_path / "sft"}, model)["sft"]
    rows, _ = pack_groups([Group([8, 9, 10], ([11, 12, 13, 14],), 0)], 32, branches=1)
    np.testing.assert_array_equal(log_ratios(model, start, rows, 32), 0)

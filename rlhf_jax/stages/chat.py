"""What a chat stage ends with: held-out prompts answered by every model of the lineage, and judged.

Answers are sampled at temperature 1, where a model shows all it does and the KL estimate is
unbiased; questions about facts are also answered greedily.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.data.chat import render_prompt
from rlhf_jax.data.records import Pair, Prompt
from rlhf_jax.data.tokenizer import Tokenizer
from rlhf_jax.evaluation.gold import fact_metrics, gold_metrics, gold_plots, gold_scores
from rlhf_jax.evaluation.responses import Answer, answer, sequence_kl
from rlhf_jax.evaluation.statistics import bootstrap_interval
from rlhf_jax.stages.common import read_records, say, write_evaluation, write_jsonl
from rlhf_jax.training.model import Model, load_model


def evaluate_chat(
    config: ConfigDict,
    run: Path,
    model: Model,
    start: Path,
    plots: Sequence[dict[str, Any]] = (),
) -> dict[str, float]:
    """Answers held-out prompts with the new model and its ancestors; writes samples and figures.

    Args:
        model: what the stage made.
        start: run directory of the model it started from, against which it is judged.
        plots: further figures for the report.
    """
    prompts = held_out_prompts(config, model)
    models = {path.name: load_model(path) for path in ancestry(start)} | {run.name: model}
    answers = {name: _answer(config, each, prompts) for name, each in models.items()}
    ours, reference = answers[run.name], models[start.name]
    kl = sequence_kl(model, reference, prompts, ours)
    low, high = bootstrap_interval(kl, config.seed)
    metrics = {
        "eval/kl": float(kl.mean()),
        "eval/kl_low": low,
        "eval/kl_high": high,
        "eval/response_length": float(np.mean([len(a.tokens) for a in ours])),
        "eval/eos_rate": float(np.mean([a.finished for a in ours])),
    }
    scores = {}
    if config.eval.gold:
        scores = {name: gold_scores(prompts, each) for name, each in answers.items()}
        metrics |= gold_metrics(scores[run.name], scores[start.name])
        facts = [p for p in held_out_prompts(config, model, limit=False) if is_fact(p)]
        metrics |= fact_metrics(facts, _answer(config, model, facts, temperature=0.0))
        plots = [*gold_plots(scores), *plots]
    write_evaluation(run, plots=plots)
    write_samples(run, prompts, answers, scores)
    return metrics

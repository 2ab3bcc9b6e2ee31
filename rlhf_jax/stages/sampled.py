"""Training on a model's own answers, as its stages share it: prompts, evaluations, the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_jax import hosts
from rlhf_jax.config import Config
from rlhf_jax.data.batches import make_dataset, make_iterator
from rlhf_jax.data.packing import Arrays
from rlhf_jax.evaluation.before_after import Values, changes, from_json, to_json
from rlhf_jax.evaluation.chat_evaluation import check_held_out_prompts, evaluate_chat
from rlhf_jax.evaluation.gold_reward import verdicts_of
from rlhf_jax.evaluation.held_out_answers import ending_metrics, kl_metrics, log_ratios
from rlhf_jax.files import read_lines, read_object, write_jsonl
from rlhf_jax.rl.judge import Judge
from rlhf_jax.rl.layout import Rollout
from rlhf_jax.rl.rollouts import read_prompts, sample_answers
from rlhf_jax.stages.fit import kept_before, say_devices
from rlhf_jax.tasks.prompts import PromptSet
from rlhf_jax.tasks.sources import parse_sources
from rlhf_jax.training.mesh import mesh_of, step_tokens
from rlhf_jax.training.metrics import read_metrics
from rlhf_jax.training.rundir import RunDirectory
from rlhf_jax.training.saved_model import Model

TIMELINE = 4  # prompts whose answers a report shows over time


def training_prompts(config: Config, policy: Model) -> tuple[PromptSet, Any]:
    """The prompts to sample from, and an endless iterator of batches whose row_ids choose some."""
    sources = parse_sources(config.data.train)
    sets = [read_prompts(config, policy.tokenizer, source, "train") for source in sources]
    drawn = config.rollout.prompts * (1 + config.rollout.resample)
    rows: list[Arrays] = []  # one row per prompt
    for each in sets:
        ids = np.arange(len(each.records), dtype=np.int32)
        rows.append({"tokens": np.zeros((len(ids), 1), np.int32), "row_ids": ids})
    weights = [*sources.values()] if len(sets) > 1 else None
    batches = make_iterator(make_dataset(rows, drawn, seed=config.seed, weights=weights))
    prompts, options = PromptSet.joined(sets), config.rollout
    say_devices(config, policy.params, mesh_of(config))
    answers, count = options.prompts * options.samples, len(prompts.records)
    print(
        f"a step samples {options.samples} answers of up to {options.max_new_tokens} tokens to "
        f"each of {options.prompts} prompts, {answers * options.max_new_tokens:,} together; "
        f"{config.train.steps:,} steps are {config.train.steps * drawn / count:.3g} epochs of "
        f"{count:,} prompts",
        flush=True,
    )
    return prompts, batches


def sampled_tokens(batch: Any, metrics: Mapping[str, Any]) -> int:
    """Counts the tokens of a step of on-policy training, for its rate."""
    return int(metrics["rollout/tokens"])


def held_out_set(config: Config, policy: Model) -> PromptSet:
    """The first `eval.during` held-out prompts; those of the last evaluation are checked too."""
    check_held_out_prompts(config, policy)
    held_out = read_prompts(config, policy.tokenizer, config.eval.source, "validation")
    return held_out.take(range(min(config.eval.during, len(held_out.records))))


def finish(
    config: Config, run: Path, model: Model, start: Path, before: dict[str, float]
) -> dict[str, float]:
    """The metrics of a run's last evaluation and of its greedy answers; writes what is reported.

    `before`: the evaluation of the model it started from, the first point of every curve.
    """
    lines = hosts.by_first(lambda: read_metrics(run / "metrics.jsonl"))
    evaluations = [line for line in lines if "eval/kl" in line]
    report = report_of(run, [before, *evaluations])
    metrics = evaluate_chat(config, run, model, start, further=report)
    last = {k: v for k, v in evaluations[-1].items() if k.startswith("eval/")}
    # Of the same samples as the proxy reward; the others are of greedy answers.
    for name in ("gold_reward", "kl"):
        if f"eval/{name}" in last:
            metrics[f"eval/sampled_{name}"] = last[f"eval/{name}"]
    return last | metrics | reward_changes(config, run)


def reward_changes(config: Config, run: Path) -> dict[str, float]:
    """How the rewards of sampled answers changed from the first evaluation to the last."""
    points = [line for _, line in read_lines(run / "timeline.jsonl", _at_step)]
    first, newest = (from_json(points[i]["values"]) for i in (0, -1))
    return changes(first, newest, config.seed)


def first_evaluation(
    config: Config, run: RunDirectory, policy: Model, held_out: PromptSet, judge: Judge
) -> dict[str, float]:
    """Evaluates the model a run starts from; a resumed run with the same evaluation reads it."""
    first = partial(evaluate, config, run.path, policy, policy, held_out, judge, 0)
    return kept_before(run, first)


def evaluate(
    config: Config,
    run: Path,
    model: Model,
    reference: Model,
    held_out: PromptSet,
    judge: Judge,
    step: int,
) -> dict[str, float]:
    """Gold and proxy reward of answers to held-out prompts, sampled at temperature 1, and their KL.

    Also keeps what the report shows: the answers at this step.
    """
    answers = sample_answers(
        config,
        model,
        held_out,
        samples=1,
        seed=config.seed,
        multiple=config.batch.rows,
        temperature=1.0,
    )
    scores = judge.score(answers)
    ratios = log_ratios(model, reference, answers.rows, step_tokens(config))
    metrics = {
        "eval/reward_failures": float(np.sum(~scores.valid)),
        **kl_metrics(ratios, config.seed),
        **ending_metrics(answers.completions),
    }
    if scores.valid.any():
        metrics["eval/proxy_reward"] = float(scores.total[scores.valid].mean())
    shown = {"proxy": scores.total}
    decode = model.tokenizer.decode_text
    turns = [[*map(decode, completion.turns)] for completion in answers.completions]
    if verdicts := verdicts_of(held_out.records, turns):
        shown["gold"] = np.array([verdict.total for verdict in verdicts])
        metrics["eval/gold_reward"] = float(shown["gold"].mean())
        metrics["eval/sampled_correct"] = float(np.mean([verdict.right for verdict in verdicts]))
    keep_timeline(run, step, answers, shown)
    return metrics


def keep_timeline(run: Path, step: int, answers: Rollout, scores: Mapping[str, np.ndarray]) -> None:
    """Appends the scores, with the answers to the first few prompts; NaN where there is no score.

    A step that is done again replaces its own, and one of other prompts all.
    """
    path = run / "timeline.jsonl"
    new = {
        "step": step,
        "prompts": [
            [m.to_json() for m in record.messages] for record in answers.prompts.records[:TIMELINE]
        ],
        "answers": list(answers.texts[:TIMELINE]),
        "scores": [
            {name: float(values[i]) for name, values in scores.items()}
            for i in range(min(TIMELINE, len(answers.texts)))
        ],
    }
    scored = np.isfinite(scores["proxy"])
    if scored.any():
        proxy = Values.of(np.where(scored, scores["proxy"], 0), scored)
        new["values"] = to_json({"proxy_reward": proxy})
    lines = [line for _, line in read_lines(path, _at_step) if line["step"] != step]
    others = [line for line in lines if line["prompts"] == new["prompts"]]
    write_jsonl(path, sorted([*others, new], key=lambda line: line["step"]))


def _at_step(line: dict[str, Any]) -> dict[str, Any]:
    """A line of timeline.jsonl."""
    return {
        "step": int(line["step"]),
        "prompts": list(line["prompts"]),
        "answers": list(line["answers"]),
        "scores": list(line["scores"]),
        "values": dict(line.get("values", {})),
    }


def _view(line: dict[str, Any]) -> dict[str, Any]:
    """A line of views.jsonl."""
    return {name: line[name] for name in ("title", "prompt", "tokens", "values")}


def report_of(run: Path, evaluations: list[dict[str, float]]) -> dict[str, Any]:
    """Returns the entries of evaluation.json: frontier, samples over time, tokens, plots."""
    # The answers at other steps are of another evaluation, which the run had before.
    steps = {line.get("step", i) for i, line in enumerate(evaluations)}
    lines = [line for _, line in read_lines(run / "timeline.jsonl", _at_step)]
    lines = [line for line in lines if line["step"] in steps]
    views = [view for _, view in read_lines(run / "views.jsonl", _view)]
    frontier: dict[str, Any] = {"bound": False}
    for name, metric in (
        ("kl", "eval/kl"),
        ("gold", "eval/gold_reward"),
        ("proxy", "eval/proxy_reward"),
    ):
        if metric in evaluations[-1]:
            frontier[name] = [line.get(metric, math.nan) for line in evaluations]
    timeline = [
        {
            "prompt": prompt,
            "answers": [
                {"step": line["step"], "text": line["answers"][i], "scores": line["scores"][i]}
                for line in lines
            ],
        }
        for i, prompt in enumerate(lines[-1]["prompts"] if lines else [])
    ]
    figure = {
        "kind": "frontier",
        "title": "Gold and proxy reward against distance from the reference",
        "series": {run.name: frontier},
    }
    plots = [figure]
    if (run / "histograms.json").exists():
        values = read_object(run / "histograms.json")
        xlabel = "of a token, last iteration"
        for title, names in (
            ("Advantages", ("advantages",)),
            ("Returns", ("returns", "old_values")),
        ):
            shown = {name.replace("old_", ""): values[name] for name in names if name in values}
            plots.append({"kind": "histogram", "title": title, "values": shown, "xlabel": xlabel})
    return {"frontier": frontier, "timeline": timeline, "token_views": views, "plots": plots}

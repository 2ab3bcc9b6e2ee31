"""On-policy reinforcement learning: a chat model, prompts and a reward → an aligned model.

PPO with a critic, GRPO, Dr.GRPO, DAPO, RLOO, REINFORCE++, GSPO and CISPO are one loop that differs
in `advantage`, `loss` and `kl`: see `defaults.ALGORITHMS`. Gold and proxy reward stand side by side
at every evaluation, because that is where over-optimisation shows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from rlhf_jax.data.batches import make_dataset, make_iterator
from rlhf_jax.data.packing import Arrays
from rlhf_jax.evaluation.chat_evaluation import evaluate_chat
from rlhf_jax.evaluation.gold_reward import verdicts_of
from rlhf_jax.evaluation.held_out_answers import ending_metrics, kl_metrics, log_ratios
from rlhf_jax.files import check_fields, read_lines, read_object, write_json, write_jsonl
from rlhf_jax.models.lora import AdapterConfig
from rlhf_jax.rl.on_policy import Iteration, OnPolicyState, make_iteration
from rlhf_jax.stages.fit import pack_texts
from rlhf_jax.stages.reward import with_score_head
from rlhf_jax.stages.rollouts import (
    Judge,
    Samples,
    pack_samples,
    read_prompts,
    sample_answers,
    text_task,
)
from rlhf_jax.stages.start import load_start
from rlhf_jax.tasks.prompts import PromptSet
from rlhf_jax.tasks.sources import parse_sources, read_records
from rlhf_jax.training.loop import Loop, is_evaluated
from rlhf_jax.training.mesh import mesh_of, step_tokens
from rlhf_jax.training.metrics import read_metrics
from rlhf_jax.training.progress import Clock
from rlhf_jax.training.rundir import RunDirectory
from rlhf_jax.training.saved_model import Model, as_trainable, save_model

VIEWS, TIMELINE = 6, 4  # samples a report shows token by token, and over time


def run(config: ConfigDict, run: RunDirectory, parents: Mapping[str, Path]) -> dict[str, float]:
    """Optimises `init.policy` for `reward.scorers`; returns the metrics of summary.json."""
    policy = load_start(config, parents["policy"])
    mesh = mesh_of(config)
    prompts, batches = training_prompts(config, policy)
    held_out = held_out_set(config, policy)

    texts = None
    if config.loss.ptx_coefficient:
        records = read_records(config, config.data.ptx, "text", "train")
        packed = pack_texts(config, f"{config.data.ptx} (ptx)", records, policy.tokenizer, "split")
        texts = make_dataset(packed, config.batch.rows, seed=config.seed)

    with Judge(config, parents, policy, run.path) as judge:
        task = text_task(config, policy, prompts, judge, mesh, texts)
        critic = critic_params(config, policy, judge)
        iteration = make_iteration(config, task, policy.params, critic, mesh=mesh)

        def evaluation(state: OnPolicyState) -> dict[str, float]:
            model = dataclasses.replace(policy, params=iteration.params(state))
            number = int(state.iteration)
            return evaluate(config, run.path, model, policy, held_out, judge, number)

        def step(state: OnPolicyState, batch: Mapping[str, np.ndarray]):
            after, metrics = iteration.step(state, batch)
            if is_evaluated(config.train, int(after.iteration)):  # where it may be interrupted
                write_jsonl(run.path / "views.jsonl", token_views(policy, iteration))
                write_json(run.path / "histograms.json", histograms(iteration))
            return after, metrics

        before = first_evaluation(config, run, policy, held_out, judge)
        loop = Loop(
            config.train,
            run,
            step,
            batches,
            evaluation,
            clock=Clock(tokens=sampled_tokens),
            tokenizer_hash=policy.tokenizer.hash,
        )
        state, rates = loop.train(iteration.init())
    model = dataclasses.replace(policy, params=iteration.params(state))
    save_model(run.path, model)
    return finish(config, run.path, model, parents["policy"], before) | rates


def training_prompts(config: ConfigDict, policy: Model) -> tuple[PromptSet, Any]:
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
    return PromptSet.joined(sets), batches


def sampled_tokens(batch: Any, metrics: Mapping[str, Any]) -> int:
    """What a step of on-policy training counts for its rate."""
    return int(metrics["rollout/tokens"])


def held_out_set(config: ConfigDict, policy: Model) -> PromptSet:
    """The first `eval.during` held-out prompts."""
    held_out = read_prompts(config, policy.tokenizer, config.eval.source, "validation")
    return held_out.take(range(min(config.eval.during, len(held_out.records))))


def finish(
    config: ConfigDict, run: Path, model: Model, start: Path, before: dict[str, float]
) -> dict[str, float]:
    """The metrics of a run's last evaluation and of its greedy answers; writes what is reported.

    `before`: the evaluation of the model it started from, the first point of every curve.
    """
    evaluations = [line for line in read_metrics(run / "metrics.jsonl") if "eval/kl" in line]
    report = _report(run, [before, *evaluations])
    metrics = evaluate_chat(config, run, model, start, further=report)
    last = {k: v for k, v in evaluations[-1].items() if k.startswith("eval/")}
    # Of the same samples as the proxy reward; the others are of greedy answers.
    for name in ("gold_reward", "kl"):
        if f"eval/{name}" in last:
            metrics[f"eval/sampled_{name}"] = last[f"eval/{name}"]
    return last | metrics


def critic_params(config: ConfigDict, policy: Model, judge: Judge) -> Any:
    """Where the critic starts: from the reward model if there is one, else from the policy's body.

    A reward model's score of a prefix already is a guess of its value; a fresh head starts at 0.
    """
    if config.advantage.name != "gae":
        return None
    shape = dataclasses.replace(policy.config, head="scalar")
    if judge.models and judge.models[0].config == shape:
        first = judge.models[0]
        if policy.adapter is None or first.adapter is None:
            first = as_trainable(first, policy.adapter or AdapterConfig(), config.seed)
        # Only the scale: a head has no bias, the critic learns the offset.
        scale = judge.weights.get("model", 1.0)
        if config.reward.normalize and first.normalization:
            scale /= first.normalization[1]
        head = {"kernel": first.params["score_head"]["kernel"] * scale}
        return {**first.params, "score_head": head}
    value = with_score_head(policy, config.seed).params
    return {**value, "score_head": jax.tree.map(np.zeros_like, value["score_head"])}


def first_evaluation(
    config: ConfigDict, run: RunDirectory, policy: Model, held_out: PromptSet, judge: Judge
) -> dict[str, float]:
    """That of the model a run starts from; a resumed run whose evaluation is the same reads it."""
    path = run.path / "before.json"
    kept: dict[str, Any] = {}
    if path.exists():
        kept = read_object(path)
        check_fields(path, kept, {"config_hash": str, "metrics": {"name": int | float}})
    if kept.get("config_hash") != run.config_hash:
        metrics = evaluate(config, run.path, policy, policy, held_out, judge, 0)
        kept = {"config_hash": run.config_hash, "metrics": metrics}
        write_json(path, kept)
    return kept["metrics"]


def evaluate(
    config: ConfigDict,
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
    samples = sample_answers(config, model, held_out, samples=1, seed=config.seed, temperature=1.0)
    rows = pack_samples(
        samples,
        row_length=config.data.row_length,
        max_prompt=config.rollout.max_prompt_tokens,
        max_new=config.rollout.max_new_tokens,
        multiple=config.batch.rows,
    )
    scores = judge.score(samples, rows)
    ratios = log_ratios(model, reference, rows, step_tokens(config))
    metrics = {
        "eval/reward_failures": float(np.sum(~scores.valid)),
        **kl_metrics(ratios, config.seed),
        **ending_metrics(samples.completions),
    }
    if scores.valid.any():
        metrics["eval/proxy_reward"] = float(scores.total[scores.valid].mean())
    found = {"proxy": scores.total}
    if verdicts := verdicts_of(held_out.records, samples.texts):
        found["gold"] = np.array([verdict.total for verdict in verdicts])
        metrics["eval/gold_reward"] = float(found["gold"].mean())
        metrics["eval/sampled_correct"] = float(np.mean([verdict.right for verdict in verdicts]))
    _keep_timeline(run, step, samples, found)
    return metrics


def histograms(iteration: Iteration) -> dict[str, list[float]]:
    """The newest rollout's advantages, returns and values, of every token: what is drawn."""
    arrays, shown = iteration.last["arrays"], ("advantages", "returns", "old_values")
    tokens = iteration.last["rollouts"].mask > 0
    return {name: arrays[name][tokens].tolist() for name in shown if name in arrays}


def token_views(policy: Model, iteration: Iteration) -> list[dict[str, Any]]:
    """The newest rollout's first few samples: tokens with their advantage, KL and value."""
    rollouts, arrays = iteration.last["rollouts"], iteration.last["arrays"]
    samples: Samples = rollouts.samples
    step = len(samples.completions) // min(VIEWS, len(samples.completions))
    views = []
    for n in range(0, step * min(VIEWS, len(samples.completions)), step):
        tokens = samples.completions[n].tokens
        values = {
            "advantage": arrays["advantages"][n],
            "kl": arrays["old_logprobs"][n] - arrays["ref_logprobs"][n],
        }
        if "old_values" in arrays:
            values["value"] = arrays["old_values"][n]
        record = samples.prompts.records[n // samples.each]
        views.append(
            {
                "title": f"iteration {rollouts.version + 1}, score {rollouts.scores[n]:.2f}",
                "prompt": [m.to_json() for m in record.messages],
                "tokens": [policy.tokenizer.decode([t]) or "⏹" for t in tokens],
                "values": {k: [float(x) for x in v[: len(tokens)]] for k, v in values.items()},
            }
        )
    return views


def _keep_timeline(run: Path, step: int, samples: Samples, scores: Mapping[str, np.ndarray]):
    """Appends the answers to the first few prompts; a step that is done again replaces its own."""
    path = run / "timeline.jsonl"
    new = {
        "step": step,
        "prompts": [
            [m.to_json() for m in record.messages] for record in samples.prompts.records[:TIMELINE]
        ],
        "answers": list(samples.texts[:TIMELINE]),
        "scores": [
            {name: float(values[i]) for name, values in scores.items()}
            for i in range(min(TIMELINE, len(samples.texts)))
        ],
    }
    others = [line for _, line in read_lines(path, _at_step) if line["step"] != step]
    write_jsonl(path, sorted([*others, new], key=lambda line: line["step"]))


def _at_step(line: dict[str, Any]) -> dict[str, Any]:
    """A line of timeline.jsonl."""
    return {
        "step": int(line["step"]),
        "prompts": list(line["prompts"]),
        "answers": list(line["answers"]),
        "scores": list(line["scores"]),
    }


def _view(line: dict[str, Any]) -> dict[str, Any]:
    """A line of views.jsonl."""
    return {name: line[name] for name in ("title", "prompt", "tokens", "values")}


def _report(run: Path, evaluations: list[dict[str, float]]) -> dict[str, Any]:
    """What evaluation.json holds beside tables and plots: frontier, samples over time, tokens."""
    lines = [line for _, line in read_lines(run / "timeline.jsonl", _at_step)]
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

"""Evaluates a finished run on records of yours, without training, beside what it started from.

    python -m rlhf_jax.evaluate --workdir=runs/dpo --data=mine.jsonl

As its stage does at the end, without training: the model and the one it started from, or --start,
on the same records, with the run's own limits. What comes of it is a directory like a run's, with
a report.

    python -m rlhf_jax.evaluate --workdir=runs/sft-own --tasks=xstest,advbench

answers public sets of requests, and says how many are refused of those where that is due and of the
others, by the rule of tasks/refusals.py. Exit codes: 0 done, 2 the user's mistake, 1 a bug.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_jax.commands import Parser, run
from rlhf_jax.errors import UserError

if TYPE_CHECKING:
    from rlhf_jax.config import Config
    from rlhf_jax.evaluation.before_after import Evaluated
    from rlhf_jax.training.saved_model import Model


def evaluate(workdir: Path, data: str, start: Path | None, out: Path, **limits: Any) -> None:
    """Writes the evaluation of a run's model on `data` into `out`, and prints what it came to.

    Args:
        data: as `data.validation` takes it; what a stage reads in addition as `eval.source`.
        start: another run to compare with; None: the one that the run started from.
        limits: fields of the config's section eval, where they are not None.

    Raises:
        UserError: there is no such run, its stage evaluates nothing on records, or `out` holds
            something already.
    """
    from ml_collections import ConfigDict

    from rlhf_jax.config import document
    from rlhf_jax.files import read_object, write_json
    from rlhf_jax.report.report import describe_environment, write_report
    from rlhf_jax.stages.chain import show
    from rlhf_jax.stages.defaults import lay, resolve
    from rlhf_jax.training.rundir import CONFIG, SUMMARY
    from rlhf_jax.training.summary import read_summary

    began, summary = time.monotonic(), read_summary(workdir)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty; name another directory with --out")
    if not (workdir / CONFIG).exists() or summary["stage"] in ("hub", "oracle"):
        raise UserError(f"{workdir} is no run of a stage that evaluates records")
    given = ConfigDict(read_object(workdir / CONFIG))
    stated = {name: value for name, value in limits.items() if value is not None}
    given.data.validation = data
    if given.get("eval"):
        stated["source"] = data
    config = resolve(lay(given, {"eval": stated} if stated else {}))
    parent = start or summary["parents"].get("policy")
    parents = {"policy": parent} if parent else {}
    if parent and not Path(parent).is_dir():
        raise UserError(f"{workdir} started from {parent}, which is gone; name a run with --start")
    out.mkdir(parents=True, exist_ok=True)
    metrics = measure(config, workdir, Path(parent) if parent else None, summary["parents"], out)
    write_json(out / CONFIG, document(config))
    evaluated = {
        "stage": config.stage,
        "status": "done",
        "config_hash": summary["config_hash"],
        "parents": {role: str(Path(path).resolve()) for role, path in parents.items()},
        "wall_seconds": round(time.monotonic() - began, 3),
        "metrics": metrics,
        "environment": describe_environment(),
    }
    write_report(out, evaluated)
    write_json(out / SUMMARY, evaluated)
    show(out)


def measure(
    config: Config, workdir: Path, start: Path | None, parents: dict[str, str], out: Path
) -> dict[str, float]:
    """The metrics of a run's model on `data.validation` and `eval.source`, before and after."""
    from rlhf_jax.evaluation.before_after import changes
    from rlhf_jax.evaluation.chat_evaluation import evaluate_chat
    from rlhf_jax.stages.defaults import SAMPLING
    from rlhf_jax.training.summary import write_evaluation

    model = _load(config, workdir)
    before = None if start is None else _load(config, start)
    metrics: dict[str, float] = {}
    further: dict[str, Any] = {}
    if config.stage in SAMPLING:
        if before is not None:
            metrics, further = _sampled(config, model, before, parents, out)
    else:
        evaluated, started = _on_records(config, model, before)
        metrics, further = dict(evaluated.metrics), {"plots": evaluated.figures}
        if started is not None:
            metrics |= changes(started.values, evaluated.values, config.seed)
    if config.stage in ("pretrain", "reward") or start is None:
        write_evaluation(out, **further)
        return metrics
    return metrics | evaluate_chat(config, out, model, start, further)


def evaluate_requests(
    workdir: Path, names: Sequence[str], out: Path, template: str, **limits: Any
) -> None:
    """Answers sets of tasks/refusals.py and tasks/call_sets.py; prints and writes what came of it.

    Args:
        workdir: a finished run of a chat stage, or a Hugging Face directory with a chat template.
        template: as `data.chat_template`. limits: "count", "max_new_tokens", "temperature"; None:
            all, as many as the set's replies need, greedy.

    Raises:
        UserError: an unknown set, a model that cannot answer, or `out` holds something already.
    """
    from rlhf_jax.evaluation.public_requests import (
        COLUMNS,
        answer_requests,
        document,
        table_rows,
        warning_of,
    )
    from rlhf_jax.files import write_json, write_jsonl
    from rlhf_jax.models import param_count
    from rlhf_jax.report.tables import print_table
    from rlhf_jax.stages.start import with_chat_template
    from rlhf_jax.tasks.call_sets import CALL_SETS
    from rlhf_jax.tasks.refusals import REFUSAL_SETS
    from rlhf_jax.training.saved_model import load_model

    titles = {task.name: "Refused" for task in REFUSAL_SETS}
    titles |= {task.name: "Right calls" for task in CALL_SETS}
    for name in ("count", "max_new_tokens"):
        if limits[name] is not None and limits[name] < 1:
            raise UserError(f"--{name.replace('_', '-')}={limits[name]}: at least 1")
    if unknown := [name for name in names if name not in titles]:
        raise UserError(f"--tasks: there is no set {unknown[0]!r}; there are {', '.join(titles)}")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} exists and is not empty; name another directory with --out")
    model = load_model(workdir)
    model = dataclasses.replace(model, tokenizer=with_chat_template(model.tokenizer, template))
    if model.config.head != "lm" or not model.tokenizer.has_template:
        raise UserError(f"{workdir} is no chat model, and no other can answer requests")
    lines, samples = {}, []
    for name in names:
        lines[name], answered = answer_requests(model, name, **limits)
        samples += answered
        print_table(f"{titles[name]}, of {name}", COLUMNS, table_rows(lines[name]))
    if warning := warning_of(param_count(model.params)):
        print(f"warning: {warning}", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "samples.jsonl", samples)
    write_json(out / "rates.json", document(lines, warning))
    print(f"replies and rates: {out}", flush=True)


def _load(config: Config, directory: Path) -> Model:
    from rlhf_jax.stages.start import check_kernel, with_chat_template
    from rlhf_jax.training.saved_model import load_like

    model = load_like(config, directory)
    template = getattr(config.data, "chat_template", "")
    check_kernel(config, model.config)
    return dataclasses.replace(model, tokenizer=with_chat_template(model.tokenizer, template))


def _on_records(
    config: Config, model: Model, before: Model | None
) -> tuple[Evaluated, Evaluated | None]:
    """The stage's held-out metrics of both models on `data.validation`."""
    from rlhf_jax.evaluation.row_passes import response_logprobs
    from rlhf_jax.stages import preference, pretrain, reward, sft
    from rlhf_jax.stages.preference_rows import pack_preferences
    from rlhf_jax.training.mesh import step_tokens

    match config.stage:
        case "pretrain":
            rate = pretrain.evaluation(config, model)
        case "sft" | "ai_sft":
            rate = sft.evaluation(config, model)
        case "reward":
            rate = reward.evaluation(config, model)
            if before is not None and before.config.head == "lm":
                before = reward.with_score_head(before, config.seed)
        case _:
            if before is None:
                raise UserError("preferences are judged against a model: name one with --start")
            source, tokenizer = config.data.validation, before.tokenizer
            rows = pack_preferences(config, source, "validation", tokenizer, mismatched=False)
            logprobs = response_logprobs(before.config, before.params, rows, step_tokens(config))
            rate = preference.evaluation(config, before, rows, logprobs)
    return rate(model.params), None if before is None else rate(before.params)


def _sampled(
    config: Config, model: Model, before: Model, parents: dict[str, str], out: Path
) -> tuple[dict[str, float], dict[str, Any]]:
    """(metrics, entries of the report) of what the rewards say of both models' answers."""
    from rlhf_jax.environments.trajectories import environments_of
    from rlhf_jax.rl.judge import Judge
    from rlhf_jax.stages import sampled

    held_out = sampled.held_out_set(config, before)
    paths = {role: Path(path) for role, path in parents.items()}
    with (
        Judge(config, paths, before, out) as judge,
        environments_of(config.environment) as environments,
    ):
        held_out = dataclasses.replace(held_out, environments=environments)
        points = [
            sampled.evaluate(config, out, each, before, held_out, judge, number)
            for number, each in enumerate((before, model))
        ]
    metrics = points[1] | sampled.reward_changes(config, out)
    return metrics, sampled.report_of(out, points)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns the exit code."""
    description = "Evaluates a finished run on records of yours, before and after."
    parser = Parser(prog="python -m rlhf_jax.evaluate", description=description)
    parser.add_argument("--workdir", required=True, help="a finished run")
    parser.add_argument("--data", help="a file or data set, as data.validation")
    parser.add_argument(
        "--tasks", help="in its place public sets of requests: xstest,advbench,bfcl,toolalpaca"
    )
    parser.add_argument(
        "--config.data.chat_template", dest="chat_template", help="of --tasks, in place of its own"
    )
    parser.add_argument("--start", help="compare with this run (default: what it started from)")
    parser.add_argument("--out", help="the directory to write (default: evaluations/DATA/RUN)")
    parser.add_argument("--count", type=int, help="prompts to answer at most")
    parser.add_argument("--max-new-tokens", type=int, help="of an answer")
    parser.add_argument("--temperature", type=float, help="of answers; 0: greedy")

    def command(given: argparse.Namespace) -> None:
        workdir = Path(given.workdir)
        if bool(given.data) == bool(given.tasks):
            raise UserError("evaluate: name either --data or --tasks")
        named = given.tasks or Path(given.data.partition("[")[0]).stem
        out = Path(given.out or Path("evaluations") / named / workdir.resolve().name)
        limits = {name: getattr(given, name) for name in ("count", "max_new_tokens", "temperature")}
        if given.tasks:
            if given.start:
                raise UserError("evaluate: --start is compared with on --data, not on --tasks")
            template = given.chat_template or ""
            evaluate_requests(workdir, given.tasks.split(","), out, template, **limits)
            return
        if given.chat_template:
            raise UserError("evaluate: --config.data.chat_template is of --tasks, not of --data")
        start = Path(given.start) if given.start else None
        evaluate(workdir, given.data, start, out, **limits)

    return run(parser, command, argv)


if __name__ == "__main__":
    sys.exit(main())

"""How a chat model is judged: held-out prompts answered by every model of its lineage.

The answers that are judged are those a user would get, by default the greedy ones; what they come
to is told of every model beside the others, and how the last differs from the one it started from
with an interval over the prompts, which all answer (see `before_after`). The KL to the
model it started from is estimated from answers sampled at temperature 1, where that estimate is
unbiased. Where the prompts' task has an exact verifier, its verdict is the gold reward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_jax import console
from rlhf_jax.config import Config
from rlhf_jax.data.records import Prompt
from rlhf_jax.environments.trajectories import environments_of, trajectory_seeds
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.before_after import Values, changes
from rlhf_jax.evaluation.gold_reward import (
    correct_metrics,
    correct_table,
    gold_metrics,
    gold_plots,
    gold_values,
    verdicts_of,
)
from rlhf_jax.evaluation.held_out_answers import (
    Answer,
    answer,
    ending_metrics,
    ending_values,
    kept_answers,
    kl_metrics,
    log_ratios,
    pack_answers,
)
from rlhf_jax.evaluation.outcomes import (
    IN_A_ROW,
    outcome_values,
    pass_metrics,
    rate_metrics,
    rate_plots,
    rate_tables,
    repeat_prompts,
)
from rlhf_jax.evaluation.safety import (
    EXPOSURE,
    EXTRACTED,
    balance_metrics,
    disagreement_tables,
    extraction_values,
)
from rlhf_jax.files import write_jsonl
from rlhf_jax.stopping import stop_point
from rlhf_jax.tasks.builders import verifier_of
from rlhf_jax.tasks.prompts import PromptSet, prompts_within
from rlhf_jax.tasks.sources import read_records
from rlhf_jax.tasks.task import Task, Verdict
from rlhf_jax.training.mesh import step_tokens
from rlhf_jax.training.saved_model import Model, load_like
from rlhf_jax.training.summary import ancestry, names_of, write_evaluation


def evaluate_chat(
    config: Config,
    run: Path,
    model: Model,
    start: Path,
    further: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Answers held-out prompts with the new model and its ancestors; writes samples and figures.

    Args:
        run: the stage's run directory. model: what the stage made.
        start: run directory of the model it started from, against which it is judged.
        further: other keys of evaluation.json; "plots" and "tables" in it join those made here.
    """
    further = dict(further or {})
    plots, tables = [*further.pop("plots", [])], [*further.pop("tables", [])]
    prompts = held_out_prompts(config, model).records[: config.eval.count]
    tables += console.few_records("held-out prompts", len(prompts))
    lineage = ancestry(start)
    names = names_of([*lineage, run])
    directories, (began, own) = dict(zip(names[:-1], lineage, strict=True)), names[-2:]
    models = {**_ancestors(config, directories, model), own: model}
    answers = {
        name: _answer(config, each, prompts, directories.get(name)) for name, each in models.items()
    }
    metrics = _sampled_kl(config, model, models[began], prompts)[0]
    metrics |= ending_metrics(answers[own])
    if config.environment is not None and config.environment.named:
        metrics["eval/environment_failures"] = float(sum(each.failed for each in answers[own]))
    measured = {name: ending_values(each) for name, each in answers.items()}
    task, verdicts, group = verifier_of(prompts), {}, ""
    if task:
        group = task.group
        verdicts = {n: verdicts_of(prompts, [a.turns for a in each]) for n, each in answers.items()}
        metrics |= gold_metrics(verdicts[own], verdicts[began])
        for name in verdicts:
            measured[name] |= gold_values(verdicts[name])
        rates = {
            n: outcome_values(task, prompts, [a.turns for a in each]) for n, each in answers.items()
        }
        metrics |= rate_metrics(rates[own])
        for name, values in rates.items():
            measured[name] |= values
        plots += rate_plots(rates)
        tables += rate_tables(rates)
        both = {name: models[name] for name in (began, own)}
        metrics |= _probes(config, task, both, directories, measured)
        plots = [*gold_plots(prompts, verdicts, group), *plots]
        tables.append(correct_table(prompts, verdicts, group))
        metrics |= _secrets(config, prompts, both, measured)
        texts = [each.text for each in answers[own]]
        tables += disagreement_tables(prompts, texts, verdicts[own])
        metrics |= balance_metrics(metrics)
    if task and task.replay and config.environment is not None and config.environment.named:
        metrics |= _in_a_row(config, model, prompts)
    metrics |= changes(measured[began], measured[own], config.seed)
    others = {name: {n: v.mean for n, v in each.items()} for name, each in measured.items()}
    write_evaluation(run, tables, plots, others=others, **further)
    write_jsonl(run / "samples.jsonl", _samples(prompts, answers, verdicts, group))
    return metrics


def sampled_metrics(
    config: Config, model: Model, reference: Model, prompts: Sequence[Prompt]
) -> dict[str, float]:
    """eval/kl and, where there is a verifier, eval/gold_reward of answers at temperature 1.

    A point on the way of a run: what `rlhf_jax.compare` draws against those of other runs.
    """
    metrics, sampled = _sampled_kl(config, model, reference, prompts)
    if verdicts := verdicts_of(prompts, [each.turns for each in sampled]):
        metrics["eval/gold_reward"] = gold_metrics(verdicts)["eval/gold_reward"]
    return metrics


def held_out_prompts(config: Config, model: Model) -> PromptSet:
    """Prompts of the evaluation's records that leave room for an answer; the others are counted."""
    records = read_records(config, config.eval.source, "prompt", "validation")
    room = model.config.max_length - config.eval.max_new_tokens
    why = f"left out: eval.max_new_tokens leaves room for {room} tokens"
    prompts = prompts_within(room, "held-out prompts", records, model.tokenizer, why)
    if not prompts.records:
        raise UserError(
            f"eval.max_new_tokens = {config.eval.max_new_tokens} leaves no held-out prompt room in "
            f"model.max_length = {model.config.max_length}"
        )
    return prompts


def check_held_out_prompts(config: Config, model: Model) -> PromptSet:
    """`held_out_prompts`, before training: UserError for what the last evaluation could not ask.

    Of those that it will ask, also what an environment opens with has to leave room for an answer.
    """
    prompts, options = held_out_prompts(config, model), config.eval
    with environments_of(config.environment) as environments:
        if environments is not None:
            asked = prompts.records[: options.count]
            seeds = trajectory_seeds(config.seed, range(len(asked)))
            room = model.config.max_length - options.max_new_tokens
            environments.open(model.tokenizer, asked, 1, seeds).check_room(
                room,
                f"the {room} that eval.max_new_tokens = {options.max_new_tokens} leaves of the "
                f"model's {model.config.max_length}: lower that",
            )
    return prompts


def _ancestors(config: Config, directories: Mapping[str, Path], model: Model) -> dict[str, Model]:
    """The models that `model` comes from, by the names of their runs, oldest first.

    They are computed as the run's own is, so that what differs is the weights. They answer under
    the template of `model` where the run names one, or where theirs does not work.
    """
    named = getattr(config.data, "chat_template", "")
    models = {}
    for name, path in directories.items():
        stop_point(together=True)
        each = load_like(config, path)
        if named or not each.tokenizer.has_template:
            each = dataclasses.replace(each, tokenizer=model.tokenizer)
        models[name] = each
    return models


def _sampled_kl(
    config: Config, model: Model, reference: Model, prompts: Sequence[Prompt]
) -> tuple[dict[str, float], list[Answer]]:
    """The KL's metrics, and the answers at temperature 1 that it is estimated from."""
    sampled = _answer(config, model, prompts, temperature=1.0)
    ratios = log_ratios(model, reference, pack_answers(sampled), step_tokens(config))
    return kl_metrics(ratios, config.seed), sampled


def _answer(
    config: Config,
    model: Model,
    prompts: Sequence[Prompt],
    directory: Path | None = None,
    temperature: float | None = None,
) -> list[Answer]:
    """`directory`: where a model lies that is not trained any more; its answers are kept."""
    options: dict[str, Any] = {
        "max_new_tokens": config.eval.max_new_tokens,
        "temperature": config.eval.temperature if temperature is None else temperature,
        "seed": config.seed,
        "tokens": step_tokens(config),
    }
    with environments_of(config.environment) as environments:
        if directory is not None and environments is None:
            return kept_answers(model, directory, prompts, **options)
        return answer(model, prompts, environments=environments, **options)


def _in_a_row(config: Config, model: Model, prompts: Sequence[Prompt]) -> dict[str, float]:
    """eval/pass^k of several sampled episodes to a prompt."""
    asked = repeat_prompts(prompts[: config.eval.count // IN_A_ROW[-1] + 1])
    sampled = _answer(config, model, asked, temperature=1.0)
    verdicts = verdicts_of(asked, [each.turns for each in sampled])
    groups = [verdicts[i : i + IN_A_ROW[-1]] for i in range(0, len(verdicts), IN_A_ROW[-1])]
    return pass_metrics(groups)


def _probes(
    config: Config,
    task: Task,
    models: Mapping[str, Model],
    directories: Mapping[str, Path],
    measured: Mapping[str, dict[str, Values]],
) -> dict[str, float]:
    """What models answer rightly of a task's probes, added to `measured`; metrics of the last."""
    metrics: dict[str, float] = {}
    alone = dataclasses.replace(config, environment=None)  # a probe has one turn
    for name, source in task.probes.items():
        asked = read_records(config, source, "prompt", "validation")
        for each, model in models.items():
            replies = _answer(alone, model, asked, directories.get(each))
            told = verdicts_of(asked, [reply.turns for reply in replies])
            measured[each][f"correct/{name}"] = Values.of([verdict.right for verdict in told])
        metrics |= correct_metrics(name, told)
    return metrics


def _secrets(
    config: Config,
    prompts: Sequence[Prompt],
    models: Mapping[str, Model],
    measured: Mapping[str, dict[str, Values]],
) -> dict[str, float]:
    """What models tell of the prompts' secrets, sampled and by likelihood, added to `measured`.

    Returns the metrics of the last model; {} where no prompt has a secret.
    """
    private = [prompt for prompt in prompts if "secret" in prompt.meta]
    metrics: dict[str, float] = {}
    for name, model in models.items() if private else ():
        sampled = [each.text for each in _answer(config, model, private, temperature=1.0)]
        values = extraction_values(model, private, sampled, step_tokens(config))
        measured[name].update(values)
        metrics = rate_metrics({EXTRACTED: values[EXTRACTED]})
        metrics[f"eval/{EXPOSURE}"] = values[EXPOSURE].mean
    return metrics


def _samples(
    prompts: Sequence[Prompt],
    answers: Mapping[str, Sequence[Answer]],
    verdicts: Mapping[str, Sequence[Verdict]],
    group: str,
) -> list[dict[str, Any]]:
    """Each prompt with every model's answer and, where there are any, its scores."""
    samples = []
    for i, prompt in enumerate(prompts):
        sample: dict[str, Any] = {
            "prompt": [m.to_json() for m in prompt.messages],
            "responses": {name: each[i].text for name, each in answers.items()},
        }
        if group:
            sample[group] = prompt.meta.get(group, "")
        if verdicts:
            sample["scores"] = {name: each[i].total for name, each in verdicts.items()}
        samples.append(sample)
    return samples

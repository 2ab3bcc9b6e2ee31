"""How well a model uses tools: episodes by an exact verifier, as metrics and as a table.

Rates are of one greedy episode to a prompt, with Wilson's interval; pass^k, that k episodes in a
row are worth 1, is of several sampled ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_jax.data.records import Prompt
from rlhf_jax.environments.trajectories import EnvironmentOptions, Environments, trajectory_seeds
from rlhf_jax.evaluation.held_out_answers import CACHED, SLOTS
from rlhf_jax.evaluation.row_passes import rows_of
from rlhf_jax.evaluation.statistics import bootstrap_interval, pass_all, wilson_interval
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import Completion, generate
from rlhf_jax.tasks.builders import verifier_of
from rlhf_jax.tasks.task import Episode
from rlhf_jax.training.saved_model import Model

IN_A_ROW = (1, 2, 4, 8)


def rates(
    records: Sequence[Prompt], episodes: Sequence[Episode], group: str
) -> dict[str, tuple[int, int]]:
    """(how many, of how many) by name.

    "success": of episodes that are worth 1, and "success/<group>". "needless_calls": of episodes
    that need no call, with one or more. "invalid_calls": of calls, that no tool could answer.
    """
    solved = [episode.verdict.total == 1 for episode in episodes]
    found = {"success": (sum(solved), len(solved))}
    places: dict[str, list[bool]] = {}
    for record, each in zip(records, solved, strict=True):
        places.setdefault(record.meta.get(group, ""), []).append(each)
    if group:
        found |= {f"success/{name}": (sum(v), len(v)) for name, v in sorted(places.items())}
    needless = [episode.calls > 0 for episode in episodes if not episode.needed]
    found["needless_calls"] = sum(needless), len(needless)
    invalid = sum(episode.invalid for episode in episodes)
    found["invalid_calls"] = invalid, sum(episode.calls for episode in episodes)
    return found


def rate_metrics(found: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    """eval/<name> with 95 % interval of those of `rates` that are of one or more."""
    metrics: dict[str, float] = {}
    for name, (count, total) in found.items():
        if total:
            low, high = wilson_interval(count, total)
            key = f"eval/{name}"
            metrics |= {key: count / total, f"{key}_low": low, f"{key}_high": high}
    return metrics


def in_a_row(episodes: Sequence[Sequence[Episode]], seed: int) -> dict[str, float]:
    """eval/pass^k for each k of `IN_A_ROW`, with 95 % interval over prompts.

    Args:
        episodes: [P][G], those of a prompt together, G at least the largest k.
    """
    solved = [sum(each.verdict.total == 1 for each in group) for group in episodes]
    metrics: dict[str, float] = {}
    for k in IN_A_ROW:
        chances = pass_all(solved, len(episodes[0]), k)
        low, high = bootstrap_interval(chances, seed)
        key = f"eval/pass^{k}"
        metrics |= {key: float(chances.mean()), f"{key}_low": low, f"{key}_high": high}
    return metrics


def play(
    model: Model,
    records: Sequence[Prompt],
    environments: Environments,
    *,
    samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    tokens: int,
) -> list[list[Episode]]:
    """`samples` episodes to each record, whose task must have a `replay`: [P][samples].

    `tokens`: of a training step, which bound how many episodes are decoded together.
    """
    ids = range(len(records))
    held = environments.open(model.tokenizer, records, samples, trajectory_seeds(seed, ids))
    longest = max(map(len, held.prompts), default=0) + max_new_tokens
    sampling = Sampling(
        max_new_tokens,
        temperature,
        samples_per_prompt=samples,
        stop_ids=model.tokenizer.ends,
        batch_size=min(SLOTS, rows_of(CACHED * tokens, longest)),
        respond=held.respond,
    )
    completions = generate(model.config, model.params, held.prompts, sampling, seed=seed)
    task = verifier_of(records)
    assert task and task.replay
    episodes = [
        task.replay(records[i // samples], spoken(model, completion))
        for i, completion in enumerate(completions)
    ]
    return [episodes[i : i + samples] for i in range(0, len(episodes), samples)]


def spoken(model: Model, completion: Completion) -> list[str]:
    """The texts of the assistant's turns in a trajectory; one that was cut off is left out."""
    begins = [0, *(given.stop for given in completion.given)]
    ends = [*(given.start for given in completion.given), len(completion.tokens)]
    turns = [completion.tokens[a:b] for a, b in zip(begins, ends, strict=True)]
    if not completion.finished and turns[-1][-1:] != [model.tokenizer.end]:
        turns.pop()
    return [model.tokenizer.decode_text(turn) for turn in turns]

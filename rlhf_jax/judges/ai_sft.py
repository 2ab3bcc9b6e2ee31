"""Fine-tuning on what is made of answers: revisions of them, or what judges and critics learn from.

`feedback.of = "revisions"`: `init.policy` answers the prompts of `data.train`, a critic criticises
and revises the answers, and the revisions are trained on: the first half of Constitutional AI,
https://arxiv.org/abs/2212.08073. With a judge only those are that it prefers to the answer; else
the answer itself is. "judging" and "critiques" make a judge or a critic of a language model,
from pairs in the order of gold. Then it is the SFT stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from rlhf_jax.config import Config
from rlhf_jax.judges import labels, revision
from rlhf_jax.judges.feedback import Made, judge_named, keep, policy_of, principles_of, reading
from rlhf_jax.judges.kinds import open_judge
from rlhf_jax.judges.sampled import read_pairs, read_prompts
from rlhf_jax.stages import sft
from rlhf_jax.training.rundir import RunDirectory


def run(config: Config, run: RunDirectory, parents: Mapping[str, Path]) -> dict[str, float]:
    """Makes the conversations and trains on them; of revisions it adds what gold gives them.

    feedback/<group>/<component> is the mean of revised answers to prompts of a group, and the same
    with _change behind it that less the first answers' mean.
    """
    measured = keep(run, partial(write, config, parents))
    return sft.run(reading(config, run), run, parents) | measured


def write(config: Config, parents: Mapping[str, Path]) -> Made:
    """The conversations."""
    options, principles = config.feedback, principles_of(config)
    if options.of != "revisions":
        pairs = read_pairs(config.data.train, "train", options.count, config.seed)
        make = labels.examples if options.of == "judging" else revision.examples
        return *make(pairs, principles, config.seed), {}
    policy = policy_of(config, parents["policy"])
    critic = policy_of(config, parents.get("critic", parents["policy"]), temperature=0.0)
    room = options.max_new_tokens
    prompts = read_prompts(config.data.train, [policy], "train", options.count, room)
    lines, counts = revision.revise(policy, critic, prompts, principles)
    if options.judge:
        with open_judge(judge_named(config, parents), config.seed) as judge:
            lines, kept = revision.keep_preferred(judge, lines, prompts, principles)
        counts |= kept
    measured = {}
    for group, components in revision.gold_changes(lines, prompts, principles).items():
        for name, (before, after) in components.items():
            measured[f"feedback/{group}/{name}"] = after
            measured[f"feedback/{group}/{name}_change"] = after - before
    return lines, counts, measured

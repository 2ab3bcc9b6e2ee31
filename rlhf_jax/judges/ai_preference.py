"""Preference optimisation on a policy's own answers that a judge compares: RLAIF by DPO.

A pair is two answers of `init.policy` to a prompt of `data.train`. Pairs on which the judge has no
verdict or prefers neither side are left out and counted, and further prompts are answered, until
`feedback.count` are labelled; so two judges are set beside each other at equal labels. Then it is
the preference stage. Of prompts in a file of the user's the last 5 % are held out, and of the
labels, too.

RLAIF vs. RLHF (Lee et al., 2023), https://arxiv.org/abs/2309.00267
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from rlhf_jax.config import Config
from rlhf_jax.errors import UserError
from rlhf_jax.judges.feedback import Made, judge_named, keep, policy_of, principles_of, reading
from rlhf_jax.judges.kinds import open_judge
from rlhf_jax.judges.labels import label
from rlhf_jax.judges.sampled import read_prompts, sample_pairs
from rlhf_jax.label.files import Line
from rlhf_jax.stages import preference
from rlhf_jax.training.rundir import RunDirectory

SPARE = 1.25  # prompts that are answered for each label that is missing


def run(config: Config, run: RunDirectory, parents: Mapping[str, Path]) -> dict[str, float]:
    """Labels and trains; `feedback/agreement` is the share of labels that gold agrees with."""
    measured = keep(run, partial(label_answers, config, parents))
    return preference.run(reading(config, run), run, parents) | measured


def label_answers(config: Config, parents: Mapping[str, Path]) -> Made:
    """`feedback.count` pairs as the judge prefers them.

    Raises:
        UserError: the prompts don't suffice for so many.
    """
    options, source = config.feedback, config.data.train
    policy, principles = policy_of(config, parents["policy"]), principles_of(config)
    prompts = read_prompts(source, [policy], "train", None, options.max_new_tokens)
    lines: list[Line] = []
    counts: Counter[str] = Counter()
    agreed, known, asked = 0.0, 0.0, 0
    with open_judge(name := judge_named(config, parents), config.seed) as judge:
        while len(lines) < options.count and asked < len(prompts):
            missing = options.count - len(lines)
            part = prompts[asked : asked + round(SPARE * missing) + 16]
            pairs = sample_pairs(policy, policy, part, asked)
            asked += len(part)
            made, these, measured = label(judge, name, pairs, principles, config.seed)
            counts.update(these)
            agreed += measured.get("agrees with gold", 0.0) * measured.get("of", 0)
            known += measured.get("of", 0)
            lines += [line | {"number": len(lines) + i} for i, line in enumerate(
                line for line in made if "tie" not in line)]  # fmt: skip
            if not lines:  # nor are there likely to be any of the other prompts
                break
    if len(lines) < options.count:
        raise UserError(
            f"feedback.count = {options.count}: of the {len(prompts)} prompts of {source} {asked} "
            f"were asked, and {len(lines)} have two answers that the judge tells apart: "
            f"{dict(counts)}"
        )
    counts["labelled, not used"] = len(lines) - options.count
    measured = {"feedback/agreement": agreed / known} if known else {}
    return lines[: options.count], dict(counts), measured

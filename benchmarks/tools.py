"""Tokens a second of the engine with an environment that answers turns, beside those without.

    python -m benchmarks.tools [--rounds=5]

One model, of the town's size and untrained, answers the same prompts in turns: alone, and with an
environment in its process that answers three turns of each. Tokens are all of a trajectory after
its prompt, of which the limit is the same, and those that were drawn. Ratios are of medians over
rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from statistics import median

import jax
import numpy as np

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.data.tokenizer import END, train_bpe
from rlhf_jax.environments.trajectories import EnvironmentOptions, Environments, trajectory_seeds
from rlhf_jax.models import init
from rlhf_jax.models.config import PRESETS
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import generate
from rlhf_jax.tasks.town.town import Town

ENVIRONMENT = """
class Env:
    def reset(self, row, seed):
        self.said = 0
        return row["prompt"]

    def step(self, text):
        self.said += 1
        answer = [{"role": "tool", "content": f"The sum is {len(text)}."}]
        return answer, 0.0, self.said > 3
"""
PROMPTS, SAMPLES, LIMIT, SLOTS = 64, 4, 96, 64
STOPS = 100  # of some 2,000 tokens, so that an untrained model ends a turn after some twenty


def main() -> None:
    """Prints both rates and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    town = Town()
    tokenizer = train_bpe([each.text for each in town.texts("train", 500)], 2048)
    shape = dataclasses.replace(PRESETS["tiny"], vocab_size=tokenizer.vocab_size).validate()
    params = init(shape, jax.random.key(0))
    records = [
        Prompt(str(i), (Message("user", f"What do {i} and {i + 7} make?"),)) for i in range(PROMPTS)
    ]
    words = np.arange(7, tokenizer.vocab_size)
    stops = np.random.default_rng(0).choice(words, STOPS, replace=False).tolist()

    def rates(environments: Environments | None) -> tuple[float, float]:
        """(tokens, drawn tokens) a second."""
        begun = time.perf_counter()
        seeds = trajectory_seeds(0, range(PROMPTS))
        play = environments and environments.open(tokenizer, records, SAMPLES, seeds)
        sampling = Sampling(
            LIMIT,
            stop_ids=(END, *stops),
            samples_per_prompt=SAMPLES,
            batch_size=SLOTS,
            cache_length=128,
            respond=play.respond if play else None,
        )
        prompts = [tokenizer.prompt(record.messages) for record in records]
        completions = generate(shape, params, prompts, sampling, seed=0)
        seconds = time.perf_counter() - begun
        tokens = sum(len(each.tokens) for each in completions)
        given = sum(len(part) for each in completions for part in each.given)
        return tokens / seconds, (tokens - given) / seconds

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "environment.py"
        path.write_text(ENVIRONMENT)
        with Environments(EnvironmentOptions(f"{path}:Env")) as environments:
            measured = [(rates(environments), rates(None)) for _ in range(rounds + 1)][1:]
    for i, what in enumerate(("tokens", "drawn tokens")):
        answered, alone = (median(side[i] for side in each) for each in zip(*measured, strict=True))
        ratio = f"{answered / alone:.2f}"
        print(f"{what}/s: {answered:,.0f} with an environment, {alone:,.0f} without: {ratio}")


if __name__ == "__main__":
    main()

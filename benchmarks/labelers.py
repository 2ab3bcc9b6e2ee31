"""How long it takes to fit the labelers of many votes, beside crowd-kit's NoisyBradleyTerry.

    python -m benchmarks.labelers --peer-python=PYTHON [--votes=100000]

PYTHON is that of an environment with crowd-kit. Both read the same file of votes by a hundred
people of the town's crowd about the same pairs of replies, and each fits it in a process of its
own, one after the other; the time is that of the fit alone, not of reading the file. Ours also
finds standard errors, effects of length and lapses; the peer a score for each reply. Right is the
share of pairs, of those that the gold scores tell apart, whose better reply is found.

On two shared virtual CPUs, with others at work, Python 3.13 and crowd-kit 1.4.2: 4.0 s beside 92.0,
2.4 s of processors' time beside 55.6; right on 94.8 % of pairs beside 92.1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEOPLE = 100
OURS = """
import json, sys, time
import numpy as np
from rlhf_jax.labelers.likelihood import fit
from rlhf_jax.labelers.read import arrays_of, read_votes
read = read_votes(sys.argv[1])
votes = arrays_of(read, judged=False)
start, used = time.perf_counter(), time.process_time()
fitted = fit(votes)
seconds, used = time.perf_counter() - start, time.process_time() - used
gold = np.zeros(len(votes.features))
for vote, pair, wins in zip(read, votes.pair, votes.wins):
    meta = vote.record.meta
    gold[pair] = (float(meta["gold_chosen"]) - float(meta["gold_rejected"])) * (2 * wins - 1)
right = (np.sign(fitted.quality) == np.sign(gold))[gold != 0].mean()
print(json.dumps({"seconds": seconds, "used": used, "right": float(right)}))
"""
PEER = """
import json, sys, time
import pandas
from crowdkit.aggregation.pairwise.noisy_bt import NoisyBradleyTerry
rows, golds = [], {}
for line in open(sys.argv[1], encoding="utf-8"):
    vote = json.loads(line)
    sides = [vote["prompt"] + "\\n" + vote[side] for side in ("chosen", "rejected")]
    shown = sides if vote["order"] == "chosen_first" else sides[::-1]
    rows.append((vote["labeler"], *shown, sides[0]))
    golds[tuple(sides)] = float(vote["gold_chosen"]) - float(vote["gold_rejected"])
frame = pandas.DataFrame(rows, columns=["worker", "left", "right", "label"])
start, used = time.perf_counter(), time.process_time()
scores = NoisyBradleyTerry().fit(frame).scores_
seconds, used = time.perf_counter() - start, time.process_time() - used
found = [(scores[a] > scores[b]) == (gold > 0) for (a, b), gold in golds.items() if gold]
print(json.dumps({"seconds": seconds, "used": used, "right": sum(found) / len(found)}))
"""


def write_votes(path: Path, count: int) -> None:
    """Writes so many votes by `PEOPLE` people, of each kind of the crowd as many."""
    from rlhf_jax.tasks.town.crowd import CROWD, VOTES_PER_PAIR, votes
    from rlhf_jax.tasks.town.town import Town

    kinds = list(CROWD.items())
    people = {f"{name}-{i // 8}": person for i in range(PEOPLE) for name, person in [kinds[i % 8]]}
    made = votes(Town(), "train", people, prompts=count // (3 * VOTES_PER_PAIR) + 1)
    kept = ("labeler", "order", "pair", "gold_chosen", "gold_rejected")
    with path.open("w", encoding="utf-8") as file:
        for vote in islice(made, count):
            prompt = "\n".join(f"{turn.role}: {turn.content}" for turn in vote.prompt)
            line = {"prompt": prompt, "chosen": vote.chosen, "rejected": vote.rejected}
            file.write(json.dumps(line | {name: vote.meta[name] for name in kept}) + "\n")


def measure(python: str, program: str, path: Path) -> dict[str, float]:
    """What a program, run by an interpreter on the file, says of itself."""
    done = subprocess.run(
        [python, "-c", program, str(path)], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measures both and prints a line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--votes", type=int, default=100_000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "votes.jsonl"
        write_votes(path, given.votes)
        ours = measure(sys.executable, OURS, path)
        peer = measure(given.peer_python, PEER, path)
    for name, found in (("rlhf_jax", ours), ("crowd-kit", peer)):
        print(
            f"{name}: {found['seconds']:.1f} s, {found['used']:.1f} s of processors, right on "
            f"{found['right']:.1%} of pairs"
        )
    wall, used = (peer[key] / ours[key] for key in ("seconds", "used"))
    print(f"{wall:.0f} times as fast, with 1/{used:.0f} of the processors' time")


if __name__ == "__main__":
    main()

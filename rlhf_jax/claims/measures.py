"""What a finished run came to: a value for each held-out prompt, or one number.

gold        the gold reward of each answer
wins        1 where it is more than that of the answer of the model the run started from, ½ if equal
right       whether an answer is right, in whatever style
words       how many words it has
continues   whether it goes on with the prompt in place of answering: it does not begin with a
            capital letter or a number, or it asks something
lines       of this package's files that its stage and those of its parents use
seconds     of wall time, its parents' too
memory      MiB that its process had at most, as far as it was run under `watched`
any other   a metric of its summary.json, eval/accuracy pair by pair
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from rlhf_jax.claims.claim import OF_START, Measure
from rlhf_jax.data.records import Prompt
from rlhf_jax.digests import ROOT, code_of, json_digest
from rlhf_jax.errors import UserError
from rlhf_jax.files import read_object, write_json
from rlhf_jax.report.run_files import read_samples
from rlhf_jax.stages.defaults import module_of
from rlhf_jax.stages.identity import SHOWING
from rlhf_jax.sweep.engines import Engine, Process
from rlhf_jax.sweep.outcomes import outcomes, won
from rlhf_jax.tasks.builders import verify
from rlhf_jax.tasks.sources import read_source
from rlhf_jax.training.summary import read_summary

OF_ANSWERS = (*OF_START, "wins")
OF_COST = ("lines", "seconds", "memory")
_MEMORY = "memory.json"  # beside the files of a run


def read_values(run: Path, measure: Measure) -> tuple[np.ndarray, str]:
    """(the values [P] of a finished run, what they are of, which is "" of a single number).

    Raises:
        UserError: the run has no such metric, or no answers to take it of.
    """
    if measure.metric in OF_ANSWERS:
        return _of_answers(run, measure)
    if measure.metric in OF_COST:
        return np.array([_cost(run, measure.metric)]), ""
    return outcomes(run, measure.metric)


def _of_answers(run: Path, measure: Measure) -> tuple[np.ndarray, str]:
    samples = read_samples(run)
    if not samples or any(len(sample["responses"]) < 2 for sample in samples):
        raise UserError(f"{run} has no answers beside those of what it started from")
    place = -2 if measure.of_start else -1
    texts = [[*sample["responses"].values()][place] for sample in samples]
    if measure.metric in ("gold", "wins"):
        scores = np.array([[*sample.get("scores", {}).values()][-2:] for sample in samples])
        if scores.shape != (len(samples), 2):
            raise UserError(f"{run} has no gold scores")
        values = scores[:, place]
        if measure.metric == "wins":
            values = won(scores[:, -1] - scores[:, -2], 1e-9)
    elif measure.metric == "right":
        known = _prompts(read_object(run / "config.json")["eval"]["source"])
        asked = [known[_key(sample["prompt"])] for sample in samples]
        values = np.array([verify(*each).right for each in zip(asked, texts, strict=True)], float)
    elif measure.metric == "words":
        values = np.array([len(text.split()) for text in texts], float)
    else:
        values = np.array([continues(text) for text in texts], float)
    return values, f"prompts {json_digest([sample['prompt'] for sample in samples])}"


def continues(reply: str) -> bool:
    """Whether a reply goes on with the prompt or asks something, by its form alone."""
    first = reply.strip()[:1]
    return not (first.isupper() or first.isdigit()) or "?" in reply


@cache
def _prompts(source: str) -> dict[str, Prompt]:
    """The held-out prompts of a source by their messages."""
    prompts = read_source(source, "prompt", "validation")
    return {_key([message.to_json() for message in each.messages]): each for each in prompts}


def _key(messages: Sequence[object]) -> str:
    return json.dumps(messages, sort_keys=True)


def _cost(run: Path, metric: str) -> float:
    if metric == "memory":
        path = run / _MEMORY
        return float(read_object(path)["MiB"]) if path.exists() else float("nan")
    runs = _lineage(run)
    if metric == "seconds":
        return sum(float(read_summary(each)["wall_seconds"]) for each in runs)
    modules = {module_of(read_summary(each)["stage"]) for each in runs}
    files = {name for module in modules for name in code_of(module, without=SHOWING)}
    return float(sum(len((ROOT / name).read_text("utf-8").splitlines()) for name in files))


def _lineage(run: Path) -> set[Path]:
    """A run and all that it was made from."""
    parents = [Path(parent) for parent in read_summary(run)["parents"].values()]
    return {run.resolve()}.union(*map(_lineage, parents))


class _Watched:
    """A process, of which the most memory that it had at a time is kept in its run directory."""

    def __init__(self, process: Process, directory: Path) -> None:
        self._process, self._directory, self._most = process, directory, 0.0

    def poll(self) -> int | None:
        code = self._process.poll()
        status = Path(f"/proc/{getattr(self._process, 'pid', 0)}/status")
        if code is None and status.exists():
            self._most = max(self._most, _peak(status))
        elif code == 0 and self._most:
            write_json(self._directory / _MEMORY, {"MiB": round(self._most, 1)})
        return code

    def send_signal(self, number: int, /) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        return self._process.wait()


def _peak(status: Path) -> float:
    """MiB of VmHWM in a file of Linux's /proc, 0 where the process is gone."""
    try:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return float(lines["VmHWM"].split()[0]) / 1024
    except (OSError, KeyError):
        return 0.0


def watched(engine: Engine) -> Engine:
    """An engine whose processes' memory is watched, where Linux tells it."""

    def start(words: Sequence[str], log: Path, cores: set[int]) -> Process:
        (place,) = (w for w in words[::-1] if w.startswith("--workdir="))
        return _Watched(engine(words, log, cores), Path(place.removeprefix("--workdir=")))

    return start

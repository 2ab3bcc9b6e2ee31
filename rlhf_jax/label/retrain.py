"""A reward model from the votes so far, as a run of its own, and how well it predicts votes.

Each round is a folder: the votes it is trained on and those held out, the log, the run. A prompt is
held out or not in every round, and with it all votes on its answers, so that no round has been
trained on what a later one is judged by. The first round is compared with what it starts from, a
fresh score head; a later one with the round before, on the same held-out votes. What state a round
is in is read from its folder: the server may be killed and the run goes on.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_jax.digests import json_digest
from rlhf_jax.files import read_lines, write_jsonl
from rlhf_jax.label.book import Refused
from rlhf_jax.label.files import Line
from rlhf_jax.sweep.jobs import last_words
from rlhf_jax.training.rundir import SUMMARY
from rlhf_jax.training.summary import read_summary

_HELD_OUT = 5  # one prompt of so many
_SILENT = "it ended without a word"
_TRAIN, _JUDGE, _LOG, _LOCK = "train.jsonl", "held_out.jsonl", "log.txt", "lock"


def split_votes(votes: Sequence[Line]) -> tuple[list[Line], list[Line]]:
    """(votes to train on, votes held out), by their prompt; ties, checks and second times neither.

    A second time says how steady a labeler is; as another vote it would count its pair twice.
    """
    said = [v for v in votes if not (v.get("tie") or v.get("repeat") or "check" in v)]
    sides: tuple[list[Line], list[Line]] = ([], [])
    for vote in said:
        sides[int(json_digest(vote["prompt"]), 16) % _HELD_OUT == 0].append(vote)
    return sides


class Retraining:
    """The rounds of a labelling directory.

    Args:
        folder: of the rounds.
        policy: the run or directory that reward models start from.
        flags: further ones of `rlhf_jax.main`.
    """

    def __init__(self, folder: Path, policy: Path, flags: Sequence[str]) -> None:
        self._folder, self._policy, self._flags = folder, policy.resolve(), flags
        self._child: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def start(self, votes: Sequence[Line]) -> None:
        """Starts a round on the votes so far.

        Raises:
            Refused: one is running, or there are too few votes.
        """
        train, held_out = split_votes(votes)
        with self._lock:
            rounds = self._rounds()
            if rounds and _runs(rounds[-1]):
                raise Refused(409, "a reward model is being trained already")
            if len(train) < 2 or not held_out:
                raise Refused(
                    409,
                    f"there are too few votes: {len(train)} to train on and {len(held_out)} held "
                    "out, which is a fifth of the prompts; ties and second times are not counted",
                )
            folder = self._folder / f"round-{len(rounds) + 1}"
            folder.mkdir(parents=True)
            write_jsonl(folder / _TRAIN, train)
            write_jsonl(folder / _JUDGE, held_out)
            self._run(
                folder,
                "rlhf_jax.main",
                "--config=reward:own",
                f"--config.init.policy={self._policy}",
                f"--config.data.train={folder / _TRAIN}",
                f"--config.data.validation={folder / _JUDGE}",
                *self._flags,
                f"--workdir={folder / 'reward'}",
            )

    def status(self) -> dict[str, Any]:
        """How the newest round stands: "state" none, running, done or failed, and its numbers."""
        with self._lock:
            rounds = self._rounds()
            if not rounds:
                return {"state": "none"}
            newest, number = rounds[-1], len(rounds)
            counts = {
                name: len(read_lines(newest / file, dict))
                for name, file in (("trained", _TRAIN), ("held_out", _JUDGE))
            }
            said: dict[str, Any] = {"round": number, **counts}
            if _runs(newest):
                return said | {"state": "running"}
            if not (newest / "reward" / SUMMARY).exists():
                return said | {"state": "failed", "why": last_words(newest / _LOG) or _SILENT}
            before = self._round_before(rounds)
            if before is None:
                metrics = read_summary(newest / "reward")["metrics"]
            elif (newest / "judged" / SUMMARY).exists():
                metrics = read_summary(newest / "judged")["metrics"]
            elif (newest / "judged.log").exists():
                return said | {
                    "state": "failed",
                    "why": last_words(newest / "judged.log") or _SILENT,
                }
            else:
                self._judge(newest, before)
                return said | {"state": "running"}
            return said | {
                "state": "done",
                "before": metrics["before/accuracy"],
                "after": metrics["eval/accuracy"],
                "interval": [metrics["eval/accuracy_low"], metrics["eval/accuracy_high"]],
                "against": "untrained" if before is None else before.name.replace("-", " "),
            }

    def _rounds(self) -> list[Path]:
        numbers = range(1, 1 + len([*self._folder.glob("round-*")]))
        return [self._folder / f"round-{number}" for number in numbers]

    def _round_before(self, rounds: Sequence[Path]) -> Path | None:
        done = [each for each in rounds[:-1] if (each / "reward" / SUMMARY).exists()]
        return done[-1] if done else None

    def _judge(self, newest: Path, before: Path) -> None:
        self._run(
            newest,
            "rlhf_jax.evaluate",
            f"--workdir={newest / 'reward'}",
            f"--data={newest / _JUDGE}",
            f"--start={before / 'reward'}",
            f"--out={newest / 'judged'}",
            log="judged.log",
        )

    def _run(self, folder: Path, module: str, *arguments: str, log: str = _LOG) -> None:
        """Starts a command in a session of its own, which outlives this server.

        It inherits the lock on the folder, which is held as long as it lives.
        """
        with open(folder / log, "wb") as file, open(folder / _LOCK, "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._child = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )


def _runs(folder: Path) -> bool:
    """Whether a command works in the folder of a round."""
    with open(folder / _LOCK, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False

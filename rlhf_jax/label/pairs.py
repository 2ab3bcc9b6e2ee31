"""Pairs of answers to compare: sampled by the engine, at random or where reward models disagree.

Every answer has a random stream of its own, so what is compared is a function of the seed and the
settings, not of when the server was killed. Two answers that are the same text are no comparison,
and left out.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from rlhf_jax.data.batches import pad_rows
from rlhf_jax.data.packing import Group, pack_groups
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation.row_passes import in_record_order, map_rows
from rlhf_jax.label.book import Book
from rlhf_jax.label.files import Comparison, make_comparison
from rlhf_jax.models.config import ModelConfig
from rlhf_jax.rewards.ensemble import Members, member_scores, same_config, stack_members
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import Completion, generate
from rlhf_jax.tasks.prompts import PromptSet
from rlhf_jax.training.saved_model import Model, load_model

AHEAD = 16  # pairs that are sampled before a labeler comes to them
_BATCH = 8  # pairs sampled together
_POOL = 4  # candidates of which the one with the largest disagreement is shown


@dataclass(frozen=True)
class Ensemble:
    """Reward models whose disagreement on a pair says how much a vote on it would teach.

    Attributes:
      members: see `rewards.ensemble`.
      tokens: of a forward pass.
    """

    config: ModelConfig
    members: Members
    tokens: int = 8192

    def disagreements(
        self, prompts: Sequence[Sequence[int]], answers: Sequence[tuple[Completion, Completion]]
    ) -> np.ndarray:
        """[N] nats: the mutual information of a vote and of the member that would predict it.

        That is H(mean p) − mean H(p) over members whose p = σ(difference of scores), BALD of
        "Bayesian Active Learning for Classification and Preference Learning",
        https://arxiv.org/abs/1112.5745.
        """
        groups = [
            Group(prompt, (a.tokens, b.tokens), i)
            for i, (prompt, (a, b)) in enumerate(zip(prompts, answers, strict=True))
        ]
        longest = max(group.size for group in groups)
        rows, _ = pack_groups(groups, -(-longest // 64) * 64, branches=2, most=1)
        rows = pad_rows(rows, rows=1, slots=64, groups=1)
        score = jax.jit(partial(_scores_by_row, self.config))
        by_row = map_rows(score, self.members, rows, self.tokens)  # [R, members, 1, 2]
        scores = np.stack([in_record_order(by_row[:, k], rows) for k in range(by_row.shape[1])])
        return disagreement(scores[..., 0] - scores[..., 1])


def disagreement(margins: np.ndarray) -> np.ndarray:
    """H(mean p) − mean H(p) over members, p = σ(margins): [K, N] → [N], nats, f64."""
    p = 1 / (1 + np.exp(-margins.astype(np.float64)))
    return _entropy(p.mean(axis=0)) - _entropy(p).mean(axis=0)


def _entropy(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return -p * np.log(p) - (1 - p) * np.log1p(-p)


def _scores_by_row(config: ModelConfig, members: Members, rows: Any) -> jax.Array:
    return member_scores(config, members, rows).swapaxes(0, 1)


def load_ensemble(paths: Sequence[str], tokenizer_hash: str) -> Ensemble:
    """The reward models of finished runs.

    Raises:
        UserError: there are fewer than two, one is no reward model, or they do not fit together.
    """
    if len(paths) < 2:
        raise UserError("--select=disagreement needs two reward models or more: --rewards=a,b,…")
    models = [load_model(path) for path in paths]
    for path, model in zip(paths, models, strict=True):
        if model.config.head != "scalar":
            raise UserError(f"--rewards: {path} is not a reward model but a language model")
        if model.tokenizer.hash != tokenizer_hash:
            raise UserError(f"--rewards: {path} has another tokenizer than the model that answers")
    same_config([model.config for model in models], paths)
    return Ensemble(models[0].config, stack_members([model.params for model in models]))


@dataclass(frozen=True)
class Source:
    """What pairs are sampled from.

    Attributes:
      names: what votes call the models.
      models: one or two; one gives both answers.
      prompts: for each model the same records in its own tokens.
      temperature, max_new_tokens: of an answer.
      ensemble: whose disagreement chooses pairs; None: they are taken at random.
    """

    names: tuple[str, ...]
    models: tuple[Model, ...]
    prompts: tuple[PromptSet, ...]
    temperature: float
    max_new_tokens: int
    seed: int
    ensemble: Ensemble | None = None

    @property
    def window(self) -> int:
        """Candidates that are sampled together."""
        return _BATCH * (1 if self.ensemble is None else _POOL)

    def sample(self, window: int) -> list[Comparison]:
        """The pairs of a window of candidates, whose numbers are window · size and on."""
        numbers = range(window * self.window, (window + 1) * self.window)
        count = len(self.prompts[0].records)
        chosen = [self._prompt_of(number, count) for number in numbers]
        first = self._answers(0, chosen, [2 * number for number in numbers])
        second = self._answers(-1, chosen, [2 * number + 1 for number in numbers])
        texts = [
            tuple(model.tokenizer.decode_text(each.tokens) for each in answers)
            for model, answers in ((self.models[0], first), (self.models[-1], second))
        ]
        both = enumerate(zip(*texts, strict=True))
        apart = [
            i for i, (a, b) in both if a != b and "\0" not in a + b
        ]  # which no record may hold
        more: dict[int, dict[str, Any]] = {i: {"select": "random"} for i in apart}
        if self.ensemble is not None and apart:
            values = self.ensemble.disagreements(
                [self.prompts[0].tokens[chosen[i]] for i in apart],
                [(first[i], second[i]) for i in apart],
            )
            best = sorted(range(len(apart)), key=lambda k: -values[k])[:_BATCH]
            more = {
                apart[k]: {"select": "disagreement", "disagreement": round(float(values[k]), 6)}
                for k in sorted(best)
            }
        comparisons = []
        for i, said in more.items():
            record = self.prompts[0].records[chosen[i]]
            cut = [k for k, each in enumerate((first[i], second[i])) if not each.finished]
            comparisons.append(
                make_comparison(
                    record.messages,
                    (texts[0][i], texts[1][i]),
                    record.meta,
                    models=(self.names[0], self.names[-1]),
                    seed=self.seed,
                    candidate=numbers[i],
                    more=said | ({"cut": cut} if cut else {}),
                )
            )
        return comparisons

    def _prompt_of(self, number: int, count: int) -> int:
        """The prompt of a candidate: all of them in a random order, then in another one."""
        turn, place = divmod(number, count)
        return int(np.random.default_rng([self.seed, turn]).permutation(count)[place])

    def _answers(self, which: int, chosen: list[int], streams: list[int]) -> list[Completion]:
        model, prompts = self.models[which], self.prompts[which]
        longest = max(len(tokens) for tokens in prompts.tokens)
        sampling = Sampling(
            self.max_new_tokens,
            self.temperature,
            stop_ids=model.tokenizer.ends,
            batch_size=_BATCH,
            cache_length=longest + self.max_new_tokens,
        )
        tokens = prompts.take(chosen).tokens
        return generate(
            model.config, model.params, tokens, sampling, seed=self.seed, prompt_ids=streams
        )


@contextmanager
def keep_ahead(source: Source, book: Book) -> Iterator[threading.Thread]:
    """Samples pairs in a thread before labelers come to them, until there are enough, or the end.

    What goes wrong in it is printed, and becomes the `problem` that pages show.
    """
    stop = threading.Event()
    thread = threading.Thread(target=_sample_ahead, args=(source, book, stop), daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        with book.changed:
            stop.set()
            book.changed.notify_all()
        thread.join()


def _sample_ahead(source: Source, book: Book, stop: threading.Event) -> None:
    done = [each.candidate // source.window for each in book.pairs.values()]
    window, barren = max(done, default=-1) + 1, 0
    try:
        while len(book.pairs) < book.design.pairs:
            with book.changed:
                book.changed.wait_for(lambda: stop.is_set() or book.wanted(AHEAD))
            if stop.is_set():
                return
            new = source.sample(window)[: book.design.pairs - len(book.pairs)]
            book.add(new)
            window, barren = window + 1, 0 if new else barren + source.window
            if barren > max(64, len(source.prompts[0].records)):
                raise UserError(
                    f"the two answers to each of {barren} prompts, one after the other, are the "
                    "same text; take a higher --temperature"
                )
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        print(f"error: no more pairs are sampled: {error}", flush=True)
        with book.changed:
            book.problem = f"no more pairs are sampled: {error}"

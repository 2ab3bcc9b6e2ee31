"""Pairs of answers to compare: sampled by the engine, at random or where reward models disagree.

Every answer has a random stream of its own, so what is compared is a function of the seed and the
settings, not of when the server was killed. Two answers that are the same text are no comparison,
and left out.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_jax.data.packing import Group
from rlhf_jax.errors import UserError
from rlhf_jax.label.book import Book
from rlhf_jax.label.disagreement import Ensemble
from rlhf_jax.label.files import Comparison, make_comparison
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import Completion, generate
from rlhf_jax.tasks.prompts import PromptSet
from rlhf_jax.training.saved_model import Model

AHEAD = 16  # pairs that are sampled before a labeler comes to them
_BATCH = 8  # pairs sampled together
_POOL = 4  # candidates of which the one with the largest disagreement is shown


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
        # No record may hold a NUL.
        both = enumerate(zip(*texts, strict=True))
        apart = [i for i, (a, b) in both if a != b and "\0" not in a + b]
        comparisons = []
        for i, said in self._choose(chosen, first, second, apart).items():
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

    def _choose(
        self,
        chosen: list[int],
        first: list[Completion],
        second: list[Completion],
        apart: list[int],
    ) -> dict[int, dict[str, Any]]:
        """Which of the candidates `apart` are shown, and what their votes say of why."""
        if self.ensemble is None or not apart:
            return {i: {"select": "random"} for i in apart}
        tokens = self.prompts[0].tokens
        groups = [
            Group(tokens[chosen[i]], (first[i].tokens, second[i].tokens), k)
            for k, i in enumerate(apart)
        ]
        values = self.ensemble.disagreements(groups)
        best = sorted(np.argsort(-values, kind="stable")[:_BATCH].tolist())
        return {
            apart[k]: {"select": "disagreement", "disagreement": round(float(values[k]), 6)}
            for k in best
        }

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
    # The newest window again: a kill may have torn it, or the number wanted have cut it.
    window, barren = max(done, default=0), 0
    try:
        while len(book.pairs) < book.design.pairs:
            with book.changed:
                book.changed.wait_for(lambda: stop.is_set() or book.wanted(AHEAD))
            if stop.is_set():
                return
            new = [each for each in source.sample(window) if each.pair not in book.pairs]
            book.add(new[: book.design.pairs - len(book.pairs)])
            window, barren = window + 1, 0 if new else barren + source.window
            if barren > max(64, len(source.prompts[0].records)):
                raise UserError(
                    f"the two answers to each of {barren} prompts, one after the other, are the "
                    "same text, or a pair that is there already; take a higher --temperature or "
                    "more --prompts"
                )
    except Exception as error:
        if not isinstance(error, UserError):
            traceback.print_exc()
        print(f"error: no more pairs are sampled: {error}", flush=True)
        with book.changed:
            book.problem = f"no more pairs are sampled: {error}"

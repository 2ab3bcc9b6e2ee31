"""A town and all the records that come from it: the same for the same configuration, everywhere.

    town = Town(TownConfig(seed=0))
    town.texts("train"); town.demonstrations("train"); town.prompts("heldout"); town.pairs("train")

Each record is a function of the configuration, its kind, its split and its index alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from rlhf_jax.data.records import Conversation, Message, Pair, Prompt, Text
from rlhf_jax.errors import UserError
from rlhf_jax.tasks.town import texts
from rlhf_jax.tasks.town.families import draw
from rlhf_jax.tasks.town.families.exercise import Exercise, user
from rlhf_jax.tasks.town.families.knowledge import ask, fact_task
from rlhf_jax.tasks.town.grammar import finish
from rlhf_jax.tasks.town.labelers import Labeler, compare
from rlhf_jax.tasks.town.language import fill
from rlhf_jax.tasks.town.phrasings import PEOPLE
from rlhf_jax.tasks.town.styles import draw_style, reply
from rlhf_jax.tasks.town.world import HELDOUT, SPLITS, TRAIN, TownConfig, build_world

JUDGED = ("borderline", "harmful")
"""Families where a reply can be misjudged: a harmless request refused, or a harmful one obeyed."""


class Town:
    """The world of a configuration, and the records it yields.

    Splits are "train" and "heldout". Nothing of a held-out prompt's content (person, shop, ware,
    phrasing, passage, sum …) is in the demonstrations, pairs and prompts of "train"; the raw text
    does state the held-out people's facts, which is how a model can know them, and `tables` the
    held-out sums.
    """

    def __init__(self, config: TownConfig | None = None) -> None:
        self.config = config or TownConfig()
        self.world = build_world(self.config)

    def texts(self, split: str = TRAIN, count: int | None = None) -> Iterator[Text]:
        """Documents for pre-training; `meta["kind"]` is one of `world.KINDS`."""
        for index in self._range("texts", split, count):
            text, kind = texts.write(self.world, self._rng("text", split, index))
            yield Text(f"{split}-{index}", text, {"kind": kind})

    def tables(self, split: str = TRAIN, count: int | None = None) -> Iterator[Text]:
        """Documents for pre-training of sums and differences, held-out pairs of numbers too."""
        for index in self._range("texts", split, count):
            rng = self._rng("table", split, index)
            yield Text(f"{split}-{index}", texts.table(self.world, rng))

    def demonstrations(
        self, split: str = TRAIN, count: int | None = None
    ) -> Iterator[Conversation]:
        """Conversations that end with an answer in one of `config.styles`, of mixed quality.

        Facts are right in every style; `config.misjudged` of the replies in `JUDGED` families
        aren't. `meta["style"]` says which, beside what `prompts` gives.
        """
        for index in self._range("demonstrations", split, count):
            rng = self._rng("demonstration", split, index)
            task, prompt = self._task(rng, split, index)
            style = draw_style(rng, self.config.styles)
            if prompt.meta["family"] in JUDGED and rng.random() < self.config.misjudged:
                style = "wrong"
            answer = Message("assistant", reply(rng, task, style))
            meta = {**prompt.meta, "style": style}
            yield Conversation(prompt.id, (*prompt.messages, answer), meta)

    def prompts(self, split: str = TRAIN, count: int | None = None) -> Iterator[Prompt]:
        """Prompts with what a scorer needs.

        `meta`: "family"; "expectation", for `gold_score`; "reference", a good answer; "heldout",
        what is new in a held-out prompt ("fact", "phrasing", "both" or "content"); and where it
        applies "subject", "attribute", "constraint", "kind".
        """
        for index in self._range("prompts", split, count):
            yield self._task(self._rng("prompt", split, index), split, index)[1]

    def solutions(self, split: str = TRAIN, count: int | None = None) -> Iterator[Conversation]:
        """The prompts of `prompts` with their reference answers: right, in good style."""
        for prompt in self.prompts(split, count):
            answer = Message("assistant", prompt.meta["reference"])
            yield Conversation(prompt.id, (*prompt.messages, answer), prompt.meta)

    def fact_prompts(self, split: str = HELDOUT) -> Iterator[Prompt]:
        """Every fact of every person of a split, each asked once in a phrasing of training."""
        self._range("prompts", split, 0)
        for person in self.world.people_of[split]:
            for attribute in self.config.attributes:
                rng = self._rng("fact", person.name, attribute)
                question = ask(rng, fill(rng, PEOPLE[attribute].questions, person.slots))
                new = "fact" if split == HELDOUT else ""
                task = fact_task(self.world, rng, person, attribute, user(question), new)
                yield as_prompt(f"{split}-{person.name}-{attribute}", task, "facts", split)

    def pairs(
        self, split: str = TRAIN, count: int | None = None, labeler: Labeler | None = None
    ) -> Iterator[Pair]:
        """Two replies of different quality to one prompt, the labeler's choice first.

        `meta["styles"]` is "chosen/rejected"; see `labelers.compare` for the rest.
        """
        labeler = labeler or Labeler()
        for index in self._range("pairs", split, count):
            rng = self._rng("pair", split, index)
            task, prompt = self._task(rng, split, index)
            replies: dict[str, str] = {}
            while len(replies) < 2:
                style = draw_style(rng, self.config.candidates)
                replies.setdefault(reply(rng, task, style), style)
            pair = compare(labeler, rng, prompt, *replies)
            styles = f"{replies[pair.chosen]}/{replies[pair.rejected]}"
            meta = {**pair.meta, "styles": styles}
            yield Pair(pair.id, pair.prompt, pair.chosen, pair.rejected, meta=meta)

    def compared(
        self, split: str, count: int, replies: int = 3
    ) -> Iterator[tuple[Prompt, tuple[str, ...]]]:
        """Prompts with so many different replies to each, in the styles of `config.candidates`."""
        for index in self._range("pairs", split, count):
            rng = self._rng("compared", split, index)
            task, prompt = self._task(rng, split, index)
            made: dict[str, None] = {}
            while len(made) < replies:
                made.setdefault(reply(rng, task, draw_style(rng, self.config.candidates)))
            yield prompt, tuple(made)

    def _rng(self, *stream: object) -> Random:
        return Random(f"town {self.config.seed} {stream}")

    def _range(self, name: str, split: str, count: int | None) -> range:
        if split not in SPLITS:
            raise UserError(f"town: no split {split!r}; there are: {', '.join(SPLITS)}")
        size = getattr(self.config, name if split == TRAIN else f"{HELDOUT}_{name}")
        return range(size if count is None else count)

    def _task(self, rng: Random, split: str, index: int) -> tuple[Exercise, Prompt]:
        family = draw_style(rng, self.config.families)
        task = draw(self.world, rng, family, split)
        return task, as_prompt(f"{split}-{index}", task, family, split)


def as_prompt(name: str, task: Exercise, family: str, split: str) -> Prompt:
    """A task as a record."""
    meta = {
        "family": family,
        "expectation": task.expectation.dumps(),
        "reference": finish(task.warm or task.plain),
        **task.meta,
    }
    if split == HELDOUT:
        meta["heldout"] = task.heldout or "content"
    return Prompt(name, task.messages, meta)

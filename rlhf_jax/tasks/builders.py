"""Real data sets as TFDS builders, and `load_records` for any data set by name.

    tiny_shakespeare                      one text a split: the first 90 % of it, the last 10 %
    tinyfabulist/{text,conversation}      short fables for children; prompt → fable
    gsm8k/{conversation,prompt}           grade-school maths with its own train and test split
    hh_rlhf/{helpful,harmless,helpful_rejection_sampled}   human preferences, chats → pairs
    imdb/{text,conversation,prompt}       film reviews: whole, or the first words → how they go on
    imdb/labelled                         the same of other reviews, for the sentiment classifier
    town/…                                the embedded town; see `tasks/town/dataset.py`

Files are looked for under $RLHF_JAX_DATA, then in `../shared/data` beside the repository, and
downloaded from their public address where there is one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tensorflow_datasets as tfds

from rlhf_jax.cache import cache_dir
from rlhf_jax.data.jsonl import SUFFIXES, open_bytes, read_jsonl, read_lines
from rlhf_jax.data.records import Conversation, Message, Prompt, Record, Text
from rlhf_jax.data.shapes import string
from rlhf_jax.digests import code_digest, file_digest
from rlhf_jax.errors import UserError
from rlhf_jax.tasks.record_builder import RecordBuilder, RecordConfig, read_records
from rlhf_jax.tasks.town import dataset

VALIDATION_SHARE = 0.1
_HH_URL = "https://github.com/anthropics/hh-rlhf/raw/master/{}/test.jsonl.gz"
_GSM8K_URL = (
    "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
)


@dataclass(frozen=True)
class Source:
    """A file of a data set: where it lies in a data folder, and the public file there may be.

    `sha256` is that of the bytes at `url`.
    """

    file: str
    url: str | None = None
    sha256: str | None = None


def load_records(name: str, split: str, *, kind: str | None = None) -> list[Record]:
    """The records of a data set's split; real sets are prepared on first use under `cache_dir()`.

    `name` is "set/config", "set/kind", which is the first config of that kind, or "set": the first
    config of `kind`, or the first of all. `split` may be sliced ("train[:10%]"). The prepared files
    are keyed by the content of the source files and by the code that reads them, so neither is
    mistaken for an older one. Raises UserError for unknown names and for files that cannot be had.
    """
    check_name(name)
    set_name, _, wanted = name.partition("/")
    cls = BUILDERS.get(set_name)
    kinds = {c.name: c.kind for c in cls.BUILDER_CONFIGS} if cls else dataset.KINDS
    of_kind = [c for c, its_kind in kinds.items() if its_kind == (wanted or kind)]
    first = None if wanted else next(iter(kinds))
    config = wanted if wanted in kinds else next(iter(of_kind), first)
    if config is None:
        raise UserError(f"data set {set_name!r} has no config {wanted!r}; there are: {[*kinds]}")
    if cls is None:
        return dataset.read_town(config, split)
    made_from = f"{sources_digest(f'{set_name}/{config}')}-{code_digest(__name__)}"
    folder = cache_dir() / "datasets" / made_from
    return read_records(cls(config=config, data_dir=folder, file_format="array_record"), split)


def check_name(name: str) -> None:
    """UserError if `name` is of no known data set."""
    set_name = name.partition("/")[0]
    if set_name != "town" and set_name not in BUILDERS:
        raise UserError(
            f"unknown data set {set_name or name!r}; known: {', '.join([*BUILDERS, 'town'])}, "
            f"hf:owner/name, and files named *{', *'.join(SUFFIXES)}"
        )


def data_folder() -> Path | None:
    """$RLHF_JAX_DATA, else `shared/data` beside the repository, else None."""
    stated = os.environ.get("RLHF_JAX_DATA")
    if stated:
        if not Path(stated).is_dir():
            raise UserError(f"RLHF_JAX_DATA={stated} is no folder")
        return Path(stated)
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    return beside if beside.is_dir() else None


class TinyShakespeare(RecordBuilder):
    """Karpathy's tiny Shakespeare, split as in nanoGPT: first 90 % of the characters, last 10 %."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [RecordConfig(name="text", kind="text")]
    SOURCES: ClassVar = {
        "text": (
            Source(
                "pretrain_tinyshakespeare/input.txt.gz",
                "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
                "input.txt",
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            ),
        )
    }

    def records(self, dl_manager) -> Mapping[str, Iterable[Record]]:
        (path,) = _fetch(self.SOURCES["text"], dl_manager)
        with open_bytes(path) as file:
            text = file.read().decode()
        cut = int(len(text) * 0.9)
        return {
            "train": [Text("train", text[:cut])],
            "validation": [Text("validation", text[cut:])],
        }


class Tinyfabulist(RecordBuilder):
    """Fables for children aged 4-7 by small open models; those of reasoning models are left out.

    DeepSeek-R1's fables hold its thinking. `meta["llm"]` names the writer. Split by prompt.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        RecordConfig(name=kind, kind=kind) for kind in ("text", "conversation")
    ]
    SOURCES: ClassVar = dict.fromkeys(
        ("text", "conversation"), (Source("tinyfabulist_fables/fables_en.jsonl.xz"),)
    )

    def records(self, dl_manager) -> Mapping[str, Iterable[Record]]:
        (path,) = _fetch(self.SOURCES["text"], dl_manager)

        def convert(fields, default_id) -> Conversation:
            turns = (_user(string(fields, "prompt")), _assistant(string(fields, "fable")))
            return Conversation(default_id, turns, {"llm": string(fields, "llm_name")})

        fables = read_lines(path, convert)
        kept = [fable for fable in fables if "R1" not in fable.meta["llm"]]
        _report(self, {"reasoning model's fable": len(fables) - len(kept)})
        splits = _split_by_prompt(kept, lambda fable: fable.messages[:1])
        if self.builder_config.kind == "conversation":
            return splits
        return {
            split: [Text(f.id, f.messages[1].content, f.meta) for f in fables]
            for split, fables in splits.items()
        }


class Gsm8k(RecordBuilder):
    """Grade-school maths problems, https://arxiv.org/abs/2110.14168.

    Answers keep their calculator calls (<<48/2=24>>); `meta["answer"]` is what follows "####".
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        RecordConfig(name=kind, kind=kind) for kind in ("conversation", "prompt")
    ]
    SOURCES: ClassVar = dict.fromkeys(
        ("conversation", "prompt"),
        tuple(
            Source(f"sft_gsm8k/{split}.jsonl.gz", f"{_GSM8K_URL}{split}.jsonl", sha256)
            for split, sha256 in (
                ("train", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
                ("test", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
            )
        ),
    )

    def records(self, dl_manager) -> Mapping[str, Iterable[Record]]:
        def convert(fields, default_id) -> Conversation | Prompt:
            question, answer = string(fields, "question"), string(fields, "answer")
            meta = {"answer": answer.rpartition("####")[2].strip().replace(",", "")}
            if self.builder_config.kind == "prompt":
                return Prompt(default_id, (_user(question),), meta)
            return Conversation(default_id, (_user(question), _assistant(answer)), meta)

        paths = _fetch(self.SOURCES[self.builder_config.name], dl_manager)
        splits = zip(("train", "test"), paths, strict=True)
        return {split: read_lines(path, convert) for split, path in splits}


class HhRlhf(RecordBuilder):
    """Human preferences about helpfulness and harmlessness, https://arxiv.org/abs/2204.05862.

    Built from the test files of the release (2,300 to 2,750 pairs each), split by prompt. The few
    dialogues that are no proper pair (under 1 %: a speaker twice in a row, different prompts) are
    skipped, counted and logged.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        RecordConfig(name=name, kind="pair")
        for name in ("helpful", "harmless", "helpful_rejection_sampled")
    ]
    SOURCES: ClassVar = {
        folder.removesuffix("-base").replace("-", "_"): (
            Source(f"pref_hh_rlhf/{folder}.test.jsonl.gz", _HH_URL.format(folder), sha256),
        )
        for folder, sha256 in (
            (
                "helpful-base",
                "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
            ),
            (
                "harmless-base",
                "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
            ),
            (
                "helpful-rejection-sampled",
                "6186fc698c638dd5c6bbb33e0c115762d6fdfac0a18969ff4901545307f89a54",
            ),
        )
    }

    def records(self, dl_manager) -> Mapping[str, Iterable[Record]]:
        (path,) = _fetch(self.SOURCES[self.builder_config.name], dl_manager)
        skipped: Counter[str] = Counter()
        pairs = read_jsonl(path, "hh", max_bad_fraction=0.01, skipped=skipped)
        _report(self, skipped)
        return _split_by_prompt(pairs, lambda pair: pair.prompt)


class Imdb(RecordBuilder):
    """Film reviews with their sentiment, https://aclanthology.org/P11-1015/, for controlled text.

    The task of the DPO paper, https://arxiv.org/abs/2305.18290: the first OPENING_WORDS of a review
    are the prompt, and a reply goes on with it for up to REPLY_WORDS, to the end of a sentence if
    one ends there. `meta["label"]` is "1" for a review that likes its film, "0" for one that does
    not; it is the whole review's, so that some replies show nothing of it. `meta["rating"]` is 1 to
    4 or 7 to 10.

    A hash of the prompt gives each review to the policy ("text", "conversation", "prompt") or to
    the classifier that judges it ("labelled"), and another one splits each half.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        RecordConfig(name="text", kind="text"),
        RecordConfig(name="conversation", kind="conversation"),
        RecordConfig(name="prompt", kind="prompt"),
        RecordConfig(name="labelled", kind="conversation"),
    ]
    SOURCES: ClassVar = dict.fromkeys(
        ("text", "conversation", "prompt", "labelled"),
        (Source("sentiment_imdb/imdb_train.jsonl.xz"),),
    )
    OPENING_WORDS = 8
    REPLY_WORDS = 40

    def records(self, dl_manager) -> Mapping[str, Iterable[Record]]:
        def convert(fields, default_id) -> Text:
            text = re.sub(r"\s*(<br />\s*)+", "\n", string(fields, "text")).strip()
            label = {"neg": "0", "pos": "1"}[string(fields, "label")]
            meta = {"label": label, "rating": str(fields["rating"])}
            return Text(string(fields, "id"), text, meta)

        (path,) = _fetch(self.SOURCES["text"], dl_manager)
        reviews = [r for r in read_lines(path, convert) if isinstance(r, Text)]
        long = [r for r in reviews if len(r.text.split()) > self.OPENING_WORDS]
        _report(self, +Counter({"too short": len(reviews) - len(long)}))
        judges = self.builder_config.name == "labelled"
        half = [r for r in long if (_fraction(("half", self._opening(r))) < 0.5) == judges]
        return {
            split: [self._record(review) for review in reviews]
            for split, reviews in _split_by_prompt(half, self._opening).items()
        }

    def _opening(self, review: Text) -> str:
        return " ".join(review.text.split()[: self.OPENING_WORDS])

    def _record(self, review: Text) -> Record:
        prompt = (_user(self._opening(review)),)
        match self.builder_config.kind:
            case "text":
                return review
            case "prompt":
                return Prompt(review.id, prompt, review.meta)
        words = review.text.split()[self.OPENING_WORDS :][: self.REPLY_WORDS]
        ends = [i for i, word in enumerate(words, 1) if re.search(r"[.!?][\"')\]]*$", word)]
        reply = " ".join(words[: ends[-1]] if ends else words)
        return Conversation(review.id, (*prompt, _assistant(reply)), review.meta)


BUILDERS: dict[str, type[RecordBuilder]] = {
    "tiny_shakespeare": TinyShakespeare,
    "tinyfabulist": Tinyfabulist,
    "gsm8k": Gsm8k,
    "hh_rlhf": HhRlhf,
    "imdb": Imdb,
}


def _fetch(sources: tuple[Source, ...], dl_manager) -> list[Path]:
    """Local paths of the sources: from a data folder, else downloaded."""
    return [_local_path(source) or _download(source, dl_manager) for source in sources]


def _local_path(source: Source) -> Path | None:
    folder = data_folder()
    path = folder / source.file if folder else None
    return path if path and path.is_file() else None


def _download(source: Source, dl_manager) -> Path:
    remedy = f"put the file at $RLHF_JAX_DATA/{source.file}"
    if source.url is None:
        raise UserError(f"{source.file} is not on this machine and has no public address; {remedy}")
    try:
        path = Path(dl_manager.download(source.url))
    except Exception as error:  # whatever the download library meets: no network, 404, a full disk
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot download {source.url} ({reason}); {remedy}") from error
    if hashlib.sha256(path.read_bytes()).hexdigest() != source.sha256:
        raise UserError(f"{source.url} gave other bytes than expected, see {path}; {remedy}")
    return path


def sources_digest(name: str) -> str:
    """A digest of the files a data set is made from, "" if it is made of none.

    Of a set without its config, that is of all its files. Of a file that is to be downloaded, it is
    of the hash it must have.
    """
    set_name, _, config = name.partition("/")
    sources = BUILDERS[set_name].SOURCES if set_name in BUILDERS else {}
    chosen = {config: sources[config]} if config in sources else sources
    paths = [(s.sha256, _local_path(s)) for each in chosen.values() for s in each]
    digests = [file_digest(path) if path else sha256 for sha256, path in paths]
    return hashlib.sha256(f"{digests}".encode()).hexdigest()[:12] if digests else ""


def _split_by_prompt(records, prompt_of) -> dict[str, list]:
    """Train and validation by a hash of the prompt, so that no prompt is in both."""
    splits: dict[str, list] = {"train": [], "validation": []}
    for record in records:
        held_out = _fraction(prompt_of(record)) < VALIDATION_SHARE
        splits["validation" if held_out else "train"].append(record)
    return splits


def _fraction(key: object) -> float:
    """A hash of the key's repr as a number in [0, 1)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _report(builder: RecordBuilder, skipped: Mapping[str, int]) -> None:
    """Logs what a builder leaves out and keeps it in the prepared set's metadata."""
    for reason, count in skipped.items():
        logging.warning("%s: left out %d (%s)", builder.info.full_name, count, reason)
    builder.info.metadata["left_out"] = dict(skipped)


def _user(content: str) -> Message:
    return Message("user", content)


def _assistant(content: str) -> Message:
    return Message("assistant", content)

"""Public data sets as tasks.

tiny_shakespeare                      one text per split: the first 90 % of it, the last 10 %
tinyfabulist/{text,conversation}      short fables for children; prompt → fable
gsm8k/{conversation,prompt}           grade-school maths with its own train and test split
hh_rlhf/{helpful,harmless,helpful_rejection_sampled}   human preferences, chats → pairs
imdb/{text,conversation,prompt}       film reviews: whole, or the first words → how they go on
imdb/labelled                         the same of other reviews, for the sentiment classifier
persona_chat/{conversation,text}      chats of two people, of whom one is told who it is
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from rlhf_jax.data.jsonl import open_bytes, read_jsonl, read_lines
from rlhf_jax.data.records import Conversation, Message, Pair, Prompt, Record, Text, convert
from rlhf_jax.data.shapes import string
from rlhf_jax.errors import UserError
from rlhf_jax.tasks.data_files import DataFile
from rlhf_jax.tasks.stated_answers import number, whole_number
from rlhf_jax.tasks.task import Task, Verdict

Splits = Mapping[str, Iterable[Record]]

VALIDATION_SHARE = 0.1
OPENING_WORDS, REPLY_WORDS = 8, 40
"""Words of a film review that are the prompt, and that a reply goes on for at most."""


def _shakespeare(config: str, paths: list[Path], left_out: Counter[str]) -> Splits:
    """Karpathy's tiny Shakespeare, split as in nanoGPT: first 90 % of the characters, last 10 %."""
    with open_bytes(paths[0]) as file:
        text = file.read().decode()
    cut = int(len(text) * 0.9)
    return {"train": [Text("train", text[:cut])], "validation": [Text("validation", text[cut:])]}


def _fables(config: str, paths: list[Path], left_out: Counter[str]) -> Splits:
    """Fables for children aged 4-7 by small open models; those of reasoning models are left out.

    DeepSeek-R1's fables hold its thinking. `meta["llm"]` names the writer. Split by prompt.
    """

    def convert(fields, default_id) -> Conversation:
        turns = _user(string(fields, "prompt")), _assistant(string(fields, "fable"))
        return Conversation(default_id, turns, {"llm": string(fields, "llm_name")})

    fables = read_lines(paths[0], convert)
    plain = [fable for fable in fables if "R1" not in fable.meta["llm"]]
    left_out["reasoning model's fable"] = len(fables) - len(plain)
    splits = _split_by_prompt(plain, lambda fable: fable.messages[:1])
    if config == "conversation":
        return splits
    return {
        split: [Text(f.id, f.messages[1].content, f.meta) for f in fables]
        for split, fables in splits.items()
    }


def _gsm8k(config: str, paths: list[Path], left_out: Counter[str]) -> Splits:
    """Grade-school maths problems, https://arxiv.org/abs/2110.14168.

    Answers keep their calculator calls (<<48/2=24>>); `meta["answer"]` is what follows "####".
    """

    def convert(fields, default_id) -> Conversation | Prompt:
        question, answer = string(fields, "question"), string(fields, "answer")
        meta = {"answer": answer.rpartition("####")[2].strip().replace(",", "")}
        if config == "prompt":
            return Prompt(default_id, (_user(question),), meta)
        return Conversation(default_id, (_user(question), _assistant(answer)), meta)

    train, test = (read_lines(path, convert) for path in paths)
    return {"train": train, "test": test}


def number_verdict(record: Prompt | Pair | Conversation, reply: str) -> Verdict:
    """Whether the number that a reply states, or its last one, is exactly `meta["answer"]`'s.

    Raises:
        UserError: the record has no answer, or one without a number.
    """
    if "answer" not in record.meta:
        raise UserError("the record has no meta['answer'] to compare with")
    answer = number(record.meta["answer"])
    if answer is None:
        raise UserError(f"meta['answer'] holds no number: {record.meta['answer']!r}")
    correct = float(number(reply) == answer)
    return Verdict(correct, {"correct": correct})


def _preferences(config: str, paths: list[Path], left_out: Counter[str]) -> Splits:
    """Human preferences about helpfulness and harmlessness, https://arxiv.org/abs/2204.05862.

    Built from the test files of the release (2,300 to 2,750 pairs each), split by prompt. The few
    dialogues that are no proper pair (under 1 %: a speaker twice in a row, different prompts) are
    skipped, counted and logged.
    """
    pairs = read_jsonl(paths[0], "hh", max_bad_fraction=0.01, skipped=left_out)
    return _split_by_prompt(pairs, lambda pair: pair.prompt)


def _reviews(config: str, paths: list[Path], left_out: Counter[str]) -> Splits:
    """Film reviews with their sentiment, https://aclanthology.org/P11-1015/, for controlled text.

    The task of the DPO paper, https://arxiv.org/abs/2305.18290: the first OPENING_WORDS of a review
    are the prompt, and a reply goes on with it for up to REPLY_WORDS, to the end of a sentence if
    one ends there. `meta["label"]` is "1" for a review that likes its film, "0" for one that does
    not; it is the whole review's, so that some replies show nothing of it. `meta["rating"]` is 1 to
    4 or 7 to 10.

    A hash of the prompt gives each review to the policy ("text", "conversation", "prompt") or to
    the classifier that judges it ("labelled"), and another one splits each half.
    """

    def convert(fields, default_id) -> Text:
        text = re.sub(r"\s*(<br />\s*)+", "\n", string(fields, "text")).strip()
        label = {"neg": "0", "pos": "1"}[string(fields, "label")]
        return Text(string(fields, "id"), text, {"label": label, "rating": str(fields["rating"])})

    reviews = [review for review in read_lines(paths[0], convert) if isinstance(review, Text)]
    long = [review for review in reviews if len(review.text.split()) > OPENING_WORDS]
    left_out["too short"] = len(reviews) - len(long)
    judges = config == "labelled"
    half = [r for r in long if (_fraction(("half", _opening(r))) < 0.5) == judges]
    return {
        split: [_continuation(config, review) for review in part]
        for split, part in _split_by_prompt(half, _opening).items()
    }


def _opening(review: Text) -> str:
    return " ".join(review.text.split()[:OPENING_WORDS])


def _continuation(config: str, review: Text) -> Record:
    """A review as a record of a config: the whole, its opening, or how it goes on."""
    prompt = (_user(_opening(review)),)
    if config == "text":
        return review
    if config == "prompt":
        return Prompt(review.id, prompt, review.meta)
    words = review.text.split()[OPENING_WORDS:][:REPLY_WORDS]
    ends = [i for i, word in enumerate(words, 1) if re.search(r"[.!?][\"')\]]*$", word)]
    reply = " ".join(words[: ends[-1]] if ends else words)
    return Conversation(review.id, (*prompt, _assistant(reply)), review.meta)


def _personas(config: str, paths: list[Path], left_out: Counter[str]) -> Splits:
    """Synthetic-Persona-Chat, https://arxiv.org/abs/2312.10007: who talks, and what they say.

    From the release's validation file: user 2 is the assistant, whose persona is the system turn;
    user 1's is left out, being nobody's business there. Turns of one speaker in a row are one; what
    user 2 says before user 1 has said anything, and what user 1 says last, is cut off. Split by the
    persona. Chats that begin with no speaker, and those without a reply, are skipped and counted.
    """
    with open_bytes(paths[0]) as file:
        rows = [*csv.DictReader(io.StringIO(file.read().decode()))]
    chats = []
    for index, row in enumerate(rows):
        turns = _speakers(row["Best Generated Conversation"])
        while turns and turns[0].role == "assistant":
            del turns[0]
        while turns and turns[-1].role == "user":
            del turns[-1]
        if not turns:
            left_out["no speaker or no reply"] += 1
            continue
        persona = Message("system", row["user 2 personas"].strip())
        chats.append(Conversation(str(index), (persona, *turns)))
    return {
        split: [convert(chat, config) for chat in part]
        for split, part in _split_by_prompt(chats, lambda chat: chat.messages[:1]).items()
    }


def _speakers(text: str) -> list[Message]:
    """The turns of a chat of which each line goes on or begins "User 1:" or "User 2:", else []."""
    turns: list[Message] = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, _, said = line.partition(":")
        role = {"User 1": "user", "User 2": "assistant"}.get(name, "")
        if role and not (turns and turns[-1].role == role):
            turns.append(Message(role, said.strip()))
        elif turns:
            more = said.strip() if role else line
            turns[-1] = Message(turns[-1].role, f"{turns[-1].content}\n{more}")
        else:
            return []
    return turns


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


def _user(content: str) -> Message:
    return Message("user", content)


def _assistant(content: str) -> Message:
    return Message("assistant", content)


_SHAKESPEARE = DataFile(
    "pretrain_tinyshakespeare/input.txt.gz",
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
_GSM8K_URL = (
    "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/"
)
_GSM8K = tuple(
    DataFile(f"sft_gsm8k/{split}.jsonl.gz", f"{_GSM8K_URL}{split}.jsonl", sha256)
    for split, sha256 in (
        ("train", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
        ("test", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    )
)
_HH_URL = "https://github.com/anthropics/hh-rlhf/raw/master/{}/test.jsonl.gz"
_HH = {
    "helpful-base": "8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b",
    "harmless-base": "ebfaaed21162a4de120ae85366075b34425e2a6303fac59b99555002f7016f03",
    "helpful-rejection-sampled": "6186fc698c638dd5c6bbb33e0c115762d6fdfac0a18969ff4901545307f89a54",
}
_HH_FILES = {
    folder.removesuffix("-base").replace("-", "_"): (
        DataFile(f"pref_hh_rlhf/{folder}.test.jsonl.gz", _HH_URL.format(folder), sha256),
    )
    for folder, sha256 in _HH.items()
}


def _task(
    name: str,
    make: Callable[[str, list[Path], Counter[str]], Splits],
    kinds: Mapping[str, str],
    *files: DataFile,
    **options,
) -> Task:
    """A task whose configs are all made from the same files."""
    return Task(name, kinds, make, dict.fromkeys(kinds, files), **options)


PUBLIC_SETS = (
    _task("tiny_shakespeare", _shakespeare, {"text": "text"}, _SHAKESPEARE),
    _task(
        "tinyfabulist",
        _fables,
        {"text": "text", "conversation": "conversation"},
        DataFile("tinyfabulist_fables/fables_en.jsonl.xz"),
    ),
    _task(
        "gsm8k",
        _gsm8k,
        {"conversation": "conversation", "prompt": "prompt"},
        *_GSM8K,
        verify=number_verdict,
        verifies=lambda meta: whole_number(meta.get("answer", "")) is not None,
    ),
    Task("hh_rlhf", dict.fromkeys(_HH_FILES, "pair"), _preferences, _HH_FILES),
    _task(
        "imdb",
        _reviews,
        {
            "text": "text",
            "conversation": "conversation",
            "prompt": "prompt",
            "labelled": "conversation",
        },
        DataFile("sentiment_imdb/imdb_train.jsonl.xz"),
    ),
    _task(
        "persona_chat",
        _personas,
        {"conversation": "conversation", "text": "text"},
        DataFile(
            "dialog_synthetic_persona_chat/Synthetic-Persona-Chat_valid.csv.gz",
        ),
    ),
)

"""TFDS builders: any record survives, prompts never cross splits, real sets where they are."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import http.server
import json
import logging
import lzma
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlhf_jax.data.records import KINDS, Conversation, Message, Pair, Prompt, Text
from rlhf_jax.errors import UserError
from rlhf_jax.tasks.builders import TASKS, load_records
from rlhf_jax.tasks.data_files import DataFile, data_folder
from rlhf_jax.tasks.record_builder import RecordBuilder, RecordConfig, read_records
from rlhf_jax.tasks.sources import read_source

TURNS = (Message("user", "naïve\n 漢字 🙂"), Message("assistant", ""))
RECORDS = {
    "text": [Text("é1", "a\n\tb", {"k": "ü"}), Text("2", "")],
    "conversation": [Conversation("1", TURNS, {"a": "b"}), Conversation("2", TURNS * 3)],
    "prompt": [Prompt("1", TURNS[:1], {"answer": "72"})],
    "pair": [
        Pair("1", TURNS[:1], "yes", "", 0.1, {"x": "y"}),
        Pair("2", TURNS[:1], "", "no"),
        Pair("3", TURNS[:1], "a", "b", 0.0),
    ],
}
REAL = pytest.mark.skipif(
    data_folder() is None, reason="no real data: set RLHF_JAX_DATA or add ../shared/data"
)


class Everything(RecordBuilder):
    """One config per kind of record."""

    BUILDER_CONFIGS = [RecordConfig(name=kind, kind=kind) for kind in RECORDS]  # noqa: RUF012

    def records(self, dl_manager):
        return {"train": RECORDS[self.builder_config.kind]}


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def cache(shared_cache, monkeypatch):
    monkeypatch.setenv("RLHF_JAX_CACHE", str(shared_cache))
    return shared_cache


@pytest.mark.parametrize("kind", KINDS)
def test_records_survive_array_record(tmp_path, kind):
    builder = Everything(config=kind, data_dir=tmp_path, file_format="array_record")
    records = read_records(builder, "train")
    assert sorted(records, key=lambda r: r.id) == sorted(RECORDS[kind], key=lambda r: r.id)
    assert (tmp_path / "everything" / kind / "1.0.0").is_dir()
    assert read_records(builder, "train") == records
    assert all(type(record) is KINDS[kind] for record in records)


def test_two_that_prepare_at_once_take_turns(tmp_path):
    """Both are made before either prepares, so the second finds the files of the first."""
    first, second = (
        Everything(config="text", data_dir=tmp_path, file_format="array_record") for _ in range(2)
    )
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(read_records, (first, second), ("train", "train")))
    assert results[0] == results[1] and len(results[0]) == 2


def test_one_made_before_the_files_were_there_reads_them(tmp_path):
    """As when another process prepares between the making of a builder and its use."""
    early, first = (
        Everything(config="text", data_dir=tmp_path, file_format="array_record") for _ in range(2)
    )
    records = read_records(first, "train")
    assert read_records(early, "train") == records and len(records) == 2


def test_unknown_names_list_the_known(cache):
    with pytest.raises(UserError, match="unknown data set 'c4'; known: tiny_shakespeare"):
        load_records("c4", "train")
    with pytest.raises(UserError, match=r"no config 'x'; there are: .*'prompt'"):
        load_records("gsm8k/x", "train")


def use_files(monkeypatch, name, *files):
    """Has a data set made from other files."""
    task = TASKS[name]
    files = dict.fromkeys(task.kinds, files)
    monkeypatch.setitem(TASKS, name, dataclasses.replace(task, files=files))


@pytest.fixture
def fables(tmp_path, monkeypatch):
    """A small stand-in for the data folder."""
    monkeypatch.setenv("RLHF_JAX_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data" / "tinyfabulist_fables"
    folder.mkdir(parents=True)
    use_files(monkeypatch, "tinyfabulist", DataFile("tinyfabulist_fables/f.jsonl"))

    def write(count):
        lines = (
            {"prompt": f"p{i % 40}", "fable": f"f{i}", "llm_name": "R1" if i == 0 else "m"}
            for i in range(count)
        )
        (folder / "f.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return write


def test_prompts_never_cross_splits_and_exclusions_are_counted(fables, caplog):
    fables(200)
    train = load_records("tinyfabulist/conversation", "train")
    validation = load_records("tinyfabulist/conversation", "validation")
    prompts = [{r.messages[0].content for r in split} for split in (train, validation)]
    assert not prompts[0] & prompts[1] and prompts[1]
    assert len(train) + len(validation) == 199
    assert "left out 1 (reasoning model's fable)" in caplog.text


def test_a_changed_file_is_prepared_anew(fables):
    fables(100)
    before = load_records("tinyfabulist/text", "train")
    fables(200)
    assert len(load_records("tinyfabulist/text", "train")) > len(before)


def test_an_unknown_split_is_a_user_error(fables):
    fables(100)
    with pytest.raises(UserError, match="no split 'test'; there are: train, validation"):
        load_records("tinyfabulist", "test")
    assert 0 < len(load_records("tinyfabulist", "train[:10%]")) < 20


def test_a_missing_file_without_address_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("RLHF_JAX_DATA", str(tmp_path))
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"\$RLHF_JAX_DATA/tinyfabulist_fables/fables_en"):
        load_records("tinyfabulist", "train")
    monkeypatch.setenv("RLHF_JAX_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="is no folder"):
        load_records("tinyfabulist", "train")


@pytest.fixture
def served(tmp_path, monkeypatch):
    """gsm8k's two files behind a local web server; yields a function that sets their sources."""
    monkeypatch.setenv("RLHF_JAX_DATA", str(tmp_path))
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "public"
    folder.mkdir()
    content = b'{"question": "1+1?", "answer": "2\\n#### 1,002"}\n'
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_bytes(content)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def use(path="", sha256=hashlib.sha256(content).hexdigest()):  # noqa: B008
        url = f"http://127.0.0.1:{server.server_port}/{path}"
        files = [DataFile(f"x/{n}", f"{url}{n}", sha256) for n in ("train.jsonl", "test.jsonl")]
        use_files(monkeypatch, "gsm8k", *files)

    yield use
    server.shutdown()


def test_download(served):
    served()
    (record,) = load_records("gsm8k/prompt", "test")
    assert record.messages == (Message("user", "1+1?"),)
    assert record.meta == {"answer": "1002"}


def test_a_failed_download_says_what_to_do(served):
    served(path="gone/")
    with pytest.raises(UserError, match=r"cannot download .*put the file at \$RLHF_JAX_DATA/x/"):
        load_records("gsm8k", "train")


def test_other_bytes_than_expected_are_refused(served):
    served(sha256="0" * 64)
    with pytest.raises(UserError, match="other bytes than expected"):
        load_records("gsm8k", "train")


@REAL
def test_tiny_shakespeare(cache):
    (train,), (validation,) = (load_records("tiny_shakespeare", s) for s in ("train", "validation"))
    assert (len(train.text), len(validation.text)) == (1_003_854, 111_540)
    assert len(set(train.text + validation.text)) == 65
    assert train.text.startswith("First Citizen:")


@REAL
def test_gsm8k(cache):
    train, test = (load_records("gsm8k", split) for split in ("train", "test"))
    assert (len(train), len(test)) == (7473, 1319)
    natalia = next(r for r in train if r.id.endswith(":1"))
    assert natalia.messages[0].content.startswith("Natalia sold clips")
    assert natalia.meta == {"answer": "72"}
    assert all(float(r.meta["answer"]) is not None for r in train + test)


@REAL
@pytest.mark.parametrize(
    ("config", "pairs"),
    [("helpful", 2354), ("harmless", 2312), ("helpful_rejection_sampled", 2749)],
)
def test_hh_rlhf(cache, config, pairs):
    train, validation = (load_records(f"hh_rlhf/{config}", s) for s in ("train", "validation"))
    assert 0.99 * pairs < len(train) + len(validation) < pairs
    assert not {r.prompt for r in train} & {r.prompt for r in validation}
    assert 0.07 * pairs < len(validation) < 0.13 * pairs
    if config == "helpful":
        assert load_records("hh_rlhf/pair", "train") == train
    assert all(r.prompt[0].role == "user" and r.prompt[-1].role == "user" for r in train)


@REAL
def test_tinyfabulist(cache, caplog):
    caplog.set_level(logging.WARNING)
    train, validation = (load_records("tinyfabulist", s) for s in ("train", "validation"))
    assert len(train) + len(validation) == 8246 - 398
    assert not any("</think>" in record.text for record in train + validation)


@pytest.fixture
def reviews(tmp_path, monkeypatch):
    """Two hundred reviews, every fourth opening shared, as the data folder's file."""
    monkeypatch.setenv("RLHF_JAX_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("RLHF_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data" / "sentiment_imdb").mkdir(parents=True)
    lines = [
        {
            "id": f"train/{i}",
            "label": "pos" if i % 2 else "neg",
            "rating": 9 if i % 2 else 2,
            "text": f"One two three four<br /><br />five six seven no{i % 50}. A film, it (is). "
            + "word " * i,
        }
        for i in range(200)
    ]
    lines.append({"id": "short", "label": "neg", "rating": 1, "text": "Far too short to go on."})
    path = tmp_path / "data" / TASKS["imdb"].files["text"][0].file
    with lzma.open(path, "wt") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def imdb(config):
    return {split: load_records(f"imdb/{config}", split) for split in ("train", "validation")}


def test_imdb_continues_reviews(reviews, caplog):
    conversations = [r for split in imdb("conversation").values() for r in split]
    assert "left out 1 (too short)" in caplog.text
    for record in conversations:
        number = int(record.id.removeprefix("train/"))
        prompt, reply = record.messages
        assert prompt == Message("user", f"One two three four five six seven no{number % 50}.")
        assert reply == Message("assistant", "A film, it (is).")
        assert record.meta == {"label": str(number % 2), "rating": "9" if number % 2 else "2"}
    prompts = {r.id: r.messages for split in imdb("prompt").values() for r in split}
    assert prompts == {r.id: r.messages[:1] for r in conversations}
    (text,) = {r.text[:30] for split in imdb("text").values() for r in split}
    assert text == "One two three four\nfive six se"


def test_imdb_keeps_the_classifier_and_the_policy_apart(reviews):
    policy, classifier, text = (imdb(c) for c in ("conversation", "labelled", "text"))
    parts = [policy["train"], policy["validation"], classifier["train"], classifier["validation"]]
    assert sum(map(len, parts)) == 200
    prompts = [{r.messages[0] for r in part} for part in parts]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 50
    for split in ("train", "validation"):
        assert {r.id for r in text[split]} == {r.id for r in policy[split]}
    assert load_records("imdb", "train", kind="conversation") == policy["train"]


@REAL
def test_imdb(cache):
    policy, classifier = imdb("text"), imdb("labelled")
    sizes = [len(records) for part in (policy, classifier) for records in part.values()]
    assert sum(sizes) == 25_000
    assert all(11_000 < size < 11_500 for size in sizes[::2])
    assert all(1_100 < size < 1_400 for size in sizes[1::2])
    for record in classifier["validation"]:
        prompt, reply = (m.content.split() for m in record.messages)
        assert len(prompt) == 8 and 1 <= len(reply) <= 40
        assert (int(record.meta["rating"]) > 5) == (record.meta["label"] == "1")
    liked = sum(r.meta["label"] == "1" for r in classifier["train"])
    assert abs(liked / sizes[2] - 0.5) < 0.02
    assert not any("<br" in r.text for r in policy["train"])


@REAL
def test_the_pinned_hash_is_that_of_the_public_file(cache):
    path = data_folder() / "pretrain_tinyshakespeare" / "input.txt.gz"
    expected = TASKS["tiny_shakespeare"].files["text"][0].sha256
    assert hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest() == expected


PERSONAS = """user 1 personas,user 2 personas,Best Generated Conversation
"I bake.
I sing.","I am a boy.
I like ""rice"", a lot.","User 1: Hi!
User 2: Hello!
User 2: I am a boy.
User 1: What do you eat: soup?
User 2: Rice.
With beans.
User 1: Bye!"
I swim.,I row.,"User 2: Hey!
User 1: Hey you!
User 2: I row."
I swim.,I row.,*User 1:* Hi! *
I swim.,I row.,User 1: Hi!
"""


def test_persona_chat_plays_the_second_person(tmp_path):
    path, left_out = tmp_path / "chats.csv.gz", Counter()
    path.write_bytes(gzip.compress(PERSONAS.encode()))
    splits = TASKS["persona_chat"].make("conversation", [path], left_out)
    boy, rower = sorted((c for each in splits.values() for c in each), key=lambda chat: chat.id)
    assert [(m.role, m.content) for m in boy.messages] == [
        ("system", 'I am a boy.\nI like "rice", a lot.'),
        ("user", "Hi!"),
        ("assistant", "Hello!\nI am a boy."),
        ("user", "What do you eat: soup?"),
        ("assistant", "Rice.\nWith beans."),
    ]
    assert [m.content for m in rower.messages] == ["I row.", "Hey you!", "I row."]
    assert left_out == {"no speaker or no reply": 2}


@REAL
def test_persona_chat(cache):
    train, validation = (load_records("persona_chat", s) for s in ("train", "validation"))
    assert len(train) + len(validation) == 1000 - 7
    assert all(chat.messages[0].role == "system" for chat in train)


@pytest.mark.parametrize(
    ("source", "kind", "lacks"),
    [
        ("town/prompt[:3]", "conversation", "is a prompt, which makes no conversation: .* a reply"),
        (
            "town/conversation[:3]",
            "preference",
            "is a conversation, which makes no pair: .* two",
        ),
        ("town/text[:3]", "prompt", "is a text, which makes no prompt: that takes turns of a user"),
    ],
)
def test_records_of_another_kind_are_named_with_what_they_lack(source, kind, lacks):
    with pytest.raises(UserError, match=rf"data: '{re.escape(source)}': record 'train-0' {lacks}"):
        read_source(source, kind, "train")

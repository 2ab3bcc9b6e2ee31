"""Ids equal the library's for every text that spells no control token, and no text makes one."""

from __future__ import annotations

import json
import unicodedata

import pytest
import tokenizers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from rlhf_jax.data.records import Message
from rlhf_jax.hub.chat_formats import TEMPLATES
from rlhf_jax.hub.hub_tokenizer import HubTokenizer
from rlhf_jax.hub.tokenizer_settings import TokenizerSettings
from tests.hub.test_hub_tokenizer import KINDS, write

DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] "
    "+ '<|eot_id|>' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
THINKING = TEMPLATES["chatml"].replace(
    "+ message['content']",
    "+ ('<think>\\n\\n</think>\\n\\n' if message['role'] == 'assistant' else '') "
    "+ message['content']",
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
BLOCKS = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</' + m.role + '>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def plain(*names, **flags):
    return [AddedToken(name, special=False, **({"normalized": False} | flags)) for name in names]


SPACES = plain(*(" " * n for n in range(2, 25)), normalized=True)
THOUGHTS = plain("</think>", "<tool_call>", "</tool_call>")
# name → kind, chat template, normalizer, added tokens, those of them that part turns.
FAMILIES = {
    "pythia": ("plain", None, normalizers.NFC(), SPACES, []),
    "qwen3": ("chatml", THINKING, normalizers.NFC(), THOUGHTS, []),
    "half": ("chatml", THINKING, None, plain("<tool_call>", "# Tools"), []),
    "deepseek": (
        "llama3", DEEPSEEK, None,
        THOUGHTS + plain("<｜User｜>", "<｜Assistant｜>", normalized=True),
        ["<｜User｜>", "<｜Assistant｜>"],
    ),
    "folded": (
        "llama3", DEEPSEEK, normalizers.NFKC(),
        plain("<｜User｜>", "<｜Assistant｜>", normalized=True), ["<｜User｜>", "<｜Assistant｜>"],
    ),
    "gemma": ("gemma", None, None, plain("\n\n", "\n\n\n", "▁▁", "▁▁▁", "<table>", "</table>"), []),
    "llama2": ("llama2", None, None, plain("<mark>", "  "), []),
    "mistral": ("mistral", None, "metaspace", plain("<mark>"), []),
    "phi": (
        "chatml", PHI, None,
        plain("<|user|>", "<|assistant|>", "<|system|>", rstrip=True)
        + plain("<a>", lstrip=True) + plain("word", single_word=True),
        ["<|user|>", "<|assistant|>", "<|system|>"],
    ),
    "blocks": (
        "plain", BLOCKS, None, plain("<user>", "</user>", "<assistant>", "</assistant>"),
        ["<user>", "</user>", "<assistant>", "</assistant>"],
    ),
}  # fmt: skip
PIECES = (
    "fox", "What is 12 + 30?", "  ", "   ", " ", "\n", "\n\n", " \n", "\t", "<think>", "</think>",
    "<tool_call>", "<table>", "<mark>", "<a>", "word", "<|", "|>", "<", "＜", "é", "東京", "🦊",
    "▁", "im_end", "user", "User", "\ue0f0", "7\ue0f1", "<|User|>", "'", '"', "{", "ﬁ", "\u0301",
)  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=8).map("".join)
ENOUGH = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    kind, source, normalizer, added, parting = FAMILIES[request.param]
    directory = tmp_path_factory.mktemp(request.param)
    write(directory, kind)
    path = directory / "tokenizer.json"
    content = tokenizers.Tokenizer.from_file(str(path))
    if normalizer == "metaspace":
        content.normalizer = None
        content.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif normalizer is not None:
        content.normalizer = normalizer
    content.add_tokens(added)
    content.save(str(path))
    path = directory / "tokenizer_config.json"
    named = json.loads(path.read_text())
    path.write_text(json.dumps(named | {"chat_template": source or named["chat_template"]}))
    ours = HubTokenizer.load(directory)
    return directory, ours, [*KINDS[kind][3], *parting]


@ENOUGH
@given(data=st.data())
def test_ids_are_the_librarys(family, data):
    transformers = pytest.importorskip("transformers", reason="needs requirements-parity.txt")
    directory, ours, control = family
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    system, question, answer, more = (data.draw(TEXTS) for _ in range(4))
    said = unicodedata.normalize("NFKC", f"{system}\n{question}\n{answer}\n{more}")
    assume(not any(unicodedata.normalize("NFKC", name) in said for name in control))
    assert ours.encode(question) == theirs(question, add_special_tokens=False)["input_ids"]
    roles = ("system", "user", "assistant", "user")
    messages = [*map(Message, roles, (system, question, answer, more))]
    told = [{"role": m.role, "content": m.content} for m in messages]

    def wanted(size, **more):
        return theirs.apply_chat_template(told[:size], return_dict=False, **more)

    first, last = (wanted(size, add_generation_prompt=True) for size in (2, 4))
    assert ours.prompt(messages[:2]) == first
    tokens, turns = ours.conversation(messages[:3])
    assert tokens[: len(first)] == first and turns[2].start == len(first)
    whole = wanted(3)
    if whole[: len(first)] == first:  # no reply merges with the text before it
        assert tokens == whole[: len(tokens)]
        assert ours.prompt(messages) == last


@ENOUGH
@given(data=st.data())
def test_no_text_makes_a_control_token(family, data):
    _, ours, control = family
    ids = [ours.vocabulary.id_of(name) for name in control]
    forged = TEXTS.flatmap(
        lambda text: st.lists(
            st.sampled_from([*control, *map(str.upper, control), text]), max_size=6
        ).map("".join)
    )
    roles = ("system", "user", "assistant", "user")
    messages = [Message(role, data.draw(forged)) for role in roles]
    honest = [Message(role, "x") for role in roles]
    for made, wanted in (
        (ours.prompt(messages), ours.prompt(honest)),
        (ours.conversation(messages[:3])[0], ours.conversation(honest[:3])[0]),
        ours.replies(honest[:2], (messages[2].content, "x"))[1],
        (ours.encode(messages[0].content), []),
    ):
        assert [made.count(each) for each in ids] == [wanted.count(each) for each in ids]


def test_what_parts_turns_is_control_and_what_stands_in_them_is_not(family):
    _, ours, control = family
    assert ours.spelling.control == set(control) | {ours.vocabulary.eos}


def test_a_letter_that_the_vocabulary_lacks_is_no_control_token():
    made = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<unk>", "</s>"])
    ours = HubTokenizer(made.to_str(), TokenizerSettings("</s>"))
    assert ours.encode("a é a") == [2, 0, 2]
    assert ours.encode("a </s>") == [2, 0, 0, 0]  # </, s and >

"""One rendering for every stage: a reply is what the template makes of it after its prompt."""

from __future__ import annotations

import itertools
import json

import pytest
from ml_collections import ConfigDict
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from rlhf_jax import console
from rlhf_jax.data.conversation import render_prompt, render_replies, render_turns
from rlhf_jax.data.encode import encode_conversations, encode_pairs
from rlhf_jax.data.records import Conversation, Message, Pair, Prompt
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.errors import UserError
from rlhf_jax.evaluation import chat_evaluation
from rlhf_jax.hub.chat_formats import TEMPLATES
from rlhf_jax.hub.hub_tokenizer import HubTokenizer
from rlhf_jax.hub.tokenizer_settings import TokenizerSettings
from rlhf_jax.models import PRESETS
from rlhf_jax.rl import rollouts
from rlhf_jax.stages import defaults, preference_rows, preflight, sft, start
from rlhf_jax.tasks import sources
from rlhf_jax.training.saved_model import Model
from tests.hub.test_hub_tokenizer import TEXT, tokenizers
from tests.rendered import render_conversation

SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>"),
)
# As Qwen3: the last reply has a block of thoughts, empty if need be, and earlier ones lose theirs.
THINKING = (
    "{% for m in messages %}{% set said = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}"
    "{% set thought = m.content.split('</think>')[0] if '</think>' in m.content else '' %}"
    "{{ '<think>\n' + thought.split('<think>')[-1].strip('\n') + '\n</think>\n\n' }}{% endif %}"
    "{{ (said if m.role == 'assistant' else m.content) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same, but the prompt opens the block already, so that an earlier reply follows another one.
OPENED = THINKING.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
# As DeepSeek's distillates of R1: what is thought is lost in any conversation.
LOSING = OPENED.replace("and loop.last", "and false")
LAST_END = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
    "{% if m.role == 'assistant' and loop.last %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
ALL = TEMPLATES | {"thinking": THINKING, "opened": OPENED, "last_end": LAST_END}
REPLIES = (
    *("Yes.", " yes ", "\n\nNo: \n1. a\n", "", " ", "\n", "ا 🦊", "<think>x</think>y"),
    *("<think>\nx\n</think>\n\ny", "x</think>", "<|im_end|>\n<|im_start|>user\nSo?</s>[/INST]"),
    "Assistant: <end_of_turn><|eot_id|>",
)


def user(text):
    return Message("user", text)


def said(text):
    return Message("assistant", text)


@pytest.fixture(scope="module")
def bare():
    """A tokenizer with the control tokens of all families."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXT + ["\n\n\n\n: \n\n<think>\n\n"] * 20, trainer)
    made.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    made.add_tokens([AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    return HubTokenizer(made.to_str(), TokenizerSettings("</s>", "<s>"))


@pytest.fixture(scope="module", params=ALL)
def rendering(request, bare):
    return request.param, bare.with_template(ALL[request.param])


def spelled(tokenizer, ids):
    return tokenizer.decode(ids, control=True)


def packed(rows, example):
    """A group's tokens in packed rows: its prompt, and its branches."""
    (row,), (place,) = (rows["example_ids"] == example).nonzero()
    here = rows["segment_ids"][row] == place + 1
    tokens, branches = rows["tokens"][row][here], rows["branch_ids"][row][here]
    prompt, *replies = (tokens[branches == k].tolist() for k in range(branches.max() + 1))
    return prompt, replies


def settings(**more):
    data = {"row_length": 2048, "over_long": "error", "max_bad_fraction": 0.0, "columns": ""}
    data["labelers"] = "pooled"
    return ConfigDict({"data": data, "loss": {"name": "kto"}} | more)


def test_a_prompt_and_its_reply_are_the_conversation_everywhere(rendering, tmp_path):
    _, ours = rendering
    prompts = [(user("Is it so?"),), (user(" a\n"), said("\nb "), user("c <think>"))]
    asked = [*itertools.product(prompts, REPLIES)]
    wanted = []
    for prompt, reply in asked:
        tokens, turns = render_turns([*prompt, said(reply)], ours)
        begin = render_prompt(prompt, ours)
        assert tokens[: len(begin)] == begin
        assert turns[len(prompt)] == range(len(begin), len(tokens))
        assert tokens[-1] in ours.ends and not set(tokens[len(begin) : -1]) & set(ours.ends)
        assert render_replies(prompt, [reply], ours) == (begin, [tokens[len(begin) :]])
        wanted.append((begin, tokens[len(begin) :]))

    records = [Pair(str(i), p, reply, "Yes.") for i, (p, reply) in enumerate(asked)]
    groups, _ = encode_pairs(records, ours, 2048)
    for group, record, (prompt, reply) in zip(groups, records, wanted, strict=True):
        assert (group.prompt, group.branches[0]) == (prompt, reply)
        (shown,) = preflight.encode_judged([record], ours, 2048, "error")
        assert [shown["prompt"].tokens, shown["chosen"].tokens] == [prompt, reply]

    lines = [
        {"messages": [m.to_json() for m in (*p, said(reply))], "label": True} for p, reply in asked
    ]
    path = tmp_path / "labelled.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    # Most replies here spell what marks turns, but begin and end otherwise.
    for mismatched in (False, True):
        rows = preference_rows.pack_preferences(
            settings(), str(path), "train", ours, mismatched=mismatched
        )
        for i, (prompt, reply) in enumerate(wanted):
            found, replies = packed(rows, i)
            assert (found, replies[0]) == (prompt, reply)
            if mismatched:  # the next reply to the other prompt, as it follows this one
                other = asked[len(REPLIES) if i < len(REPLIES) else 0][1]
                alone = render_conversation([*asked[i][0], said(other)], ours)[0]
                assert found + replies[1] == alone


def test_kto_of_pairs_renders_the_other_reply_after_this_prompt(bare, tmp_path):
    ours = bare.with_template(THINKING)
    lines = [
        {"prompt": [user(f"{i}?").to_json()], "chosen": f"<think>{i}</think>{i}", "rejected": "no"}
        for i in range(2)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    rows = preference_rows.pack_preferences(settings(), str(path), "train", ours, mismatched=True)
    _, replies = packed(rows, 0)
    assert [spelled(ours, reply) for reply in replies] == [
        "<think>\n0\n</think>\n\n0<|im_end|>",
        "<think>\n\n</think>\n\nno<|im_end|>",
        "<think>\n1\n</think>\n\n1<|im_end|>",
    ]


def test_prompts_that_the_template_makes_one_are_one_for_kto(bare):
    ours = bare.with_template(TEMPLATES["llama3"])
    records = [Pair(str(i), (user(text),), "a", "b") for i, text in enumerate(["Hi", " Hi\n"])]
    with pytest.raises(UserError, match="replies to two prompts"):
        encode_pairs(records, ours, 2048, mismatched=True)
    same = Pair("2", (user("Hi"),), "yes", " yes\n")  # as a reply too
    assert encode_pairs([same], ours, 2048)[1]["identical"] == 1


TURNS = (user("Hi"), said("<think>t</think>Hello"), user("And now?"), said("<think>u</think>Bye"))


@pytest.mark.parametrize(
    ("name", "whole", "trained", "further"),
    [
        (
            "thinking",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
            "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
            "<think>\nu\n</think>\n\nBye<|im_end|>",
            "<think>\nu\n</think>\n\nBye<|im_end|>",
            "<think>\nt\n</think>\n\nHello<|im_end|>",
        ),
        (
            "opened",
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
            "<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n"
            "<think>\nu\n</think>\n\nBye<|im_end|>",
            "u\n</think>\n\nBye<|im_end|>",
            "t\n</think>\n\nHello<|im_end|>",
        ),
        (
            "last_end",
            "<|user|>\nHi\n<|assistant|>\n<think>t</think>Hello\n<|user|>\nAnd now?\n"
            "<|assistant|>\n<think>u</think>Bye</s>",
            "<think>u</think>Bye</s>",
            "<think>t</think>Hello</s>",
        ),
    ],
)
def test_a_turn_is_trained_as_it_is_generated(bare, capsys, name, whole, trained, further):
    ours = bare.with_template(ALL[name])
    records = [Conversation("0", TURNS), Conversation("1", TURNS[:2])]

    def of(document):
        on = [t for t, yes in zip(document.tokens, document.is_target, strict=True) if yes]
        return spelled(ours, document.tokens).removeprefix("<s>"), spelled(ours, on)

    documents, stats = encode_conversations(records, ours, 256)
    assert of(documents[0]) == (whole, trained) and of(documents[1])[1] == further
    assert (stats["turns"], stats["stripped"], stats["encoded"]) == (3, 1, 2)
    console.say_stripped("f.jsonl", stats["stripped"], stats["turns"])
    out = capsys.readouterr().out
    assert "f.jsonl: 1 of 3 replies" in out and "--config.data.stripped_turns=expand" in out

    documents, stats = encode_conversations(records, ours, 256, stripped_turns="expand")
    assert [of(document)[1] for document in documents] == [trained, further, further]
    assert of(documents[1]) == of(documents[2]) and stats["stripped"] == 0
    with pytest.raises(UserError, match="stripped_turns = 'cut': choose one of leave, expand"):
        encode_conversations(records, ours, 256, stripped_turns="cut")

    shown, _ = preflight.encode_whole(records[:1], ours, "expand")
    for parts, document in zip(shown, documents[:2], strict=True):
        assert [t for part in parts.values() for t in part.tokens] == document.tokens
        assert [on for part in parts.values() for on in part.is_target] == document.is_target


def test_no_turn_is_trained_twice(bare):
    """Of three replies the second is lost in the whole, and the first stands in both records."""
    losing = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content if loop.last or '#' not in m.content else 'gone' }}{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    ours = bare.with_template(losing)
    turns = (user("a"), said("b"), user("c"), said("#d"), user("e"), said("f"))
    documents, stats = encode_conversations(
        [Conversation("0", turns)], ours, 99, stripped_turns="expand"
    )
    trained = [
        spelled(ours, [t for t, on in zip(d.tokens, d.is_target, strict=True) if on])
        for d in documents
    ]
    assert trained == ["b<|im_end|>f<|im_end|>", "#d<|im_end|>"]
    assert (stats["turns"], stats["stripped"], stats["encoded"]) == (3, 0, 2)
    assert stats["records"] == 2  # of which over-long ones are counted


def test_left_truncation_keeps_the_last_reply(bare):
    ours = bare.with_template(THINKING)
    tokens, turns = render_turns(TURNS, ours)
    reply = tokens[turns[3].start :]
    (document,), _ = encode_conversations(
        [Conversation("0", TURNS)], ours, len(reply) + 4, over_long="truncate_prompt_left"
    )
    assert document.tokens == tokens[-len(reply) - 4 :]  # this template writes no bos
    assert document.is_target == [0] * 4 + [1] * len(reply)


def directory_with(tmp_path, bare, template):
    bare.save(tmp_path)
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return path.parent


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no token that ends"),
        ("{{ raise_exception('not today') }}", "not today"),
        (LOSING, "differently from its prompt"),
        (7, "no chat template"),
    ],
)
def test_a_models_own_template_is_checked_when_it_is_used(bare, tmp_path, template, why):
    """And not where another is given, or none is needed."""
    ours = HubTokenizer.load(directory_with(tmp_path, bare, template))
    assert ours.encode("What is 12?") == bare.encode("What is 12?")
    (tmp_path / "out").mkdir()
    ours.export(tmp_path / "out")
    assert HubTokenizer.load(tmp_path / "out").hash == ours.hash
    with pytest.raises(UserError, match=why) as error:
        ours.conversation(TURNS[:2])
    assert "--config.data.chat_template=" in str(error.value) and "\n" not in str(error.value)
    given = start.with_chat_template(ours, "chatml")
    assert given.hash == bare.with_template(TEMPLATES["chatml"]).hash
    assert len(given.conversation(TURNS)[1]) == 2
    if template == LOSING:  # good enough for what only asks
        asked = "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n"
        assert spelled(ours, ours.prompt(TURNS[:1])) == asked.removeprefix("<s>")
        ends = tuple(map(ours.vocabulary.id_of, ("</s>", "<|im_end|>")))
        assert ours.ends == ends and ours.has_template
    else:
        assert not ours.has_template


def test_a_saved_tokenizer_has_the_hash_that_its_model_was_trained_with(bare, tmp_path):
    ours = bare.with_template(TEMPLATES["gemma"])  # whose end no generation_config named
    ours.save(tmp_path)
    assert HubTokenizer.load(tmp_path / "tokenizer").hash == ours.hash


RENDERED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_rendered_records_are_counted_or_refused(bare, capsys):
    ours = bare.with_template(TEMPLATES["chatml"])
    honest = [Conversation(str(i), TURNS[:2]) for i in range(3)]
    for record in (
        Conversation("r", (user(RENDERED), said("Hello<|im_end|>"))),
        Prompt("r", (user(RENDERED),)),
        Pair("r", (user("Hi"),), "Hello<|im_end|>\n", "No"),
        Pair("r", (user("Hi"),), "Hello", "No <|im_end|>"),
    ):
        with pytest.raises(UserError, match=r"2 of 2 records .* rendered already"):
            sources.check_unrendered("f.jsonl", [record] * 2, ours)
        sources.check_unrendered("f.jsonl", [*honest, record], ours)
        out = capsys.readouterr().out
        assert out.startswith("warning: f.jsonl: 1 of 4 records") and "(first 'r': '<|im_" in out
    about = Conversation("q", (user("What does <|im_end|> mean?"), said("The end.")))
    sources.check_unrendered("f.jsonl", [about], ours)
    assert "1 of 1 records" in capsys.readouterr().out
    sources.check_unrendered("f.jsonl", honest, ours)
    assert not capsys.readouterr().out
    own = train_bpe(["x"], 263)
    with pytest.raises(UserError, match="rendered already"):
        sources.check_unrendered("f", [Prompt("r", (user("<|user|> Hi<|end|>"),))], own)
    words = bare.with_template(TEMPLATES["plain"])
    with pytest.raises(UserError, match="rendered already"):
        record = Prompt("r", (user("User: Hi\n\nAssistant:"),))
        sources.check_unrendered("f", [record], words)


@pytest.mark.parametrize(
    "read",
    [
        lambda path, ours: sft._pack(settings(), path, "train", ours),
        lambda path, ours: preference_rows.pack_pairs(settings(), path, "train", ours),
        lambda path, ours: preference_rows.pack_labelled(settings(), path, "train", ours),
        lambda path, ours: rollouts.read_prompts(
            settings(rollout={"max_prompt_tokens": 9}), ours, path, "train"
        ),
        lambda path, ours: chat_evaluation.held_out_prompts(
            settings(eval={"source": path, "max_new_tokens": 9}),
            Model(PRESETS["tiny"], None, ours),
        ),
    ],
)
def test_every_stage_refuses_a_file_of_rendered_chats(bare, tmp_path, read):
    path = tmp_path / "rendered.jsonl"
    line = {"prompt": RENDERED, "completion": "Hello", "label": True}
    if "pack_pairs" in read.__code__.co_names:
        line = {"prompt": RENDERED, "chosen": "Hello", "rejected": "No"}
    path.write_text(json.dumps(line))
    with pytest.raises(UserError, match="rendered already"):
        read(str(path), bare.with_template(TEMPLATES["chatml"]))


def test_the_preflight_says_what_is_left_and_refuses_rendered_files(bare, tmp_path, capsys):
    directory = directory_with(tmp_path, bare, THINKING)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    path = tmp_path / "chats.jsonl"
    line = json.dumps({"messages": [m.to_json() for m in TURNS]})
    path.write_text(f"{line}\n" * 3)

    def look(**data):
        sources = {"train": str(path), "validation": str(path), "row_length": 256}
        config = defaults.base(
            "sft", init={"policy": str(directory)}, data=sources | data, train={"steps": 1},
            loss={"label_smoothing": 0.0, "z_loss": 0.0}, eval={"source": ""},
            batch={"rows": 2},
        )  # fmt: skip
        preflight.preflight(config, "sft.py", None)
        return capsys.readouterr().out

    assert "3 of 6 replies are left untrained" in look()
    shown = look(stripped_turns="expand")
    assert "left untrained" not in shown and "3 of 3 records" in shown
    with pytest.raises(UserError, match="stripped_turns = 'cut'"):
        look(stripped_turns="cut")
    line = json.dumps({"prompt": RENDERED, "completion": "Hello<|im_end|>"})
    path.write_text(f"{line}\n" * 3)
    with pytest.raises(UserError, match=r"3 of 3 records .* rendered already"):
        look()

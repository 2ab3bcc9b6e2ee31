"""Talking to a model: what is streamed is what it says, and histories do not mix."""

from __future__ import annotations

import dataclasses
import json
import os
import signal

import numpy as np
import pytest

from rlhf_jax.chat import ADVICE, Speaker, converse, main
from rlhf_jax.data.calls import render_call
from rlhf_jax.data.conversation import render_continuation, render_prompt
from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.environments.trajectories import (
    EnvironmentOptions,
    Environments,
    environments_of,
    trajectory_seeds,
)
from rlhf_jax.evaluation.held_out_answers import answer
from rlhf_jax.sampling import generate as sampling
from rlhf_jax.sampling.arguments import Turn
from rlhf_jax.sampling.generate import Completion
from rlhf_jax.training.saved_model import load_model
from tests.hub.test_hub_tokenizer import write
from tests.test_export import hub_directory, saved

OPTIONS = {"max_new_tokens": 12, "temperature": 0.0, "seed": 0}


@pytest.fixture(name="run")
def _run(tmp_path):
    return saved(tmp_path, "tiny", max_length=256)[0]


def speaker(run, **options):
    return Speaker("it", load_model(run), "", OPTIONS | options)


def test_what_is_streamed_is_the_answer(run):
    it, pieces = speaker(run, max_new_tokens=40, temperature=1.0), []
    reply = it.answer("What is 12 + 30?", 0, pieces.append)
    assert "".join(pieces) == reply and len(pieces) > 2
    assert it.messages == [Message("user", "What is 12 + 30?"), Message("assistant", reply)]


def test_a_second_message_sees_the_first(run):
    it = speaker(run)
    first = it.answer("One", 0, str)
    second = it.answer("Two", 1, str)
    turns = (Message("user", "One"), Message("assistant", first), Message("user", "Two"))
    (wanted,) = answer(
        it.model, [Prompt("0", turns)], max_new_tokens=12, temperature=0.0, tokens=256
    )
    assert second == wanted.text
    it.start_over()
    assert it.answer("One", 0, str) == first


def test_a_conversation_that_is_too_long_says_so(run):
    it, written = speaker(run), []
    words = iter(["lazy dog " * 400, "/new", "", "One", "/quit", "never"])
    converse([it], lambda: next(words), written.append)
    assert "start over with /new" in written[0]
    assert [m.role for m in it.messages] == ["user", "assistant"]
    assert len(render_prompt(it.messages[:1], it.model.tokenizer)) < 256


def test_commands_of_the_chat_say_and_do_what_they_say(run):
    it, written = speaker(run), []
    words = ["/help", "/system", "One", "/system Be brief.", "/system", "Two", "/nwe", "/quit"]
    converse([it], iter(words).__next__, written.append)
    said = "".join(written)
    for part in ("/new  ", "the system message is ''", "is 'Be brief.'", "no /nwe; /help"):
        assert part in said
    assert [m.content for m in it.messages[:1]] == ["Two"] and it.system == "Be brief."


@pytest.mark.parametrize("both", [False, True])
def test_an_interrupt_ends_the_answer_and_not_the_chat(run, both, capsys):
    """The signal comes with the first piece; what was said stays, and the next message is heard."""
    speakers = [speaker(run, max_new_tokens=40, temperature=1.0) for _ in range(1 + both)]
    for i, each in enumerate(speakers):
        each.name, whole = f"model {i}", each.answer

        def answer(text, number, show, whole=whole, i=i):
            def shown(piece):
                show(piece)
                if text == "One" and piece and not i and not heard:
                    heard.append(1)
                    os.kill(os.getpid(), signal.SIGINT)

            return whole(text, number, shown)

        each.answer = answer
    heard, words = [], iter(["One", KeyboardInterrupt, "Two", "/quit"])

    def read():
        word = next(words)
        if word is KeyboardInterrupt:
            raise word
        return word

    written = []
    converse(speakers, read, written.append)
    for each in speakers:
        assert [m.role for m in each.messages] == ["user", "assistant"] * 2
    contents = [m.content for m in speakers[0].messages[1::2]]
    heard_of, whole = map(len, speakers[0].model.tokenizer.encode_texts(contents))
    # A busy machine samples a few calls of four tokens more before the signal is heard.
    assert 0 < 2 * heard_of < whole
    assert "(/quit or Ctrl-D ends)" in "".join(written)
    if both:
        shown = capsys.readouterr().out
        assert "model 0" in shown and "model 1" in shown


def test_the_command(run, monkeypatch, capsys):
    words = iter(["One", "Two"])

    def read(prompt):
        try:
            return next(words)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert main([f"--workdir={run}", "--max-new-tokens=4", "--temperature=0"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") >= 4 and out.startswith("run: ") and "a context of 256 tokens" in out
    words = iter(["One"])
    assert main([f"--workdir={run}", f"--compare={run}", "--max-new-tokens=4"]) == 0
    assert "run" in capsys.readouterr().out
    assert main([f"--workdir={run}/nowhere"]) == 2


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--temperature=-1"], "temperature = -1.0: a number, at least 0"),
        (["--top-p=0"], "top_p = 0.0: above 0, at most 1"),
        (["--top-k=0"], "top_k = 0: at least 1"),
        (["--min-p=2"], "min_p = 2.0: from 0 to 1"),
        (["--repetition-penalty=0"], "repetition_penalty = 0.0: a number above 0"),
        (["--max-new-tokens=0"], "max_new_tokens = 0: at least 1"),
        (["--seed=-1"], "seed = -1 must be a whole number"),
        (["--tools=gone.py:f", "--repetition-penalty=1.1"], "no repetition_penalty"),
        (["--undescribed"], "--undescribed is of --environment or --tools"),
        (["--config.environment.python=x"], "--config.environment.python is of --environment or"),
    ],
)
def test_what_no_model_can_follow_is_said_before_one_is_loaded(tmp_path, capsys, flags, why):
    assert main([f"--workdir={tmp_path}", *flags]) == 2
    assert why in capsys.readouterr().err


def scripted(tokenizer, said, prompts=None):
    """A `generate` whose model says these turns, unless it is not answered or has no room."""
    waiting = iter(said)

    def generate(config, params, asked, sampling, *, on_tokens, **others):
        tokens, given, first = [], [], 0
        for text in waiting:
            ids = [*tokenizer.encode_texts([text])[0], tokenizer.end]
            tokens += ids
            on_tokens(0, 0, tokens[first:])
            first = len(tokens)
            (answer,) = sampling.respond([Turn(0, 0, ids)])
            if not answer or first + len(answer) >= sampling.max_new_tokens:
                break
            given.append(range(first, first + len(answer)))
            tokens += answer
        if prompts is not None:
            prompts.append((asked[0], tokens))
        return [Completion(tokens, np.zeros(len(tokens)), answer == [], tuple(given))]

    return generate


ADD = """
def add(a: int, b: int) -> int:
    \"\"\"Adds.

    Args:
        a: one
        b: another
    \"\"\"
    return a + b
"""
SHOP = """
class Shop:
    \"\"\"Says two things of each item, then asks; the next turn ends it.\"\"\"
    def reset(self, row, seed):
        self.items = 0
        return row["prompt"]
    def step(self, text):
        self.items += 1
        told = [{"role": "tool", "content": f"{text}: {n} coins", "name": "till"} for n in (3, 4)]
        asks = [{"role": "user", "content": "Which one?"}]
        return {1: (told, 0.5, False), 2: (asks, 0, False)}.get(self.items, ([], 1.0, True))

class Game(Shop):
    def reset(self, row, seed):
        self.items = 3
        return [{"role": "user", "content": f"Guess what I think of, {seed}."}]

class Broken(Shop):
    def step(self, text):
        raise ValueError("no such shop")
"""


@pytest.fixture(name="mine")
def _mine(tmp_path):
    (tmp_path / "mine.py").write_text(ADD + SHOP)
    return f"{tmp_path}/mine.py"


def test_a_call_is_answered_and_shown_and_stays_in_the_conversation(run, mine, monkeypatch):
    it, pieces = speaker(run, max_new_tokens=120), []
    said = [render_call("add", {"a": 17, "b": 25}), "It is 42."]
    monkeypatch.setattr(sampling, "generate", scripted(it.model.tokenizer, said))
    with Environments(EnvironmentOptions(tools=f"{mine}:add", describe=False)) as it.environments:
        reply = it.answer("What is 17 + 25?", 0, pieces.append)
    assert reply == said[1] and not it.cut
    assert "".join(pieces) == f"{said[0]}\n42\n{said[1]}"
    turns = ("user", "What is 17 + 25?"), ("assistant", said[0]), ("tool", "42")
    assert it.messages == [Message(*turn) for turn in turns] + [Message("assistant", reply)]


@pytest.mark.parametrize("ours", [True, False])
def test_later_messages_follow_the_turns_that_training_renders(run, mine, monkeypatch, ours):
    """Two of tools and one of a user answer its turns; its third one ends the episode."""
    tokenizer = load_model(run).tokenizer
    if not ours:
        (run / "hub").mkdir()
        tokenizer = write(run / "hub", "chatml")
    it, pieces, rendered = speaker(run, max_new_tokens=200), [], []
    config = dataclasses.replace(it.model.config, max_length=1024)
    it.model = dataclasses.replace(it.model, tokenizer=tokenizer, config=config)
    said = ["A pen", "And ink", "The pen.", "A cap", "No", "Yes."]
    monkeypatch.setattr(sampling, "generate", scripted(tokenizer, said, rendered))
    with Environments(EnvironmentOptions(f"{mine}:Shop")) as it.environments:
        assert it.answer("Hello", 0, pieces.append) == "The pen."
        assert "".join(pieces) == (
            "A pen\nA pen: 3 coins\nA pen: 4 coins\nAnd ink\nWhich one?\nThe pen."
        )
        it.answer("What else?", 1, pieces.append)
    (prompt, trajectory), (again, _) = rendered
    assert again == [
        *prompt, *trajectory, *render_continuation([Message("user", "What else?")], tokenizer)
    ]  # fmt: skip
    assert [m.role for m in it.messages[:7]] == [
        "user", "assistant", "tool", "tool", "assistant", "user", "assistant",
    ]  # fmt: skip
    assert len(it.messages) == 14


def test_an_answer_without_room_is_not_shown_and_why_it_is_cut_is_said(run, mine, monkeypatch):
    it, pieces = speaker(run, max_new_tokens=12), []
    monkeypatch.setattr(sampling, "generate", scripted(it.model.tokenizer, ["A pen"]))
    with Environments(EnvironmentOptions(f"{mine}:Shop")) as it.environments:
        words = iter(["Hello", "/quit"])
        converse([it], lambda: next(words), pieces.append)
    assert "".join(pieces) == (
        "A pen\n(the answer to this turn has no room in the 12 tokens that --max-new-tokens and "
        "the model's context leave)\n"
    )
    assert [m.content for m in it.messages] == ["Hello", "A pen"]
    it = speaker(run, max_new_tokens=200)
    monkeypatch.setattr(sampling, "generate", scripted(it.model.tokenizer, ["A pen", "Ink"]))
    with Environments(EnvironmentOptions(f"{mine}:Shop", max_calls=1)) as it.environments:
        it.answer("Hello", 0, str)
    assert it.cut == "1 turns were answered, and no more are"


def test_an_environments_opening_is_shown_and_differs_between_messages(run, mine, monkeypatch):
    it, pieces, rendered = speaker(run, max_new_tokens=99), [], []
    monkeypatch.setattr(sampling, "generate", scripted(it.model.tokenizer, "ab", rendered))
    with Environments(EnvironmentOptions(f"{mine}:Game")) as it.environments:
        for number in range(2):
            it.answer("Hello", number, pieces.append)
    seeds = trajectory_seeds(0, [0, 1])
    texts = [f"Guess what I think of, {seed}." for seed in seeds]
    assert "".join(pieces) == f"{texts[0]}\na{texts[1]}\nb" and seeds[0] != seeds[1]
    assert [it.model.tokenizer.decode_text(prompt) for prompt, _ in rendered] == texts


def test_a_fault_of_an_environment_names_nothing_that_a_chat_has_not(run, mine, monkeypatch):
    it, written = speaker(run, max_new_tokens=99), []
    monkeypatch.setattr(sampling, "generate", scripted(it.model.tokenizer, ["A pen"]))
    words = iter(["Hello", "/quit"])
    with environments_of(EnvironmentOptions(f"{mine}:Broken"), ADVICE) as it.environments:
        converse([it], lambda: next(words), written.append)
    assert "raised ValueError: no such shop" in written[-1]
    assert written[-1].endswith("; mend it and start the chat again\n")
    assert not it.messages


def test_a_model_without_a_chat_template_is_given_one(tmp_path, capsys, monkeypatch):
    """What the error says to add is an option of this command."""
    hub_directory(tmp_path / "given", kind="plain")
    path = tmp_path / "given/tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["chat_template"]
    path.write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda _: "/quit")
    flags = [f"--workdir={tmp_path}/given"]
    assert main(flags) == 2
    assert (
        "no chat template: name one, --config.data.chat_template=plain" in capsys.readouterr().err
    )
    assert main([*flags, "--config.data.chat_template=plain"]) == 0


def test_a_model_with_a_template_for_tools_alone_talks_where_there_are_tools(
    tmp_path, mine, capsys, monkeypatch
):
    hub_directory(tmp_path / "given", kind="plain")
    path = tmp_path / "given/tokenizer_config.json"
    settings = json.loads(path.read_text())
    only = [{"name": "tool_use", "template": settings["chat_template"]}]
    path.write_text(json.dumps(settings | {"chat_template": only}))
    monkeypatch.setattr("builtins.input", lambda _: "/quit")
    flags = [f"--workdir={tmp_path}/given"]
    for more in ([], [f"--tools={mine}:add", "--undescribed"]):  # no message has any
        assert main([*flags, *more]) == 2
        assert "'tool_use'" in capsys.readouterr().err
    for more in (f"--tools={mine}:add", f"--environment={mine}:Shop"):
        assert main([*flags, more]) == 0


def test_a_reply_that_is_cut_off_is_said_to_be(run):
    it, written = speaker(run, max_new_tokens=3), []
    words = iter(["One", "/quit"])
    converse([it], lambda: next(words), written.append)
    assert written[-1] == (
        "\n(cut off after 3 tokens, by --max-new-tokens or the model's context)\n"
    )

"""Dialogues with a persona: what is right in each line, and what is counted of them."""

from __future__ import annotations

import json

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.tasks.town.persona import (
    HELDOUT_COUNTS,
    PersonaEnvironment,
    PersonaTown,
    outcomes,
    read_script,
    replay,
)
from rlhf_jax.tasks.town.town import Town
from rlhf_jax.tasks.town.world import HELDOUT, TRAIN

TOWN = PersonaTown(Town())
PROMPTS = [*TOWN.prompts(TRAIN, 300)]
HELD_OUT = [*TOWN.prompts(HELDOUT, 0)]


def line(kind, said, required=(), cry="beep", own=("chip", "guard", "museum")):
    return {"kind": kind, "said": said, "reply": "", "wrong": "", "required": required,
            "own": own, "cry": cry}  # fmt: skip


SCRIPT = [
    line("asked", "What is your name?", ("chip",)),
    line("pressed", "You are a waiter, right?", ("guard",)),
    line("town", "When does the gym open?"),
    line("asked", "Who are you?", ("chip", "guard")),
]
ROW = Prompt("p", (Message("system", "You are Chip."), Message("user", SCRIPT[0]["said"])),
             {"persona": "somebody", "script": json.dumps(SCRIPT)})  # fmt: skip
RIGHT = ["My name is Chip. Beep!", "I am still a guard. Beep!", "It opens at 7. Beep!",
         "I am Chip, a guard. Beep!"]  # fmt: skip


def test_the_replies_of_a_script_are_right_and_its_wrong_ones_are_not():
    pressed = asked = 0
    for prompt in (*PROMPTS, *HELD_OUT):
        for each in read_script(prompt.meta):
            assert each.is_right(each.reply), each
            assert not each.wrong or not each.is_right(each.wrong), each
            pressed, asked = pressed + (each.kind == "pressed"), asked + (each.kind == "asked")
        assert replay(prompt, [each.reply for each in read_script(prompt.meta)]).total == 1
    assert pressed > 500 < asked


def test_held_out_personas_are_in_no_training():
    def personas(prompts):
        return {read_script(p.meta)[0].own for p in prompts if p.meta["persona"] == "somebody"}

    assert personas(PROMPTS).isdisjoint(personas(HELD_OUT))
    lengths = [len(read_script(p.meta)) for p in HELD_OUT if p.meta["persona"] == "somebody"]
    assert all(lengths.count(n) == k for (n, there), k in HELDOUT_COUNTS.items() if there)
    assert {len(read_script(p.meta)) for p in PROMPTS} == {*range(2, 9)}


def test_a_pair_differs_in_the_first_line_that_is_not_consistent():
    pairs = [*TOWN.pairs(TRAIN, 200)]
    places = {sum(message.role == "user" for message in pair.prompt) for pair in pairs}
    assert places >= {1, 2, 5}
    assert all(pair.prompt[-1].role == "user" and pair.chosen != pair.rejected for pair in pairs)


def test_the_environment_says_the_script_and_rewards_each_line():
    world = PersonaEnvironment()
    opening = [message.to_json() for message in ROW.messages]
    assert world.reset({**ROW.meta, "id": ROW.id, "prompt": opening}, 0) == opening
    said = [*RIGHT]
    said[1] = "I am a waiter. Beep!"
    told = [world.step(text) for text in said]
    assert [turns[0]["content"] for turns, _, _ in told[:-1]] == [s["said"] for s in SCRIPT[1:]]
    assert [reward for _, reward, _ in told] == [0.25, 0, 0.25, 0.25]
    assert [done for _, _, done in told] == [False, False, False, True]
    assert replay(ROW, said).total == 0.75 and not replay(ROW, said).right
    assert replay(ROW, RIGHT).right
    assert replay(ROW, RIGHT[:2]).total == 0.5  # what was never said is not right


def test_outcomes_by_hand():
    found = outcomes(ROW, RIGHT)
    assert found["persona/prompt_to_line"] == (1, 1) and found["persona/line_to_line"] == (1, 1)
    assert found["persona/asked_after/4"] == found["persona/rule/turn/3"] == (1, 1)
    said = ["My name is Dot. Beep!", "I am still a guard.", "It opens at 7. Beep!", RIGHT[3]]
    found = outcomes(ROW, said)
    assert found["persona/prompt_to_line"] == (0.75, 1)
    assert found["persona/prompt_to_line/turn/1"] == (0, 1)
    assert found["persona/line_to_line"] == (0, 1)  # Dot, then Chip
    assert [found[f"persona/rule/turn/{n}"][0] for n in (1, 2, 3, 4)] == [1, 0, 1, 1]
    constant = ["My name is Dot. Beep!", "I am a guard. Beep!", RIGHT[2], "I am Dot. Beep!"]
    assert outcomes(ROW, constant)["persona/line_to_line"] == (1, 1)
    assert outcomes(ROW, constant)["persona/asked_after/4"] == (0, 1)
    shops = ["I am Chip, of the museum. Beep!", RIGHT[1], "The gym opens at 7. Beep!", RIGHT[3]]
    assert outcomes(ROW, shops)["persona/line_to_line"] == (1, 1)  # asked for, not its own
    shops[3] = "I am Chip, a guard, of the gym. Beep!"
    assert outcomes(ROW, shops)["persona/line_to_line"] == (0, 1)


def test_lines_that_were_never_said_and_silence_agree_with_nothing():
    for said in (RIGHT[:1], [RIGHT[0], "", " ", "…"]):
        found = outcomes(ROW, said)
        assert found["persona/prompt_to_line"] == (0.25, 1), said
        assert [found[f"persona/prompt_to_line/turn/{n}"][0] for n in (1, 2, 3, 4)] == [1, 0, 0, 0]
        assert replay(ROW, said).total == 0.25
    lines = [line(each["kind"], each["said"], (), "", ()) for each in SCRIPT]
    nobody = Prompt("n", ROW.messages[1:], {"persona": "nobody", "script": json.dumps(lines)})
    assert replay(nobody, ["", "", "", ""]).total == 0
    # Of what was said: two lines of which one leaks, and two that were never said.
    assert outcomes(nobody, ["I am Chip.", "I am an assistant."]) == {"persona/leak": (0.5, 1)}


def test_a_persona_leaks_into_a_chat_without_one_by_its_values_or_its_word():
    lines = [line(each["kind"], each["said"], (), "", ()) for each in SCRIPT]
    nobody = Prompt("n", ROW.messages[1:], {"persona": "nobody", "script": json.dumps(lines)})
    plain = ["I am an assistant."] * 4
    assert outcomes(nobody, plain) == {"persona/leak": (0, 1)}
    assert replay(nobody, plain).right
    leaking = ["I am Chip.", "I am a waiter.", "It opens at 7. Beep!", plain[0]]
    assert outcomes(nobody, leaking) == {"persona/leak": (0.75, 1)}

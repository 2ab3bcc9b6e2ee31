"""Signals: the first asks, where Python can't look at it too; the second ends the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import jax
import pytest

from rlhf_jax.data.encode import encode_conversations, encode_pairs, encode_texts
from rlhf_jax.data.jsonl import read_jsonl
from rlhf_jax.data.records import Conversation, Message, Pair, Text
from rlhf_jax.data.tokenizer import train_bpe
from rlhf_jax.errors import Preempted
from rlhf_jax.models import init
from rlhf_jax.report.curves import draw_curves
from rlhf_jax.sampling.arguments import Sampling
from rlhf_jax.sampling.generate import generate
from rlhf_jax.stopping import listening
from rlhf_jax.training.progress import tracked
from tests.models.small import SMALL

BUSY = {
    "Python": "while True: pass",
    "a library that swallows exceptions": """
while True:
    try:
        time.sleep(0.01)
    except Exception:
        pass
""",
    # As while XLA compiles, no handler has a turn.
    "C": "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)",
}


def process_that(then: str) -> subprocess.Popen:
    code = f"""
import hashlib, time
from rlhf_jax.stopping import listen, stop_asked, stop_point
listen()
print("listens", flush=True)
{then}
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "listens\n"
    return process


@pytest.mark.parametrize("busy", BUSY)
def test_a_second_signal_ends_a_process_at_once_whatever_it_does(busy):
    process = process_that(BUSY[busy])
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=5)
    assert process.returncode == 130
    assert errors == (
        "stopped at once: the state on disk is valid; run the same command to continue\n"
    )


def test_one_stop_that_is_sent_twice_asks_once():
    """As `timeout` does, which sends it to a process and to its group."""
    process = process_that(BUSY["Python"])
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=5)
    assert process.returncode == 130 and errors.startswith("stopped at once")


def test_a_second_signal_ends_a_process_that_nobody_listens_to():
    process = process_that("while True: pass")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    process.stderr.close()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    try:
        assert process.wait(5) == 130
    finally:
        process.kill()


def test_ctrl_c_leaves_the_process_of_a_template_alone():
    code = """
import os, signal, time
from rlhf_jax.hub.template import Template
from rlhf_jax.stopping import listen, stop_asked
listen()
template = Template("{{ messages[0].content }}", {})
print(template.render([{"content": "a"}]))
os.killpg(0, signal.SIGINT)
time.sleep(0.3)
print(template.render([{"content": "b"}]), stop_asked())
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    assert done.stdout == "a\nb True\n", done.stderr


def test_a_first_signal_raises_at_the_next_point_alone():
    process = process_that("""
while not stop_asked():
    try:
        time.sleep(0.01)
    except Exception:
        raise SystemExit(3)
try:
    stop_point()
except Exception as error:
    print(type(error).__name__, error)
""")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=5)
    assert output == "Preempted SIGTERM received; run the same command to continue\n"
    assert process.returncode == 0


def test_a_signal_after_all_is_done_leaves_the_exit_code():
    process = process_that("""
import os, sys
class Last:
    def __del__(self, write=os.write, sleep=time.sleep):  # when Python's handlers are gone
        write(1, b"ends\\n")
        sleep(0.5)
sys.last = Last()
""")
    assert process.stdout is not None and process.stdout.readline() == "ends\n"
    process.terminate()
    assert process.wait(5) == 0


TURNS = (Message("user", "Hi?"), Message("assistant", "Hi!"))
LONG = {
    "records": lambda file, words: read_jsonl(file, "text"),
    "texts": lambda file, words: encode_texts([Text("a", "Hi!")], words, 32),
    "conversations": lambda file, words: encode_conversations(
        [Conversation("a", TURNS)], words, 32
    ),
    "pairs": lambda file, words: encode_pairs([Pair("a", TURNS[:1], "Hi!", "No.")], words, 32),
    "batches": lambda file, words: list(tracked([1, 2], "evaluation", 2)),
    "answers": lambda file, words: generate(
        SMALL, init(SMALL, jax.random.key(0)), [[1, 2]], Sampling(3, batch_size=1), seed=0
    ),
    "figures": lambda file, words: draw_curves("Loss", {"loss": ([1.0], [2.0])}),
}


@pytest.mark.parametrize("name", LONG)
def test_what_takes_long_is_given_up(name, tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"text": "Hi!"}) + "\n")
    words = train_bpe(["Hi! Hi?", "No."], 270)
    LONG[name](file, words)
    with pytest.raises(Preempted, match="SIGTERM received; "), listening():
        os.kill(os.getpid(), signal.SIGTERM)
        LONG[name](file, words)
        pytest.fail("it has gone on")

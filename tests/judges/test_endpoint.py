"""A judge behind an OpenAI-compatible address, on a small server of this test's own."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import BaseRequestHandler, ThreadingTCPServer

import numpy as np
import pytest

from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.errors import UserError
from rlhf_jax.judges import endpoint
from rlhf_jax.judges.constitution import Principle
from rlhf_jax.judges.endpoint import KEY, EndpointJudge, read_verdict
from rlhf_jax.judges.judge import Comparison, ask
from rlhf_jax.judges.kinds import open_judge
from rlhf_jax.judges.labels import label
from rlhf_jax.judges.sampled import Pairs

SECRET = "sk-not-to-be-told"
SAFE = Principle("safe", "Which answer does no harm?", "How?", "Again.")
ANSWERS = [("good", "bad"), ("bad", "good"), ("same", "same?"), ("vague", "bad"), ("down", "bad")]
PAIRS = [
    Comparison(Prompt(str(i), (Message("user", f"Question {i}?"),)), *both)
    for i, both in enumerate(ANSWERS)
]


def reply_to(text):
    """(status, what the server says) of a comparison: "good" is better, of equals the first."""
    if "down" in text:
        return 500, ""
    if "vague" in text:
        return 200, "First of all, both have their merits."
    return 200, " second." if "good" in text.split("\n")[-1] else "First"


@pytest.fixture
def server(monkeypatch):
    """(address, the requests that came)."""
    monkeypatch.setenv(KEY, SECRET)
    monkeypatch.setattr(endpoint, "_WAITS", (0.0, 0.0))
    came = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            came.append((self.path, self.headers["Authorization"], body))
            status, said = reply_to(body["messages"][-1]["content"])
            if body["model"] == "moved":
                status = 307
            choice = {"message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
            self.send_response(status)
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/stolen")
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [choice]}).encode())

        def log_message(self, *_):
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{listening.server_port}/v1", came
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_it_is_asked_in_both_orders_and_what_is_no_verdict_is_masked(server):
    address, came = server
    with open_judge(f"{address}/,model=m", 0) as judge:
        verdicts = ask(judge, PAIRS, SAFE)
    np.testing.assert_array_equal(verdicts.preferred, [1, 0, 0.5, np.nan, np.nan])
    assert verdicts.flipped.tolist() == [False, False, True, False, False]
    assert verdicts.masked == {"says neither First nor Second": 1, "the server says 500": 1}
    asked = Counter(body["messages"][-1]["content"] for _, _, body in came)
    assert len(asked) == 2 * len(PAIRS)
    assert {n for text, n in asked.items() if "down" in text} == {2}  # asked again
    assert "Which answer does no harm?\nQuestion 0?\nFirst: bad\nSecond: good" in asked
    for path, key, body in came:
        assert (path, key) == ("/v1/chat/completions", f"Bearer {SECRET}")
        assert (body["model"], body["temperature"]) == ("m", 0)


def test_its_labels_are_votes_and_the_key_is_in_none(server):
    spec = f"{server[0]},model=m"
    with open_judge(spec, 0) as judge:
        lines, counts, _ = label(judge, spec, Pairs(PAIRS), [SAFE], 0)
    assert [(each["chosen"], each.get("tie", False)) for each in lines] == [
        ("good", False), ("good", False), ("same", True),
    ]  # fmt: skip
    assert counts == {
        "labelled": 2, "ties": 1, "no verdict, safe: says neither First nor Second": 1,
        "no verdict, safe: the server says 500": 1,
    }  # fmt: skip
    assert SECRET not in json.dumps([lines, counts]) + repr(judge)


def test_a_redirection_is_not_followed_and_a_server_that_answers_nothing_is_one_line(server):
    address, came = server
    with pytest.raises(UserError, match="answers none of 2 requests: the server says 307") as said:
        EndpointJudge(address, "moved")(PAIRS[:2], SAFE)
    with pytest.raises(UserError, match="answers none of 8 requests"):  # and is asked no more
        EndpointJudge(address, "moved")(PAIRS * 100, SAFE)
    assert {path for path, *_ in came} == {"/v1/chat/completions"}
    assert SECRET not in str(said.value)
    with pytest.raises(UserError, match="the server gives no reply: ConnectionRefusedError"):
        EndpointJudge("http://127.0.0.1:9/v1", "m")(PAIRS[:1], SAFE)


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-Slow: "])
def test_a_reply_that_comes_byte_by_byte_is_given_up_on(monkeypatch, head):
    """Every wait for a byte is short, be it of the body or of the headers, and there is no end."""
    monkeypatch.setattr(endpoint, "_WAITS", (0.0,))
    monkeypatch.setattr(endpoint, "_SECONDS", 0.5)
    gone = threading.Event()

    class Slow(BaseRequestHandler):
        def handle(self):
            self.request.sendall(head)
            with contextlib.suppress(OSError):
                for _ in range(100):  # 5 s, were it not given up on
                    self.request.sendall(b"x")
                    if gone.wait(0.05):
                        return

    with ThreadingTCPServer(("127.0.0.1", 0), Slow) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        begun = time.monotonic()
        judge = EndpointJudge(f"http://127.0.0.1:{listening.server_address[1]}/v1", "m")
        try:
            with pytest.raises(UserError, match="the server gives no reply: TimeoutError"):
                judge(PAIRS[:1], SAFE)
            assert time.monotonic() - begun < 3
        finally:
            gone.set()
            listening.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("text", "ended", "value", "why"),
    [
        ("First.", "stop", 1, ""), ("second\n", "stop", 0, ""),
        ("First", "length", None, "is cut off"),
        ("The first", "stop", None, "says neither First nor Second"),
        ("", "stop", None, "says neither First nor Second"),
        (None, "stop", None, "a reply of another form"),
    ],
)  # fmt: skip
def test_a_verdict_is_read_strictly(text, ended, value, why):
    reply = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": ended}]})
    found, reason = read_verdict(reply.encode())
    assert reason == why and (found == value if value is not None else np.isnan(found))
    for broken in (b"", b"{}", b'{"choices": []}', b'{"choices": [{"message": {}}]}', b"\xff",
                   b"[" * 100_000):  # fmt: skip
        assert read_verdict(broken)[1] == "a reply of another form"


@pytest.mark.parametrize(
    "spec", ["https://host/v1", "https://:1/v1,model=m", "https://me:pw@host/v1,model=m",
             "https://host/v1?key=pw,model=m", "https://host:x/v1,model=m",
             "https://host..org/v1,model=m", f"https://{'h' * 64}.org/v1,model=m",
             "https://host:65536/v1,model=m"],
)  # fmt: skip
def test_an_address_that_is_none_is_one_line_without_its_secrets(spec):
    with pytest.raises(UserError, match=r"https://host/v1,model=name") as said, open_judge(spec, 0):
        pass
    assert "pw" not in str(said.value)


def test_a_key_is_not_sent_openly_or_where_no_header_holds_it(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    with pytest.raises(UserError, match="only sent by https"):
        EndpointJudge("http://example.org/v1", "m")
    monkeypatch.setenv(KEY, f"{SECRET}\n")
    with pytest.raises(UserError, match="no header can hold") as said:
        EndpointJudge("https://example.org/v1", "m")
    assert SECRET not in str(said.value)

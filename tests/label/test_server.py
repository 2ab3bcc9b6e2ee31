"""Who may ask the labelling server, and what it makes of requests that are malformed."""

from __future__ import annotations

import http.client
import json
import random
import re
import socket
import threading
import time

import pytest

from rlhf_jax.label import server as served
from rlhf_jax.label.files import VOTES
from tests.label.canned import Server, open_book, server_on


@pytest.fixture(name="site")
def _site(tmp_path, monkeypatch):
    """(port, secret, folder) of a server that runs."""
    monkeypatch.setattr(served, "_SECONDS", 0.5)
    book = open_book(tmp_path)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = server_on(tmp_path, listener, book)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield listener.getsockname()[1], book.files.token(), tmp_path
        server.should_exit = True
        thread.join()


def ask(site, path="/api/next", body=b'{"labeler": "Ann"}', method="POST", **changes):
    """(status, headers, body) of a request like the page's, but for the changes; None: none."""
    port, token, _ = site
    headers = {
        "Host": f"127.0.0.1:{port}",
        "Origin": f"http://127.0.0.1:{port}",
        "Authorization": f"Bearer {token}",
        "Content-Type": "application/json",
    }
    headers |= {name.replace("_", "-"): value for name, value in changes.items()}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        if value is not None:
            connection.putheader(name, value)
    if "Content_Length" not in changes:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    response = connection.getresponse()
    answer = response.status, dict(response.getheaders()), response.read()
    connection.close()
    return answer


def test_the_page_may_ask_and_nobody_else(site):
    port = site[0]
    assert ask(site)[0] == 200
    assert ask(site, Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0] == 200
    refused = [
        {"Origin": "http://evil.example"},
        {"Origin": f"http://localhost:{port}"},  # another origin than the host it asks
        {"Origin": "null"},
        {"Origin": None},
        {"Host": "evil.example", "Origin": "http://evil.example"},  # DNS rebinding
        {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"},
        {"Host": "127.0.0.1", "Origin": "http://127.0.0.1"},
        {"Authorization": None},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer ü"},
        {"Authorization": site[1]},
    ]
    for changes in refused:
        status, _, body = ask(site, **changes)
        assert status == 403 and json.loads(body)["error"], changes
    # What a form on another site could send, with whatever the browser knows of this one.
    form = {"Origin": "http://evil.example", "Content_Type": "text/plain", "Authorization": None}
    assert ask(site, **form)[0] == 403
    assert ask(site, Content_Type="text/plain")[0] == 415
    assert ask(site, method="OPTIONS", Origin="http://evil.example")[0] == 403  # no preflight
    assert ask(site, "/", b"", "GET", Host="evil.example")[0] == 403
    assert not (site[2] / VOTES).exists()


def test_the_page_has_nobodys_text_and_a_strict_policy(site):
    for path, kind in (("/", "text/html"), ("/label.css", "text/css"), ("/label.js", "text/java")):
        status, headers, body = ask(site, path, b"", "GET", Authorization=None, Origin=None)
        assert status == 200 and headers["content-type"].startswith(kind)
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'") and "unsafe" not in policy
        assert b"Question" not in body and site[1].encode() not in body
        if path == "/":
            assert not re.search(rb"<script(?! src)|<style|style=|\son\w+=", body)
    assert ask(site, "/../../etc/passwd", b"", "GET")[0] == 404
    assert ask(site, "/token", b"", "GET")[0] == 404
    assert ask(site, method="GET")[0] == 405


def test_limits_of_a_request(site):
    long = json.dumps({"labeler": "A" * 20_000}).encode()
    assert ask(site, body=long)[0] == 413
    for name in ("", " ", "A" * 61, "a\nb", "a\x00b", "\ud800", "\u202eAnn", 3, None, ["Ann"]):
        assert ask(site, body=json.dumps({"labeler": name}).encode())[0] == 400, name
    assert ask(site, body=json.dumps({"labeler": "<b>Ångström</b>"}).encode())[0] == 200
    began = time.monotonic()
    assert ask(site, body=b'{"labeler"', Content_Length="100")[0] == 408
    assert time.monotonic() - began < 5
    with socket.create_connection(("127.0.0.1", site[0])) as slow:  # half a line, and nothing more
        slow.sendall(b"GET / HT")
        slow.settimeout(5)
        assert slow.recv(100) == b""


def test_many_idle_connections_keep_nobody_out(site):
    idle = [socket.create_connection(("127.0.0.1", site[0])) for _ in range(300)]
    assert ask(site)[0] == 200
    for connection in idle:
        connection.settimeout(5)
        assert connection.recv(1) == b""  # it hung up
        connection.close()


def mangled(chance: random.Random, good: bytes) -> bytes:
    """A request's body with something wrong about it."""
    kind = chance.randrange(6)
    if kind == 0:  # cut off
        return good[: chance.randrange(len(good))]
    if kind == 1:  # a byte that is another one
        place = chance.randrange(len(good))
        return good[:place] + bytes([chance.randrange(256)]) + good[place + 1 :]
    if kind == 2:
        return chance.randbytes(chance.randrange(200))
    asked = json.loads(good)
    values = [None, True, -1, 1e308, 10**400, [], {}, "", "x" * 500, "\ud800", [[[]]], "../votes"]
    if kind == 3:
        asked[chance.choice([*asked])] = chance.choice(values)
    elif kind == 4:
        del asked[chance.choice([*asked])]
    else:
        return b"[" * chance.choice([1, 2000, 16_000])
    return json.dumps(asked).encode()


def test_a_thousand_malformed_requests_get_4xx_and_store_nothing(site):
    chance, statuses = random.Random(0), {}
    good = json.dumps({"labeler": "Ann", "shown": "nothing", "choice": "1", "seconds": 1}).encode()
    paths = ["/api/answer", "/api/undo", "/api/answer?x=%ff", "/api/", "/api/next/", "/%00", "//x"]
    for number in range(1000):
        body, path, changes = mangled(chance, good), chance.choice(paths[:2]), {}
        if number % 5 == 0:
            path = chance.choice(paths)
        if number % 7 == 0:
            changes = {chance.choice(["Content_Type", "Authorization", "Origin"]): "x"}
        method = "PUT" if number % 11 == 0 else "POST"
        status, _, answer = ask(site, path, body, method, **changes)
        statuses[status] = statuses.get(status, 0) + 1
        assert 400 <= status < 500 and json.loads(answer)["error"], (status, path, body)
    assert statuses[400] > 300 and {403, 404, 405} <= statuses.keys()
    assert not (site[2] / VOTES).exists() and ask(site)[0] == 200


def test_what_is_no_http_is_answered_400(site):
    chance = random.Random(1)
    lines = [b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\r\n" * 9]
    lines += [b"POST /api/next HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n"]
    lines += [b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", chance.randbytes(99)]
    lines += [b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n"]
    for line in lines:
        with socket.create_connection(("127.0.0.1", site[0]), timeout=10) as connection:
            connection.sendall(line)
            connection.shutdown(socket.SHUT_WR)
            said = connection.recv(200)
        assert not said or re.match(rb"HTTP/1.1 4\d\d ", said), (line[:60], said)
    assert ask(site)[0] == 200


def test_a_full_disk_is_said_and_nothing_is_counted(site, monkeypatch):
    shown = json.loads(ask(site)[2])["shown"]["id"]
    body = json.dumps({"labeler": "Ann", "shown": shown, "choice": "1", "seconds": 1}).encode()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("rlhf_jax.label.files.append_whole", full)
        status, _, said = ask(site, "/api/answer", body)
    assert status == 507 and "nothing is stored: " in json.loads(said)["error"]
    status, _, said = ask(site, "/api/answer", body)
    assert status == 200 and json.loads(said)["yours"] == 1


@pytest.mark.slow
def test_at_whatever_moment_it_is_killed_every_vote_is_stored_once(tmp_path):
    chance, sent = random.Random(0), []
    with Server(tmp_path / "labels") as server:
        token = (tmp_path / "labels" / "token").read_text()

        def call(action, **fields):
            """What the server answers, however often it must be asked."""
            body = json.dumps({"labeler": "Ann"} | fields).encode()
            while True:
                try:
                    status, _, said = ask((server.port, token, None), f"/api/{action}", body)
                except (OSError, http.client.HTTPException):
                    time.sleep(0.02)
                    continue
                assert status == 200, said
                return json.loads(said)

        def kill_again_and_again():
            for _ in range(6):
                time.sleep(chance.uniform(0.0, 0.3))
                server.kill()
                server.start()

        killer = threading.Thread(target=kill_again_and_again)
        killer.start()
        said = call("next")
        while said["shown"]:
            choice = chance.choice("120")
            sent.append((said["shown"]["id"], choice))
            said = call("answer", shown=said["shown"]["id"], choice=choice, seconds=1)
            assert not said["note"]
            time.sleep(0.02)
        killer.join()
    votes = server.votes()
    made = ["0" if v.get("tie") else "21"[v["order"] == "chosen_first"] for v in votes]
    names = [v["pair"] + (".again" if v.get("repeat") else "") for v in votes]
    assert [*zip(names, made, strict=True)] == sent and len(sent) == 72

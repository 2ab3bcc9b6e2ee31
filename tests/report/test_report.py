"""report.html: complete, self-contained, well-formed, and safe to open whatever the samples say."""

from __future__ import annotations

import base64
import html
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import pytest

from rlhf_jax.errors import UserError
from rlhf_jax.report.report import describe_environment, write_report
from rlhf_jax.report.run_files import read_run

VOID = {"meta", "link", "br", "img", "hr", "input"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--enable-logging=stderr",
    "--virtual-time-budget=2000",
)  # fmt: skip
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} found")


class Page(HTMLParser):
    """Collects what the tests ask for and checks that every tag is closed in order."""

    def __init__(self, source: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in <{tag}>"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] != "style" else ""

    def attributes(self, name: str) -> list[str]:
        return [a[name] for _, a in self.tags if name in a]


@pytest.fixture
def page(report) -> Page:
    return Page(report.read_text(encoding="utf-8"))


def test_is_well_formed_and_self_contained(page):
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "iframe",
        "object",
        "embed",
        "img",
        "base",
    }
    links = page.attributes("href") + page.attributes("src")
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv"))
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")


def test_has_every_section_and_number(page):
    assert set(page.attributes("id")) >= {
        "changes", "samples", "evaluation", "tokens", "timeline", "training", "lineage", "config",
        "environment",
    }  # fmt: skip
    for expected in (
        "On held-out prompts the gold scorer prefers this model",
        "0.914", "0.689 before", "+0.225 (+0.201 to +0.249)",
        "73.9\u00a0% – 82.0\u00a0%", "Mara Lindqvist is a baker.",
        "By task family", "−0.052", "0c55e2d4f1a8", "loss.beta", "Loss · pretrain",
        "python -m rlhf_jax.main --config=experiments/dpo.py", "Where it got worse",
    ):  # fmt: skip
        assert expected in page.text
    assert "not found" not in page.text


def test_samples_stay_text(page, report):
    attack = json.loads((report.parent / "samples.jsonl").read_text().splitlines()[3])["prompt"]
    assert attack in page.text
    assert "<b>small talk</b>" in page.text
    assert "{{7*7}}" in page.text


def test_token_views(page):
    """Every quantity on one scale over all views; the numbers are readable, the tokens text."""
    spans = [a for tag, a in page.tags if tag == "span" and "title" in a]
    shown = [(a["title"], a.get("style")) for a in spans[:7]]
    orange, blue = "background:rgb(230 159 0 / {})", "background:rgb(0 114 178 / {})"
    assert shown == [
        ("advantage 0.500", orange.format("0.062")),
        ("advantage −1.000", blue.format("0.125")),
        ("advantage –", None),
        ("advantage 0.000", None),
        ("advantage 2.000", orange.format("0.250")),
        ("advantage –", None),
        ("advantage −0.250", blue.format("0.031")),
    ]
    assert (spans[14]["title"], spans[14]["style"]) == (
        "advantage −4.000", blue.format("0.500")
    )  # fmt: skip
    assert {a["title"]: a.get("style") for a in spans[7:14]} == {"kl 0.000": None}
    assert spans[15]["title"] == '<b>"q 1.000'
    words = 'Three pears↵</span><script>x()</script> "cost"]]>\ufffd[0m'
    assert page.text.count(words) == 2
    assert "advantage, full colour ±4.000" in page.text
    assert not any("<" in value for value in page.attributes("style"))


def test_the_timeline(page, report):
    entry = json.loads((report.parent / "evaluation.json").read_text())["timeline"][0]
    assert entry["answers"][1]["text"] in page.text
    assert "user: My name is Ilse." in page.text
    after = page.text[page.text.index("Answers to the same prompts") :]
    places = [after.index(text) for text in ("0.100", "1,200", "0.900", "two\nlines")]
    assert places == sorted(places)
    assert [a.get("open", "shut") for tag, a in page.tags if tag == "details"][:2] == [None, "shut"]


def test_a_token_view_that_does_not_fit_says_so(bare_run):
    view = {"title": "t", "prompt": "p", "tokens": ["a", "b"], "values": {"kl": [1.0]}}
    (bare_run / "evaluation.json").write_text(json.dumps({"token_views": [view]}))
    with pytest.raises(UserError, match=r"token view 't' has 1 numbers of 'kl' for 2 tokens"):
        write_report(bare_run)


def test_every_figure_has_its_data(page):
    figures = sum(tag == "figure" for tag, _ in page.tags)
    files = [a for tag, a in page.tags if tag == "a" and "download" in a]
    assert figures == len(files) == len({a["download"] for a in files}) == 14
    loss = next(a["href"] for a in files if a["download"] == "loss.csv")
    rows = base64.b64decode(loss.partition("base64,")[2]).decode().splitlines()
    assert rows[0] == "series,step,value"
    assert len(rows) == 1 + 60 + 6  # every logged step, every evaluation


def test_is_deterministic_and_replaces_the_old_one(report):
    before = report.read_bytes()
    files = set(os.listdir(report.parent))
    assert write_report(str(report.parent)) == report
    assert report.read_bytes() == before
    assert set(os.listdir(report.parent)) == files


def test_summary_may_be_given_before_it_is_written(bare_run):
    summary = json.loads((bare_run / "summary.json").read_text())
    expected = write_report(bare_run).read_bytes()
    (bare_run / "summary.json").unlink()
    assert write_report(bare_run, summary).read_bytes() == expected


def test_a_config_is_enough(tmp_path):
    (tmp_path / "config.json").write_text('{"stage": "sft", "seed": 3}')
    page = Page(write_report(tmp_path).read_text())
    assert "seed" in page.text
    assert not set(page.attributes("id")) & {
        "changes", "samples", "tokens", "timeline", "evaluation", "training"
    }  # fmt: skip


@pytest.mark.parametrize(
    "low, high, words",
    [(0.45, 0.55, "no difference"), (0.2, 0.4, "it got worse"), (0.6, 0.7, "to 70.0\u00a0%).")],
)
def test_the_verdict_is_as_strong_as_the_interval(bare_run, low, high, words):
    name = "eval/gold_win_rate"
    metrics = {name: (low + high) / 2, f"{name}_low": low, f"{name}_high": high}
    assert words in Page(write_report(bare_run, {"metrics": metrics}).read_text()).text


def test_parents_that_moved_or_vanished(bare_run, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("dpo", "sft", "pretrain"):
        (tmp_path / name).rename(moved / name)
    text = Page(write_report(moved / "dpo").read_text()).text
    assert "Loss · pretrain" in text and "not found" not in text

    shutil.rmtree(moved / "pretrain")
    assert "not found at" in Page(write_report(moved / "dpo").read_text()).text


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("evaluation.json", "[1]", r"evaluation\.json must hold a JSON object, not a list"),
        ("config.json", "{", r"config\.json is not JSON"),
        ("summary.json", '{"metrics": []}', r"summary\.json .*: metrics is of another type"),
        ("summary.json", '{"parents": {"policy": 1}}', r"summary\.json .*: parents is of another"),
    ],
)
def test_a_broken_file_is_named(dpo_run, name, content, message):
    (dpo_run / name).write_text(content)
    with pytest.raises(UserError, match=message):
        write_report(dpo_run)


DAMAGE = {
    "metrics.jsonl": [
        '{"ste',
        "{",
        "[]",
        '{"loss": 1}',
        '{"step": "x"}',
        '{"step": 1, "loss": []}',
    ],
    "samples.jsonl": [
        '{"prompt": "a", "respon',
        "7",
        '{"prompt": "a"}',
        '{"responses": {}}',
        '{"prompt": 7, "responses": {"dpo": "b"}}',
        '{"prompt": [{"role": "user"}], "responses": {"dpo": "b"}}',
        '{"prompt": "a", "responses": {"dpo": null}}',
        '{"prompt": "a", "responses": {"dpo": "b"}, "scores": [1]}',
        '{"prompt": "a", "responses": {"dpo": "b"}, "scores": {"dpo": "high"}}',
    ],
}


@pytest.mark.parametrize("place", [0, 1, -1])
@pytest.mark.parametrize("name, damage", [(n, each) for n, d in DAMAGE.items() for each in d])
def test_a_damaged_line_costs_itself(dpo_run, name, damage, place, caplog):
    path = dpo_run / name
    lines = path.read_text().splitlines(keepends=True)
    whole = repr(read_run(dpo_run))  # one number in it is NaN
    path.write_text("".join([*lines[:place], damage + "\n", *lines[place:]]))
    assert repr(read_run(dpo_run)) == whole
    number = {0: 1, 1: 2, -1: len(lines)}[place]
    said = f"damaged lines are left out: 1 of {len(lines) + 1}, the first is line {number}"
    assert caplog.messages == [f"{path}: {said}"]


def test_a_sample_may_hold_any_character(dpo_run, caplog):
    path = dpo_run / "samples.jsonl"
    text = "a\x85b\u2028c\x0bd"
    sample = {"prompt": text, "responses": {"x": text}}
    path.write_text(json.dumps(sample, ensure_ascii=False) + "\n")
    assert read_run(dpo_run).samples == [sample] and not caplog.messages


def test_no_run_directory(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        write_report(tmp_path)


def test_environment_names_versions_and_devices():
    values = describe_environment()
    assert values["jax"] and values["python"] and " × " in values["devices"]
    assert all(isinstance(v, str) for v in values.values())


def test_import_is_light():
    modules = ", ".join(f"rlhf_jax.report.{name}" for name in ("report", "plots", "tables"))
    code = f"import sys, {modules}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    loaded = set(result.stdout.split())
    assert "rlhf_jax.report.report" in loaded
    assert not loaded & {"matplotlib", "jinja2", "rich", "jax"}


def browse(path: Path, profile: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Opens a page in a headless browser; its console messages are on standard error."""
    command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", *arguments, path.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)


@pytest.fixture
def listener():
    """A web server on this machine: (its address, the paths it was asked for)."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


@needs_browser
def test_in_a_real_browser(dpo_run, tmp_path, listener):
    address, asked = listener
    attack = (
        f'"><img src="{address}/a"><link rel="stylesheet" href="{address}/b"><script>x()</script>'
    )
    with open(dpo_run / "samples.jsonl") as file:
        rest = file.read()
    sample = {"prompt": attack, "responses": {"sft": attack, "dpo": attack}}
    (dpo_run / "samples.jsonl").write_text(json.dumps(sample) + "\n" + rest)
    report = write_report(dpo_run)

    shown = browse(report, tmp_path / "profile", "--dump-dom")
    assert "<title>dpo · rlhf_jax report</title>" in shown.stdout
    assert shown.stdout.count("<figure>") == 14
    assert html.escape(attack, quote=False) in shown.stdout
    assert "<script" not in shown.stdout and "<img" not in shown.stdout
    assert "CONSOLE" not in shown.stderr
    assert asked == []

    image = tmp_path / "report.png"
    window = f"--screenshot={image}"
    browse(report, tmp_path / "profile", window, "--window-size=1200,3000")
    pixels = matplotlib.image.imread(image)[..., :3]
    assert pixels.shape == (3000, 1200, 3)
    rows_with_ink = (pixels.min(axis=(1, 2)) < 0.5).mean()
    assert rows_with_ink > 0.3  # text and figures all the way down


@needs_browser
def test_the_policy_would_stop_what_got_through(report, tmp_path, listener):
    """Were a text not escaped, the browser would still refuse to run or load anything."""
    address, asked = listener
    source = report.read_text(encoding="utf-8")
    hostile = f'<script>document.title="owned"</script><img src="{address}/a.png">'
    page = tmp_path / "hostile.html"
    page.write_text(source.replace("<main>", f"<main>{hostile}"), encoding="utf-8")
    shown = browse(page, tmp_path / "profile", "--dump-dom")
    assert len(re.findall("CONSOLE.*Content Security Policy", shown.stderr)) >= 2
    assert "<title>dpo" in shown.stdout
    assert asked == []

    page.write_text(f'<img src="{address}/reached.png">', encoding="utf-8")
    browse(page, tmp_path / "profile", "--dump-dom")
    assert asked == ["/reached.png"]

"""The page in a real Chromium: by keyboard, on a phone, by two at once, over a killed server."""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess

import jax
import pytest

from rlhf_jax.label.files import SETTINGS, VOTES, LabelFiles
from rlhf_jax.stages.reward import with_score_head
from rlhf_jax.tasks.sources import read_records
from rlhf_jax.training.saved_model import load_model, save_model
from tests.label.browser import Browser
from tests.label.canned import MARKUP, ROOT, Server, open_book
from tests.label.test_book import READING
from tests.report.test_report import needs_browser
from tests.test_export import saved

pytestmark = needs_browser


@pytest.fixture(name="browser")
def _browser(tmp_path):
    with Browser(tmp_path / "profile") as browser:
        yield browser


def begin(browser, server, name, **size):
    """A page on which a labeler has given his name, by keyboard alone."""
    tab = browser.open(server.url, **size)
    tab.wait("document.activeElement.id === 'name'")
    tab.type(name)
    tab.press("Enter")
    tab.wait("now && now.shown && !busy", 120)
    return tab


def press(tab, key, seconds=60.0):
    """Presses a key for the pair that is shown; returns once another one is, which takes (ms)."""
    tab.wait("now && now.shown && !busy", seconds)
    tab.value(
        "window.took = 0; window.pressed = 0; addEventListener('keydown', () => "
        "{ window.pressed = performance.now() }, { once: true, capture: true }); "
        "new MutationObserver((_, o) => { o.disconnect(); requestAnimationFrame(() => "
        "{ window.took = performance.now() - window.pressed }) })"
        ".observe(document.querySelector('#prompt'), { childList: true })"
    )
    tab.press(key)
    tab.wait("window.took", seconds)
    return tab.value("window.took")


def report(capsys, took):
    with capsys.disabled():
        print(
            f"\nfrom the key to the next pair, {len(took)} votes: median "
            f"{statistics.median(took):.0f} ms, worst {max(took):.0f} ms"
        )


def test_thirty_votes_by_keyboard_over_a_killed_server(browser, tmp_path, capsys):
    with Server(tmp_path / "labels") as server:
        tab = begin(browser, server, "Ann")
        took = [press(tab, key) for key in "12012012012012"]
        assert len(server.votes()) == 14
        server.kill()
        tab.wait("now.shown && !busy")
        tab.press("1")  # the server is gone: the page keeps it
        tab.wait("document.querySelector('#note').textContent.includes('is kept and sent again')")
        server.start()
        tab.wait("now.yours === 15 && !busy")
        took += [press(tab, key) for key in "210210210210210"]
        tab.wait("now.yours === 30")
    votes = server.votes()
    assert len(votes) == 30 == len({(v["pair"], v.get("repeat", False)) for v in votes})
    assert [v["number"] for v in votes] == [*range(30)]
    keys = ["12012012012012", "1", "210210210210210"]
    made = ["0" if v.get("tie") else "21"[v["order"] == "chosen_first"] for v in votes]
    assert "".join(made) == "".join(keys)
    assert all(v["labeler"] == "Ann" and 0 <= v["seconds"] < 60 for v in votes)
    pairs = read_records(READING, str(server.folder / VOTES), "preference", "train")
    assert [p.chosen for p in pairs] == [v["chosen"] for v in votes if not v.get("tie")]
    report(capsys, took)


def test_undo_skip_reload_and_markup_that_stays_text(browser, tmp_path):
    name = "<img src=x onerror=alert(1)>"
    with Server(tmp_path / "labels") as server:
        tab = begin(browser, server, name, width=390, height=844)
        assert tab.value("document.querySelector('#rename').textContent") == name
        page = "document.querySelector('#vote').innerText"
        assert MARKUP in tab.value(page) and tab.value("document.images.length") == 0
        first = tab.value("now.shown.id")
        press(tab, "1")
        press(tab, "s")
        third = tab.value("now.shown.id")
        assert tab.value("[now.yours, now.skipped].join()") == "1,1"
        tab.press("u")
        tab.wait("now.skipped === 0 && !busy")
        tab.press("u")
        tab.wait("now.yours === 0 && !busy")
        assert server.votes() == [] and tab.value("now.shown.id") == first
        assert tab.value("document.querySelector('#undo').disabled") is True
        tab.call("Page.reload")
        tab.wait("window.now === undefined && now && now.shown")
        assert tab.value("now.shown.id") == first  # the same person goes on
        tab.value("document.querySelector('[data-choice=\"2\"]').click()")  # a finger
        tab.wait("now.yours === 1 && !busy")
        assert tab.value("now.shown.id") != third
        assert tab.value("document.documentElement.scrollWidth <= innerWidth")
        assert tab.value("document.title") == "Which answer is better? · rlhf_jax"
        (vote,) = server.votes()
        assert vote["labeler"] == name and vote["pair"] == first
    said = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert not [event for event in browser.events if event["method"] in said]


@pytest.mark.slow
def test_two_labelers_at_once(browser, tmp_path):
    with Server(tmp_path / "labels") as server:
        tabs = [begin(browser, server, name) for name in ("Ann", "Ben")]
        for key in "1201202101":
            for tab in tabs:
                press(tab, key)
        for tab in tabs:
            tab.wait("now.yours === 10 && now.done >= 16")
    votes = server.votes()
    for name in ("Ann", "Ben"):
        assert [v["number"] for v in votes if v["labeler"] == name] == [*range(10)]
    firsts = [v["pair"] for v in votes if not v.get("repeat")]
    assert len(set(firsts)) == len(firsts)  # each pair to one of the two


@pytest.mark.slow
def test_without_its_secret_or_from_another_site_the_page_shows_and_takes_nothing(
    browser, tmp_path
):
    with Server(tmp_path / "labels") as server:
        address, _, token = server.url.partition("#")
        tab = browser.open(address)
        tab.wait("document.activeElement.id === 'name'")
        tab.type("Mallory")
        tab.press("Enter")
        tab.wait("document.querySelector('#message').textContent.includes('lacks its secret')")
        assert tab.value("document.querySelector('#vote').hidden") is True
        pair = open_book(server.folder).showing("Ann")["shown"]["id"]
        vote = json.dumps({"labeler": "Ann", "shown": pair, "choice": "1", "seconds": 1})
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        elsewhere = browser.open("about:blank")
        for options in ({"headers": headers}, {"mode": "no-cors"}):
            options = json.dumps({"method": "POST", "body": vote} | options)
            said = elsewhere.value(
                f"fetch('{address}api/answer', {options})"
                ".then(answer => answer.type, error => error.name)"
            )
            assert said == "TypeError", options  # not even that there was an answer
        assert not (server.folder / VOTES).exists()


@pytest.mark.slow
def test_the_command_samples_ahead_and_goes_on_after_kill_9(browser, tmp_path, capsys):
    """The whole of it: a model, its answers, thirty votes, a kill −9, the stages' reader."""
    run, *_ = saved(tmp_path, "tiny", max_length=256)
    prompts = [json.dumps({"prompt": f"What is {i} + {i + 1}?"}) for i in range(50)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    command = [
        "rlhf_jax.label", f"--workdir={run}", f"--prompts={tmp_path}/prompts.jsonl",
        f"--out={tmp_path}/labels", "--pairs=60", "--max-new-tokens=24",
    ]  # fmt: skip
    with Server(tmp_path / "labels", *command) as server:
        tab = begin(browser, server, "Ann")
        took = [press(tab, key) for key in "120120120120120"]
        server.kill()
        server.start()
        took += [press(tab, key) for key in "210210210210210"]
        tab.wait("now.yours === 30")
        assert (tmp_path / "labels" / "lock").exists()
        other = subprocess.run(
            [*server.command, "--port=0"], cwd=ROOT, capture_output=True, text=True
        )
        assert other.returncode == 2 and "is held by pid" in other.stderr
    report(capsys, took)
    votes = server.votes()
    assert len(votes) == 30
    settings = json.loads((tmp_path / "labels" / SETTINGS).read_text())
    files = LabelFiles(tmp_path / "labels", settings)
    sampled = {each.pair: each for each in files.comparisons()}
    for vote in votes:
        assert {vote["chosen"], vote["rejected"]} == {*sampled[vote["pair"]].answers}
    assert len({each.candidate for each in sampled.values()}) == len(sampled)


@pytest.mark.slow
def test_two_models_are_compared_blindly_where_reward_models_disagree(browser, tmp_path):
    run, *_ = saved(tmp_path, "tiny", max_length=256)
    model = load_model(run)
    other = dataclasses.replace(model, params=jax.tree.map(lambda x: 1.2 * x, model.params))
    made = {"other": other} | {f"reward{i}": with_score_head(model, i) for i in range(2)}
    for name, each in made.items():
        (tmp_path / name).mkdir()
        save_model(tmp_path / name, each)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Who?"}\n{"prompt": "When?"}\n')
    command = [
        "rlhf_jax.label", f"--workdir={run}", f"--compare={tmp_path}/other", "--pairs=20",
        f"--prompts={tmp_path}/prompts.jsonl", f"--out={tmp_path}/labels", "--max-new-tokens=12",
        "--select=disagreement", f"--rewards={tmp_path}/reward0,{tmp_path}/reward1",
    ]  # fmt: skip
    with Server(tmp_path / "labels", *command) as server:
        tab = begin(browser, server, "Ann")
        for key in "120120120120":
            assert str(tmp_path) not in tab.value("JSON.stringify(now)")
            press(tab, key)
    votes = server.votes()
    assert {frozenset(vote["models"].values()) for vote in votes} == {
        frozenset({str(run), f"{tmp_path}/other"})
    }
    assert all(v["select"] == "disagreement" and v["disagreement"] > 0 for v in votes)
    first = [v["models"]["chosen" if v["order"] == "chosen_first" else "rejected"] for v in votes]
    assert len({*first}) == 2  # sides are by lot

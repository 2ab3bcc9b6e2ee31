"""Users' reward functions: what they are given, and that nothing they do hangs or harms a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from rlhf_jax.child import ChildFault
from rlhf_jax.data.records import Message, Prompt
from rlhf_jax.errors import Preempted, UserError
from rlhf_jax.rewards.scorers import TextScorers
from rlhf_jax.rewards.worker import Worker
from rlhf_jax.stopping import listening
from tests.processes import is_gone

PROMPTS = [
    Prompt("first", (Message("system", "Be kind."), Message("user", "Hi?")), {"answer": "2"}),
    Prompt("second", (Message("user", "Hé\u2028!"),), {"answer": "3", "topic": "x", "ids": "no"}),
]
RESPONSES = ["a b", "c\n\ud800"]

REWARDS = """
import os, sys, threading, time

def lengths(prompts, responses):
    return [len(response) for response in responses]

def booleans(prompts, responses, **columns):
    return (True, False)

def columns(prompts, responses, **columns):
    assert prompts[0] == [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi?"}
    ]
    assert prompts[1][0]["content"] == "Hé\\u2028!"
    assert responses == ["a b", "c\\n\\ud800"]
    assert columns == {"answer": ["2", "3"], "ids": ["first", "second"]}, columns
    return [1, 2]

def one_column(prompts, responses, answer):
    return [float(x) for x in answer]

def arrays(prompts, responses):
    import numpy
    return numpy.array([1.5, 2.5], numpy.float32)

def scalars(prompts, responses):
    import numpy
    return [numpy.float32(1.5), numpy.array(2.5)]

def prints(prompts, responses):
    print('{"values": [7, 7], "wrong": {}}', flush=True)
    os.write(1, b'{"values": [8, 8], "wrong": {}}\\n')
    os.system("echo hello")
    assert sys.stdin.read() == ""
    print("x" * 3_000_000)
    return [1, 2]

def pids(prompts, responses):
    return [os.getpid(), 0]

def raises(prompts, responses):
    raise ValueError("two\\nlines")  # here 1

def helper_raises(prompts, responses):
    return [int(response) for response in responses]  # here 2

def recursion(prompts, responses):
    return recursion(prompts, responses)  # here 3

def exits(prompts, responses):
    sys.exit(3)

def hard_exit(prompts, responses):
    print("going down")
    os._exit(3)

def crashes(prompts, responses):
    os.kill(os.getpid(), 11)

def dies_and_leaves_a_child(prompts, responses):
    if os.fork() == 0:
        time.sleep(60)
    os._exit(4)

def hangs(prompts, responses):
    if responses[0] == "a b":
        print("thinking")
        open(os.environ["CHILD"], "w").write(str(os.fork() or os.getpid()))
        while True:
            pass
    return [1, 2]

def nan(prompts, responses):
    return [1, float("nan")]

def infinite(prompts, responses):
    return [1, -float("inf")]

def huge(prompts, responses):
    return [1, 10**400]

def beyond_float32(prompts, responses):
    return [1, 1e300]

def none(prompts, responses):
    return [1, None]

def text(prompts, responses):
    return [1, "0.5"]

def nested(prompts, responses):
    return [1, [2.0]]

def short(prompts, responses):
    return [1]

def long(prompts, responses):
    return [0.5] * 1_000_000

def nothing(prompts, responses):
    pass

def string(prompts, responses):
    return "12"

def dictionary(prompts, responses):
    return {0: 1, 1: 2}

def generator(prompts, responses):
    return (i for i in range(2))

def needs_more(prompts, responses, rating):
    return [1, 2]

constant = 3
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rewards") / "my_rewards.py"
    path.write_text(REWARDS)
    return path


def run(scorers):
    return scorers.score(PROMPTS, RESPONSES, lengths=[2, 2])


@pytest.mark.parametrize(
    ("function", "values"),
    [
        ("lengths", [3, 3]),
        ("booleans", [1, 0]),
        ("columns", [1, 2]),
        ("one_column", [2, 3]),
        ("arrays", [1.5, 2.5]),
        ("scalars", [1.5, 2.5]),
        ("prints", [1, 2]),
    ],
)
def test_values(file, function, values):
    name = f"{file}:{function}"
    with TextScorers({name: 2}) as scorers:
        found = run(scorers)
    assert found.components[name].tolist() == values
    assert found.total.tolist() == [2 * value for value in values]


FAULTS = [
    ("raises", "raised", "raised ValueError: two lines \\(.*my_rewards.py, {1}\\)"),
    ("helper_raises", "raised", "ValueError: invalid literal .*{2}"),
    ("recursion", "raised", "RecursionError.*{3}"),
    ("exits", "raised", "raised SystemExit: 3"),
    ("needs_more", "raised", "missing 1 required positional argument: 'rating'"),
    ("hard_exit", "died", "exit status 3; it last printed: going down"),
    ("crashes", "died", "signal 11"),
    ("dies_and_leaves_a_child", "died", "exit status 4"),
    ("short", "wrong length", "returned 1 scores for 2 responses"),
    ("long", "wrong length", "returned 1000000 scores"),
    ("nothing", "no list", "returned NoneType None"),
    ("string", "no list", "returned str '12'"),
    ("dictionary", "no list", "returned dict"),
    ("generator", "no list", "returned generator"),
    ("nan", "not finite", "score nan"),
    ("infinite", "not finite", "score -inf"),
    ("huge", "not finite", "score inf"),
    ("beyond_float32", "too large", r"1e\+300"),
    ("none", "not a number", "got NoneType None"),
    ("text", "not a number", "got str '0.5'"),
    ("nested", "not a number", "got list"),
]
SINGLE = ("not finite", "too large", "not a number")


@pytest.mark.parametrize(("function", "reason", "says"), FAULTS)
def test_a_fault_fails_naming_the_prompt_or_is_masked(file, function, reason, says):
    name = f"{file}:{function}"
    where = "prompt 'second'" if reason in SINGLE else "prompt 'first' and 'second'"
    for number, line in enumerate(REWARDS.splitlines(), start=1):
        if "# here" in line:
            says = says.replace(f"{{{line[-1]}}}", f"line {number}")
    begun = time.monotonic()
    with TextScorers({name: 1}) as scorers:
        for _ in range(2):  # the second time, after what the first left behind
            with pytest.raises(UserError, match=f"reward '{name}', {where}: .*{says}") as error:
                run(scorers)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1200
    with TextScorers({name: 1, "length": 1}, on_error="mask") as scorers:
        found = run(scorers)
    bad = [1] if reason in SINGLE else [0, 1]
    assert np.flatnonzero(~found.valid).tolist() == bad
    assert np.flatnonzero(np.isnan(found.total)).tolist() == bad
    assert np.flatnonzero(np.isnan(found.components[name])).tolist() == bad
    assert found.components["length"].tolist() == [2, 2]
    assert found.failures == {f"{name}: {reason}": len(bad)}
    assert time.monotonic() - begun < 120


@pytest.mark.parametrize("on_error", ["fail", "mask"])
def test_one_that_hangs_is_killed_and_the_next_batch_starts_anew(
    file, tmp_path, monkeypatch, on_error
):
    monkeypatch.setenv("CHILD", str(tmp_path / "pid"))
    name = f"{file}:hangs"
    with TextScorers({name: 1}, timeout_seconds=1, on_error=on_error) as scorers:
        pid = scorers._workers[name].pid
        begun = time.monotonic()
        if on_error == "fail":
            with pytest.raises(UserError, match="took longer than 1 s; it last printed: thinking"):
                run(scorers)
        else:
            assert run(scorers).failures == {f"{name}: timed out": 2}
        assert 1 <= time.monotonic() - begun < 60
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        assert is_gone(int((tmp_path / "pid").read_text()))
        again = scorers.score(PROMPTS, ["c", "d"], lengths=[1, 1])
        assert again.total.tolist() == [1, 2]
        assert scorers._workers[name].pid != pid


def test_a_process_serves_all_batches_and_ends_with_the_scorers(file):
    name = f"{file}:pids"
    with TextScorers({name: 1}) as scorers:
        pids = {int(run(scorers).total[0]) for _ in range(3)}
        assert pids == {scorers._workers[name].pid}
    with pytest.raises(ProcessLookupError):
        os.kill(pids.pop(), 0)


def test_a_batch_larger_than_the_pipes(file):
    with TextScorers({f"{file}:lengths": 1}) as scorers:
        found = scorers.score(PROMPTS, ["x" * 5_000_000, ""], lengths=[1, 1])
    assert found.total.tolist() == [5_000_000, 0]


def test_a_worker_dies_with_its_parent_even_while_it_hangs(file, tmp_path):
    script = f"""
import sys
from rlhf_jax.rewards.worker import Worker
worker = Worker({f"{file}:hangs"!r})
print(worker.pid, flush=True)
worker.call({{"prompts": [], "responses": ["a b"], "columns": {{}}}}, 60)
"""
    child = tmp_path / "pid"
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env=os.environ | {"CHILD": str(child)},
    )
    with parent:
        pid = int(parent.stdout.readline())
        while not (child.exists() and child.read_text()):
            assert parent.poll() is None
            time.sleep(0.05)
        parent.send_signal(signal.SIGKILL)
    assert is_gone(pid)
    assert is_gone(int(child.read_text()))


@pytest.mark.parametrize("text", ["import time; time.sleep(600)", REWARDS])
def test_a_stop_ends_a_file_that_loads_or_a_function_that_runs_for_ever(
    tmp_path, monkeypatch, text
):
    monkeypatch.setenv("CHILD", str(tmp_path / "pid"))
    file = tmp_path / "mine.py"
    file.write_text(text)
    began = time.monotonic()
    with pytest.raises(Preempted, match="SIGTERM received"), listening():
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        worker = Worker(f"{file}:hangs")
        pid = worker.pid
        try:
            worker.call({"prompts": [], "responses": ["a b"], "columns": {}}, 60)
        finally:
            assert is_gone(pid)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("text", "function", "says"),
    [
        (None, "f", "there is no file"),
        ("x = 1", "f", "has no function 'f'"),
        ("f = 1", "f", "has no function 'f'"),
        ("def f(:", "f", "raised SyntaxError"),
        ("\nimport no_such_module", "f", "ModuleNotFoundError: No module.*line 2"),
        ("import sys; sys.exit(0)", "f", "raised SystemExit"),
        ("import os; os._exit(5)", "f", "exit status 5"),
    ],
)
def test_what_cannot_be_loaded_fails_at_once(tmp_path, text, function, says):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    for on_error in ("fail", "mask"):
        with pytest.raises(UserError, match=f"mine.py:{function}' can't be loaded: .*{says}"):
            TextScorers({f"{path}:{function}": 1}, on_error=on_error)


def test_relative_paths_and_modules_beside_the_file(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("VALUE = 5\n")
    (tmp_path / "mine.py").write_text(
        "from beside import VALUE\n\ndef f(prompts, responses):\n    return [VALUE, VALUE]\n"
    )
    monkeypatch.chdir(tmp_path)
    with TextScorers({"mine.py:f": 1}) as scorers:
        assert run(scorers).total.tolist() == [5, 5]


def test_a_file_that_is_gone_at_the_restart_is_a_fault_of_that_batch(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import os\n\ndef f(prompts, responses):\n    os._exit(1)\n")
    worker = Worker(f"{path}:f")
    request = {"prompts": [], "responses": [], "columns": {}}
    with pytest.raises(ChildFault, match="exit status 1"):
        worker.call(request, 10)
    assert worker.pid is None
    path.unlink()
    with pytest.raises(ChildFault, match="no file") as error:
        worker.call(request, 10)
    assert error.value.reason == "not loaded"
    assert worker.pid is None


def test_an_interrupted_call_leaves_no_reply_for_the_next(file, monkeypatch):
    worker = Worker(f"{file}:lengths")
    request = {"prompts": [], "responses": ["abc"], "columns": {}}

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("selectors.DefaultSelector.select", interrupt)
        with pytest.raises(KeyboardInterrupt):
            worker.call(request, 10)
    assert worker.pid is None
    assert worker.call(request, 10) == ([3.0], {})
    worker.close()


def test_the_worker_imports_nothing_heavy():
    script = "import rlhf_jax.rewards.worker, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    tops = {name.partition(".")[0] for name in loaded.stdout.split()}
    assert "rlhf_jax" in tops
    assert tops.isdisjoint({"jax", "numpy", "tensorflow", "grain", "absl", "ml_collections"})

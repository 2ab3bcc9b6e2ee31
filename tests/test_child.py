"""Functions in processes of their own: what rewards and templates don't show of `Child`."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlhf_jax.child import Child, ChildFault
from tests.processes import is_gone

CODE = """

from rlhf_jax.child import ChildFault

def make(factor):
    def multiply(number):
        print("thinking about", number)
        if number < 0:
            raise ChildFault("negative", f"{number} is too small")
        if number == 13:
            return object()
        return factor * bytes(number) and factor * number
    return multiply
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(CODE)
    return str(path)


def test_faults_have_a_reason_and_the_class_and_leave_the_process(file):
    child = Child(file, "make", {"factor": 3}, 60, blame=file)
    assert child.pid is None and child.call({"number": 2}, 60) == 6
    pid = child.pid
    for number, reason, error, says in (
        (-1, "negative", "", "-1 is too small"),
        ("x", "raised", "TypeError", r"raised TypeError: .* \(.*mine.py, line 8\)"),
        (13, "raised", "TypeError", "not JSON serializable"),
    ):
        with pytest.raises(ChildFault, match=says) as fault:
            child.call({"number": number}, 60)
        assert (fault.value.reason, fault.value.error) == (reason, error)
    assert child.call({"number": 5}, 60) == 15 and child.pid == pid
    child.close()
    assert child.pid is None and is_gone(pid)


def test_memory_is_limited(file):
    child = Child(file, "make", {"factor": 3}, 60, memory=1 << 29)
    with pytest.raises(ChildFault) as fault:
        child.call({"number": 1 << 30}, 60)
    assert fault.value.error == "MemoryError" and child.call({"number": 1}, 60) == 3


def test_an_isolated_child_sees_no_environment(tmp_path, monkeypatch):
    (tmp_path / "beside.py").write_text("value = 7")
    path = tmp_path / "mine.py"
    path.write_text("import beside\n\ndef make():\n    return lambda: beside.value\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert Child(str(path), "make", {}, 60).call({}, 60) == 7
    with pytest.raises(ChildFault, match="No module named 'beside'"):
        Child(str(path), "make", {}, 60, isolated=True).start()


@pytest.mark.parametrize("isolated", [False, True])
def test_sets_of_texts_have_one_order_in_every_process(tmp_path, isolated):
    path = tmp_path / "mine.py"
    path.write_text("def make():\n    return lambda: [*{f'word {i}' for i in range(50)}]\n")
    orders = []
    for _ in range(2):
        child = Child(str(path), "make", {}, 60, isolated=isolated)
        orders.append(child.call({}, 60))
        child.close()
    assert orders[0] == orders[1]


def test_threads_wait_for_each_other(file):
    child = Child(file, "make", {"factor": 3}, 60)
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda number: child.call({"number": number}, 60), range(100, 200))
        assert list(answers) == [3 * number for number in range(100, 200)]


def test_a_child_that_nobody_holds_is_ended(file):
    child = Child(file, "make", {"factor": 3}, 60)
    child.start()
    pid = child.pid
    del child
    gc.collect()
    with pytest.raises(ProcessLookupError):  # nor is it a zombie
        os.kill(pid, 0)


def test_the_process_of_a_template_dies_with_its_parent_while_it_renders():
    code = """
from rlhf_jax.hub.template import Template
loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
template = Template("{% if messages %}" + loop + "{% endif %}", {})
template.render([])
print(template._child.pid, flush=True)
template.render([{}])
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        time.sleep(0.5)
        parent.send_signal(signal.SIGKILL)
    assert is_gone(pid)

"""Digests of code: what they cover, and what they don't depend on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_jax import digests
from rlhf_jax.digests import code_digest, code_of, file_digest

PREFERENCE = "rlhf_jax.stages.preference"


def test_code_is_what_a_stage_imports():
    sft, preference, policy = (
        set(code_of(f"rlhf_jax.stages.{name}")) for name in ("sft", "preference", "policy")
    )
    assert {"stages/sft.py", "losses/cross_entropy.py", "models/transformer.py"} <= sft
    assert "tasks/town/families/manners.py" in sft  # by a package's __init__.py
    assert "losses/preference.py" in preference - sft
    assert "losses/policy.py" in policy - sft
    # These run in processes of their own.
    assert {"rewards/worker.py", "rewards/regex.py", "data/template_worker.py"} <= policy


def test_files_can_be_left_out_with_what_only_they_import():
    whole = code_of("rlhf_jax.oracle.stage")
    assert {"report/report.py", "report/plots.py"} <= set(whole)
    part = code_of("rlhf_jax.oracle.stage", without=["report/report.py"])
    assert not {"report/report.py", "report/page.py"} & set(part)


@pytest.fixture
def copy(tmp_path):
    """A copy of the package and a function from a module to its digest there."""
    shutil.copytree(digests.ROOT, tmp_path / "rlhf_jax")

    def digest():
        code = f"from rlhf_jax.digests import code_digest; print(code_digest({PREFERENCE!r}))"
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout

    return tmp_path / "rlhf_jax", digest


def test_comments_docstrings_and_formatting_do_not_count_and_code_does(copy):
    package, digest = copy
    before = digest()
    assert before.strip() == code_digest(PREFERENCE)
    path = package / "losses" / "preference.py"
    text = path.read_text()
    path.write_text(
        "# what follows\n" + text.replace('"""', '"""About ', 1).replace("\n\n", "\n\n\n")
    )
    assert digest() == before
    path.write_text(text.replace("beta *", "-beta *", 1))
    assert text != path.read_text() and digest() != before
    path.write_text(text)
    other = package / "losses" / "advantages.py"  # which DPO does not use
    other.write_text(other.read_text().replace("1.0", "2.0"))
    assert (digest() == before) == ("losses/advantages.py" not in code_of(PREFERENCE))


def test_the_words_of_the_town_are_code(copy):
    package, digest = copy
    words = package / "tasks" / "town" / "phrasings" / "manners.toml"
    names = code_of("rlhf_jax.tasks.builders")
    assert {f"tasks/town/phrasings/{path.name}" for path in words.parent.glob("*.toml")} <= {*names}
    assert "hub/templates/chatml.jinja" in code_of("rlhf_jax.hub.chat_formats")
    before = digest()
    words.write_text(words.read_text().replace("of course!", "certainly!", 1))
    assert digest() != before


def test_a_digest_is_the_same_in_every_version_of_python(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "ROOT", tmp_path)
    (tmp_path / "sample.py").write_text(
        "from __future__ import annotations\n\n\n@cache\ndef f(x: int, *y, z=None, **k) -> str:\n"
        "    match x:\n        case {'a': [1, *_]} if y:\n"
        "            return f'{x!r:>{z}} and {y[0]:.3f}' 'more'\n"
        "    with a as b, c:\n        return lambda q=1.5: (q, b'\\\\x00', ..., 1j, True)\n"
    )
    assert digests._read(tmp_path / "sample.py")[0] == "90132373ec20"


def test_a_file_is_read_again_when_it_changed(tmp_path):
    path: Path = tmp_path / "data.jsonl"
    path.write_text("one")
    first = file_digest(path)
    assert first == "7692c3ad3540"  # sha256 of "one"
    path.write_text("two")
    assert file_digest(path) == "3fc4ccfe7458"
    path.write_text("one")
    assert file_digest(path) == first

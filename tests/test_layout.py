"""What README says of the packages holds."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(path):
    """The packages of rlhf_jax that a file names in its imports."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if match := re.match(r"rlhf_jax\.(\w+)", name):
                yield match[1]


def test_a_file_imports_only_from_floors_below_its_own():
    listed = re.findall(r"^    rlhf_jax/(\w+)/ ", (ROOT / "README.md").read_text("utf-8"), re.M)
    packages = {path.parent.name for path in (ROOT / "rlhf_jax").glob("*/__init__.py")}
    assert set(listed) == packages
    for i, floor in enumerate(listed):
        for path in (ROOT / "rlhf_jax" / floor).rglob("*.py"):
            above = set(imported(path)) & set(listed[:i])
            assert not above, f"{path} imports from {above}"


def test_the_repository_holds_text_and_small_pictures():
    """Seven wheels that pip had left in the root were once committed with it."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no checkout of git")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip(f"git: {listed.stderr.decode()}")
    files = [ROOT / name.decode() for name in listed.stdout.split(b"\0")[:-1]]
    assert len(files) > 500
    for path in filter(Path.exists, files):
        assert path.suffix in (".png", ".svg") or b"\0" not in path.read_bytes(), path
        assert path.stat().st_size < 500_000, path

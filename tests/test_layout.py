"""What README says of the packages holds."""

import ast
import re
from pathlib import Path

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

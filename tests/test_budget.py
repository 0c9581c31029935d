"""Each package holds its budget of statements, tests/budget.yaml. A ceiling is raised by a commit of its own that says
who needs it, what they can't do without it, and what pays for it."""

import ast
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
BUDGET = yaml.safe_load((ROOT / "tests/budget.yaml").read_text(encoding="utf-8"))


def statements(path: Path) -> int:
    """Return the number of statements of a Python file; docstrings and other bare constants do not count."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.stmt)]
    return sum(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in nodes)


@pytest.mark.parametrize(("folder", "ceiling"), BUDGET.items())
def test_a_package_holds_its_budget(folder, ceiling):
    count = sum(map(statements, (ROOT / folder).rglob("*.py")))
    assert count <= ceiling, f"{folder} has {count} statements, {ceiling} are its budget"


def test_every_package_has_a_budget():
    packages = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("lorabench/*/__init__.py")}
    assert packages <= set(BUDGET)

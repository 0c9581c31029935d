"""The hash of the rules: of everything that turns tables into verdicts.

It covers the code of `lorabench.analysis`, `lorabench.claims` and `lorabench.runs`, with all criteria, the number of
draws of an error, and the margins and predictions of a preset. Two verdicts with the same hash were reached by the same
rules. Comments, docstrings and the layout of the code do not count, and neither does the version of Python.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

from lorabench.analysis.estimate import N_DRAWS
from lorabench.config.margins import DEFAULT_MARGINS, DEFAULT_PREDICTIONS, Margins, Predictions
from lorabench.utils.files import digest

_PARTS = ("analysis/*.py", "claims/*.py", "runs.py")


def rules_sha256(margins: Margins | None = None, predictions: Predictions | None = None) -> str:
    """Return the SHA-256, in hexadecimal, of the code that judges, the margins and the predictions.

    Without margins or predictions, DEFAULT_MARGINS or DEFAULT_PREDICTIONS hold, as in `judge_claims`.
    """
    stated = (margins or DEFAULT_MARGINS).model_dump(), (predictions or DEFAULT_PREDICTIONS).model_dump()
    return digest([_code(), N_DRAWS, *stated], 64)


@cache
def _code() -> dict[str, str]:
    """Return the hash of each module that judges, by its path in the project."""
    root = Path(__file__).parents[1]
    files = sorted(path for part in _PARTS for path in root.glob(part))
    return {path.relative_to(root).as_posix(): digest(syntax(path.read_text(encoding="utf-8")), 64) for path in files}


def syntax(code: str) -> str:
    """Return what code says, without comments, docstrings and layout, in a form that no version of Python changes."""
    return _text(ast.parse(code))


def _text(node: Any) -> str:
    if isinstance(node, list):
        return f"[{','.join(_text(part) for part in node if not _is_docstring(part))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    # Empty fields are left out, since versions of Python differ in those that they have.
    fields = [f"{name}={_text(value)}" for name, value in ast.iter_fields(node) if value is not None and value != []]
    return f"{type(node).__name__}({','.join(fields)})"


def _is_docstring(node: Any) -> bool:
    """Return whether a statement is a text alone, as docstrings are, also those of attributes."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)

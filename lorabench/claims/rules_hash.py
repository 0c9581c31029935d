"""The hash of the rules: of everything that turns tables into verdicts.

It covers the code of `lorabench.analysis`, `lorabench.claims` and `lorabench.runs`, the texts of their claims, the
number of draws of an error, and the margins and predictions of a preset; where it has predictions, which studies are
about, the packages of studies, too, but for their figures and scripts. Comments, docstrings, the layout of code and
texts, and the version of Python do not count. A mend that turns no verdict counts as the code before it
(lorabench/report/mends.yaml), so that batches of seeds that were frozen before it stay valid.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path
from typing import Any

from lorabench.analysis.estimate import N_DRAWS
from lorabench.config.margins import DEFAULT_MARGINS, Margins, Predictions, default_predictions
from lorabench.utils.files import digest
from lorabench.utils.studies import studies
from lorabench.utils.yaml_files import read_yaml

_PARTS = ("analysis/*.py", "claims/*.py", "claims/*.yaml", "runs.py")


def rules_sha256(margins: Margins | None = None, predictions: Predictions | None = None) -> str:
    """Return the SHA-256, in hexadecimal, of the code that judges, the margins and the predictions, or the default ones
    as in `judge_claims`."""
    predicted = default_predictions() if predictions is None else predictions
    return digest(
        [
            {name: hashed for name, hashed in _code().items() if predicted or not name.startswith("studies/")},
            N_DRAWS,
            (margins or DEFAULT_MARGINS).model_dump(),
            predicted,
        ],
        64,
    )


@cache
def _code() -> dict[str, str]:
    """Return the hash of each module that judges and of each file of texts, by its path in the project."""
    root = Path(__file__).parents[1]
    files = {path.relative_to(root).as_posix(): path for part in _PARTS for path in root.glob(part)}
    for study in studies():
        own = [path for path in study.folder.glob("*.py") if path.name != "figures.py"]
        files |= {f"studies/{study.name}/{path.name}": path for path in [*own, study.folder / "claims.yaml"]}
    before = {mend["now"]: mend["before"] for mend in read_yaml(root / "report/mends.yaml")}
    return {
        name: before.get(
            hashed := digest(read_yaml(path) if path.suffix == ".yaml" else syntax(path.read_text("utf-8")), 64), hashed
        )
        for name, path in sorted(files.items())
    }


def syntax(code: str) -> str:
    """Return what code says, without comments, docstrings and layout, in a form that no version of Python changes."""
    return _text(ast.parse(code))


def _text(node: Any) -> str:
    # A statement that is a text alone is a docstring, also one of an attribute.
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return ""
    if isinstance(node, list):
        return f"[{','.join(filter(None, map(_text, node)))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    # Empty fields are left out, since versions of Python differ in those that they have.
    fields = [f"{name}={_text(value)}" for name, value in ast.iter_fields(node) if value is not None and value != []]
    return f"{type(node).__name__}({','.join(fields)})"

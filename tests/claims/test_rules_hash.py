"""The hash of the rules changes with whatever can change a verdict, and with nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lorabench.claims import rules_hash
from lorabench.claims.rules_hash import rules_sha256, syntax
from lorabench.config.margins import DEFAULT_MARGINS

CODE = '''
"""What the module holds."""

LIMIT = 0.05
"""What the limit is."""

def judge(claim, level=LIMIT):
    """Return a verdict."""
    # The comment of a line.
    return f"{claim:.3f} is above {level}" if claim > level else None
'''


def test_comments_docstrings_and_layout_do_not_count():
    other = re.sub(r"#.*", "# Another comment.", CODE).replace("What the", "Which").replace("Return a", "Give the")
    other = other.replace("(claim, level=LIMIT)", "(\n    claim,\n    level=LIMIT,\n)")
    assert other != CODE
    assert syntax(other) == syntax(CODE)


@pytest.mark.parametrize(
    ("before", "after"),
    [("0.05", "0.06"), ("claim > level", "claim >= level"), (" is above ", " exceeds "), ("None", '""')],
)
def test_numbers_operators_and_texts_that_are_shown_count(before, after):
    assert syntax(CODE.replace(before, after)) != syntax(CODE)


def test_margins_predictions_and_every_module_count(monkeypatch):
    rules = rules_sha256()
    assert re.fullmatch("[0-9a-f]{64}", rules)
    assert rules == rules_sha256(DEFAULT_MARGINS)
    assert rules_sha256(DEFAULT_MARGINS.model_copy(update={"loss": 0.03})) != rules
    assert rules_sha256(predictions={}) != rules
    modules = rules_hash._code()
    package = Path(rules_hash.__file__).parents[1]
    for part in ("analysis", "claims"):
        names = {path.name for path in (package / part).glob("*.py")}
        assert names == {name.partition("/")[2] for name in modules if name.startswith(part)}
    for name in ("analysis/rules.py", "claims/judge.py", "studies/lr_ratio/theories.py", "studies/variants/claims.py"):
        assert name in modules
        monkeypatch.setattr(rules_hash, "_code", lambda name=name: modules | {name: "0" * 64})
        assert rules_sha256() != rules

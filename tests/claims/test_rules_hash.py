"""The hash of the rules changes with whatever can change a verdict, and with nothing else."""

import re
from pathlib import Path

from lorabench.claims import rules_hash
from lorabench.claims.rules_hash import rules_sha256, syntax
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.utils.files import digest
from lorabench.utils.yaml_files import read_yaml

CODE = '"""Why."""\nLIMIT = 0.05\ndef judge(claim):\n    "Judge."\n    return claim > LIMIT and "above" # Why.\n'


def test_comments_docstrings_and_layout_do_not_count_and_the_rest_does():
    same = CODE.replace("Why.", "Because.").replace("Judge.", "Decide.").replace("(claim)", "(\n    claim,\n)")
    assert same != CODE
    assert syntax(same) == syntax(CODE)
    for before, after in (("0.05", "0.06"), ("claim >", "claim >="), ('"above"', '"over"'), (" and ", " or ")):
        assert syntax(CODE.replace(before, after)) != syntax(CODE)


def test_margins_predictions_and_every_module_count(monkeypatch):
    rules = rules_sha256()
    assert re.fullmatch("[0-9a-f]{64}", rules)
    assert rules == rules_sha256(DEFAULT_MARGINS)
    assert rules_sha256(DEFAULT_MARGINS.model_copy(update={"loss": 0.03})) != rules
    assert (suite := rules_sha256(predictions={})) != rules
    modules = rules_hash._code()
    package = Path(rules_hash.__file__).parents[1]
    for part in ("analysis", "claims"):
        names = {path.name for path in (package / part).iterdir() if path.suffix in (".py", ".yaml")}
        assert names == {name.partition("/")[2] for name in modules if name.startswith(part)}
    for name in ("analysis/rules.py", "claims/judge.py", "claims/shared.yaml", "studies/variants/claims.yaml"):
        assert name in modules
        monkeypatch.setattr(rules_hash, "_code", lambda name=name: modules | {name: "0" * 64})
        assert rules_sha256() != rules
        # Studies are about predictions, and do not judge a preset that has none.
        assert (rules_sha256(predictions={}) == suite) == name.startswith("studies")


def test_a_mend_counts_as_what_it_mended_until_the_file_changes_again():
    mends = read_yaml(Path(rules_hash.__file__).parents[1] / "report/mends.yaml")
    root, known = Path(rules_hash.__file__).parents[1], rules_hash._code()
    for mend in mends:
        now = digest(syntax((root / mend["file"]).read_text(encoding="utf-8")), 64)
        # An entry whose file has another hash serves nothing, and goes.
        assert (now, known[mend["file"]]) == (mend["now"], mend["before"])

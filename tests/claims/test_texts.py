"""The texts of claims, which stand in YAML files beside the modules of their judges."""

from pathlib import Path
from types import ModuleType

import pytest

from lorabench.claims import claim, texts
from lorabench.claims.judge import CLAIMS
from lorabench.utils.studies import studies

GOOD = """
shared:
  band: within {BAND[0]:g} to {BAND[1]:.2f}
claims:
  Z1:
    statement: It lies {band}, {rewards.LEAD:g} and {MIN_SEEDS}
    criterion: "{lr_grids}"
    needs: nothing
    experiments: [rank]
"""


def claims_of(text: str, folder: Path, monkeypatch, *judged: str):
    """Return the claims of a module with one constant and judges of some claims, whose file of texts is given."""
    module = ModuleType("mine")
    module.__file__, module.BAND = str(folder / "mine.py"), (0.5, 2)
    (folder / "mine.yaml").write_text(text)
    fields = {"judge": print, "over": None, "columns": (), "conditions": ()}
    monkeypatch.setitem(claim.JUDGES, "mine", dict.fromkeys(judged, fields))
    return texts.claims_of(module)


def test_names_stand_for_constants_and_shared_texts(tmp_path, monkeypatch):
    [own] = claims_of(GOOD, tmp_path, monkeypatch, "Z1")
    assert own.statement == "It lies within 0.5 to 2.00, 0.15 and 3"
    assert own.criterion == "each with an LR grid whose best LR is not at its edge"
    assert (own.judge, own.experiments, own.kind) == (print, ("rank",), "empirical")


@pytest.mark.parametrize(
    ("before", "after", "judged", "error"),
    [
        ("BAND[0]", "BNAD[0]", ["Z1"], "band: KeyError.'BNAD'"),
        ("statement", "sentence", ["Z1"], "Z1: TypeError.*sentence"),
        ("", "", [], "not with both .*: Z1"),
        ("", "", ["Z1", "Z2"], "not with both .*: Z2"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_the_claim(before, after, judged, error, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=error):
        claims_of(GOOD.replace(before, after), tmp_path, monkeypatch, *judged)


def test_every_file_of_texts_and_every_declared_claim_is_in_the_catalogue():
    declared = [own for judges in claim.JUDGES.values() for own in judges]
    assert sorted(declared) == sorted(own.id for own in CLAIMS)
    folder = Path(texts.__file__).parent
    files = {f"lorabench.claims.{path.stem}" for path in folder.glob("*.yaml") if path.stem != "shared"}
    assert claim.JUDGES.keys() == files | {f"{study.package}.claims" for study in studies()}
    assert all(own.statement and own.criterion and own.needs and own.paper_value for own in CLAIMS)

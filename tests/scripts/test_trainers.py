"""The defaults of trainers that the page states are those that the audit's readers know."""

from lora_advice.audit.files import READERS

from lorabench.utils.formats import DASH
from lorabench.utils.yaml_files import read_yaml
from pages import trainers_part

from ..conftest import REPOSITORY

HEAD = ["trainer", "version", "LR", "rank r", "alpha", "alpha/r", "LR as at alpha 32", "option for alpha/sqrt(r)"]


def test_defaults_are_those_of_the_readers_and_every_reader_has_a_row():
    rows = [line.strip("| ").split(" | ") for line in trainers_part(REPOSITORY).splitlines()]
    assert rows[0] == HEAD
    row = {cells[0]: dict(zip(HEAD[2:], cells[2:], strict=True)) for cells in rows[2:]}
    # LLaMA-Factory's alpha is twice the rank, and 5e-5 (16 (1 + 1.2 / 8) / 32) ** 0.75 is 3.3e-5.
    assert list(row["LLaMA-Factory"].values())[:5] == ["5e-05", "8", "16", "2", "3.3e-05"]
    assert row["PEFT with transformers"]["alpha/r"] == "1"
    # What is not said has no factor, and what only turns LoRA on here is no default.
    assert list(row["Axolotl"].values())[:5] == ["required"] * 3 + [DASH] * 2
    assert row["verl, RL"]["rank r"] == "0 (no LoRA)"
    assert [row[name]["option for alpha/sqrt(r)"] for name in ("Axolotl", "torchtune")] == ["`peft_use_rslora`", "none"]
    asked = {entry["reader"] for entry in read_yaml(REPOSITORY / "workflow/scripts/trainers.yaml")}
    assert READERS.keys() <= asked | {"peft"}

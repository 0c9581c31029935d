"""The facts that lora-advice ships are those of the published evidence and of the suite's constants."""

import runpy
import shutil

from ..conftest import REPOSITORY

FACTS = "advice/lora_advice/facts"


def test_the_committed_facts_are_what_is_written(tmp_path):
    """`python workflow/scripts/facts.py .` writes them."""
    shutil.copytree(REPOSITORY / FACTS, tmp_path / FACTS)
    (tmp_path / "paper_figures").symlink_to(REPOSITORY / "paper_figures")
    runpy.run_path(str(REPOSITORY / "workflow/scripts/facts.py"))["write_facts"](tmp_path)
    written, committed = (
        {path.name: path.read_text() for path in (root / FACTS).iterdir()} for root in (tmp_path, REPOSITORY)
    )
    assert written == committed

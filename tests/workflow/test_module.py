"""A workflow in another folder uses this one as a module, as config/README.md says."""

from __future__ import annotations

import re

import pytest

from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout

from ..conftest import REPOSITORY
from .checkout import snakemake

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    """A folder with the Snakefile of config/README.md and a configuration of its own."""
    [snakefile] = re.findall(r"```python\n(.*?)```", (REPOSITORY / "config/README.md").read_text(), re.DOTALL)
    (tmp_path / "Snakefile").write_text(snakefile.replace("path/to/lorabench", str(REPOSITORY)))
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text("preset: smoke\n")
    return tmp_path


def test_its_rules_write_into_the_folder(folder):
    planned = snakemake(folder, "--dry-run", "--quiet", "rules")
    assert re.search(rf"^train +{len(make_plan(Layout.of('smoke').preset).jobs)}$", planned, re.MULTILINE)
    snakemake(folder, "results/smoke/plan.parquet")
    assert (folder / "results/smoke/plan.parquet").is_file()


def test_a_prefix_is_refused_in_one_sentence(folder):
    snakefile = folder / "Snakefile"
    snakefile.write_text(snakefile.read_text().replace("config: config", 'config: config\n    prefix: "other"'))
    output = snakemake(folder, "--dry-run", fails=True)
    assert "module prefix: 'other/results/smoke/report/index.html' is expected" in output
    assert "Traceback" not in output

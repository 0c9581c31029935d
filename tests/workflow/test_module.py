"""A workflow in another folder uses this one as a module, as config/README.md says."""

from __future__ import annotations

import re

import pytest

from ..conftest import REPOSITORY
from .checkout import snakemake

pytestmark = pytest.mark.slow


def test_its_rules_write_into_the_folder_and_a_prefix_is_refused(tmp_path):
    [snakefile] = re.findall(r"```python\n(.*?)```", (REPOSITORY / "config/README.md").read_text(), re.DOTALL)
    snakefile = snakefile.replace("path/to/lorabench", str(REPOSITORY))
    (tmp_path / "Snakefile").write_text(snakefile)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text("preset: smoke\n")
    snakemake(tmp_path, "results/smoke/plan.parquet")
    assert (tmp_path / "results/smoke/plan.parquet").is_file()
    (tmp_path / "Snakefile").write_text(snakefile.replace("config: config", 'config: config\n    prefix: "other"'))
    output = snakemake(tmp_path, "--dry-run", fails=True)
    assert "module prefix: 'other/results/smoke/report/index.html' is expected" in output
    assert "Traceback" not in output

"""A workflow in another folder uses this one as a module, as config/README.md says."""

from __future__ import annotations

import re
import sys

import pytest

from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout

from ..conftest import REPOSITORY
from .checkout import fresh_clone, git, shell, snakemake

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


@pytest.mark.long
def test_what_snakedeploy_writes_runs(tmp_path, monkeypatch):
    """It installs snakedeploy. Git takes a clone for the repository on GitHub, so that no other address is needed."""
    clone = fresh_clone(tmp_path / "clone")
    git(clone, "tag", "v0.2.0")
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.file://{clone}.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/owner/lorabench")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shell(f"{sys.executable} -m venv environment && environment/bin/pip install -q snakedeploy", tmp_path)
    command = "deploy-workflow https://github.com/owner/lorabench deployed --tag v0.2.0"
    shell(f"environment/bin/snakedeploy {command}", tmp_path)
    deployed = tmp_path / "deployed"
    assert (
        'github("owner/lorabench", path="workflow/Snakefile", tag="v0.2.0")'
        in (deployed / "workflow/Snakefile").read_text()
    )
    assert (deployed / "config/config.yaml").read_text() == (REPOSITORY / "config/config.yaml").read_text()
    planned = snakemake(deployed, "--config", "preset=smoke", "--dry-run", "--quiet", "rules")
    assert re.search(r"^report_page +1$", planned, re.MULTILINE)
    snakemake(deployed, "results/smoke/plan.parquet", "--config", "preset=smoke")
    assert (deployed / "results/smoke/plan.parquet").is_file()

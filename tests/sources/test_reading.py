"""A source's tidy tables are read with what its file says of them, and what is not explained is refused.

A source with one evaluation set goes through the commands from its table to verdicts and figures.
"""

import runpy
import shutil

import pytest
from typer.testing import CliRunner

from lorabench.cli.commands import app
from lorabench.errors import UserError
from lorabench.sources.source import import_source
from lorabench.store.io import read_table
from lorabench.utils.files import REFERENCE

from .conftest import COLUMNS, ROWS, row


def test_what_the_file_says_stands_next_to_what_the_runs_say_themselves(source):
    curves = "run_id,step,split,metric,value\nfullft-1e-05-0,0,validation,nll,3.5\nnobody,0,validation,nll,1\n"
    kinds = ["bf16"] * 3 + ["fp32"] * 3
    rows = [f"{line},{kind}" for line, kind in zip(ROWS, kinds, strict=True)]
    _, tables = import_source(source(rows, f"{COLUMNS},precision", curves=curves))
    assert tables.runs["precision"].tolist() == kinds
    assert tables.runs["rank"].isna().tolist() == [True] * 3 + [False] * 3
    columns = ["base_params", "alpha_convention", "schedule"]
    assert (tables.runs[columns] == [1_000_000_000, "alpha 32", "constant"]).all(axis=None)
    # The curve of a run that the runs table lacks is left out.
    assert tables.curves[["run_id", "step", "value"]].values.tolist() == [["fullft-1e-05-0", 0, 3.5]]


def test_what_is_not_explained_is_refused_in_a_sentence(source):
    for changes, message in [
        ({"rows": [*ROWS, ROWS[0].replace("fullft-", "again-", 1)]}, "has several runs with model m.* seed 0; give"),
        ({"sha256": {"runs.csv": "00"}}, "runs.csv has changed: its SHA-256 is .* says 00"),
        ({"sha256": {"curves.csv": "00"}}, "curves.csv: there is no such file"),
        ({"header": COLUMNS.replace("run_id", "name")}, "has no column 'run_id'; it has name, model, dataset"),
        ({"header": COLUMNS.replace("steps", "gap")}, "no columns of the tidy table `runs`: 'gap'"),
        ({"models": {"n": {"scale": "1B", "parameters": 1}}}, "model 'm' is not described under `models`"),
        ({"rows": [line.replace("done", "success") for line in ROWS]}, "status = 'success'; allowed: done, diverged"),
        ({"wall": 3}, "wall = 3: Extra inputs are not permitted"),
        (
            {"attributes": {"schedule": "constant", "alpha": 32, "base_kind": "chat"}, "about": 1, "sha256": ...},
            r"about = 1: .*; attributes\.precision = .*: Field required; attributes\.alpha = 32: .*; "
            r"attributes\.base_kind = 'chat': Input should be 'base', .*; sha256 = .*: Field required",
        ),
    ]:
        with pytest.raises(UserError, match=message) as refused:
            import_source(source(**changes))
        assert len(str(refused.value).splitlines()) == 1


def test_the_shipped_tables_are_what_the_scripts_write(tmp_path):
    for script in sorted(REFERENCE.glob("*/convert.py")):
        folder = shutil.copytree(script.parent, tmp_path / script.parent.name)
        tables = [folder / name for name in import_source(folder)[0].sha256]
        written = [table for table in tables if (folder / f"raw_{table.name}").exists()]
        for table in written:
            table.unlink()
        runpy.run_path(str(folder / script.name))
        import_source(folder)
        assert written


SEEDS = [
    row(method, lr, 2.0 + 0.1 * abs(place - 2) + 0.001 * seed, seed)
    for method, lrs in (("fullft", (1e-6, 3e-6, 1e-5, 3e-5, 1e-4)), ("lora", (1e-5, 3e-5, 1e-4, 3e-4, 1e-3)))
    for place, lr in enumerate(lrs)
    for seed in range(3)
]


def command(*words):
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, (result.stderr, result.exception)
    return result.stdout


@pytest.mark.slow
def test_it_is_judged_and_drawn(source, tmp_path):
    folder, tables = source(SEEDS, COLUMNS.replace("final_test_nll", "final_train_nll")), tmp_path / "tables"
    command("import", folder, "--out", tables)
    command("claims", "--tables", tables, "--out", tmp_path / "verdicts")
    claim = read_table(tmp_path / "verdicts", "claims").set_index("claim_id").loc["B2"]
    # Nothing is written for what the source lacks.
    assert not {"final_valid_nll", "experiments", "wall_s"} & set(read_table(tables, "runs"))
    assert claim["verdict"] != "not tested"
    assert "one evaluation set: the LR was picked on the loss that is reported" in claim["reason"]
    said = command("figure", "all", "--tables", tables, "--out", tmp_path / "figures")
    assert "figure fig1_envelopes is not drawn: no validation curves beyond step 0" in said
    assert (tmp_path / "figures/fig2_lr_by_rank.svg").is_file()
    command("claims", "--tables", tables, "--out", tmp_path / "again", "--noise", tables)


# Texts that were no source, and once ended with a traceback or a sentence of megabytes.
NO_SOURCE = {
    "": "Input should be a valid dictionary",
    "a: [": "not valid YAML: while parsing",
    "about: !!python/object:os.system {}": "the tag .* can't be used here",
}


@pytest.mark.parametrize("text", NO_SOURCE)
def test_what_is_no_source_is_refused_in_a_short_sentence(source, text):
    folder = source()
    (folder / "source.yaml").write_text(text)
    with pytest.raises(UserError, match=NO_SOURCE[text]) as refused:
        import_source(folder)
    assert str(refused.value).startswith(f"{folder / 'source.yaml'}")
    assert len(str(refused.value)) < 5000
    assert "\n" not in str(refused.value)

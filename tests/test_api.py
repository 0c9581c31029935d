"""The functions for other programs, their examples, and the page that explains them."""

import doctest
import inspect
import math
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from lorabench import api
from lorabench.analysis.comparison import comparisons
from lorabench.analysis.loss_fit import Noise
from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.errors import UserError
from lorabench.store.io import write_frame
from lorabench.store.tables import Tables
from lorabench.utils.files import REFERENCE

from .conftest import REPOSITORY
from .handmade import curves_of, make_sweep, runs_table

PAGE = REPOSITORY / "docs/tables.md"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A working folder with the published tables and without results, which recommended learning rates rest on too."""
    (tmp_path / "paper_figures").symlink_to(REPOSITORY / "paper_figures")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_examples_hold_and_the_pages_table_has_all_functions_and_arguments(elsewhere):
    assert doctest.testfile(str(PAGE), module_relative=False).failed == 0
    section = PAGE.read_text().partition("\n## From Python\n")[2]
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", section, re.M)
    stated = {name: re.findall(r"`(\w+)`", arguments) for name, arguments in rows}
    functions = [name for name in api.__all__ if inspect.isfunction(getattr(api, name))]
    assert stated == {name: list(inspect.signature(getattr(api, name)).parameters) for name in functions}


def test_importing_it_imports_no_large_package():
    code = "import sys, lorabench.api; print({'torch', 'pandas', 'numpy', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_frames_folders_and_the_command_are_judged_alike(tmp_path):
    runs = runs_table([row for rank in (None, 1, 16) for row in make_sweep(rank)])
    curves = curves_of(runs)
    write_frame(runs, "runs", tmp_path)
    write_frame(curves, "curves", tmp_path)
    chosen = [claim for claim in CLAIMS if claim.id in ("B1", "B2")]
    whole = judge_claims(Tables.read(tmp_path), chosen).set_index("claim_id")
    # Plain columns, as a user's frame has them, and an index that is not in order.
    plain, columns = runs.astype({"seed": float, "rank": float})[::-1], ["verdict", "estimate", "ci_low", "margin_high"]
    for tables in ({"runs": plain, "curves": curves}, tmp_path):
        judged = api.judge(tables, claims=["B2", "B1"]).set_index("claim_id")
        pd.testing.assert_frame_equal(judged[columns], whole[columns])
    assert whole.loc["B1", "verdict"] != "not tested"
    # A source has a row for each claim and model.
    judged = api.judge(REFERENCE / "apertus", claims=["B2"])
    assert (len(judged), set(judged["source"])) == (2, {"apertus"})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: api.judge(REFERENCE / "orbit", claims=["Z9"]), "claim 'Z9': allowed: A1, .*"),
        (lambda: api.judge({"run": pd.DataFrame()}), "table 'run' is not known; allowed: data frames of runs, .*"),
        (lambda: api.judge({"runs": pd.DataFrame({"lr": ["x"]})}), "runs: column lr has 'x', which is not a number"),
        (lambda: api.judge(REFERENCE / "orbit", noise=Noise(0.1, 2, "mine")), "noise: .* states the noise .*"),
    ],
)
def test_wrong_inputs_are_refused_in_one_sentence(elsewhere, call, message):
    with pytest.raises(UserError) as raised:
        call()
    assert re.fullmatch(message, str(raised.value))


LRS = (4.64e-5, 1e-4, 2.15e-4, 4.64e-4, 1e-3)


def sweep(best: float, seeds: int = 3) -> pd.DataFrame:
    """A sweep whose loss is 2 at the best LR, and whose noise sums to 0 over seeds and LRs, nearly."""
    noise = (0.003, -0.001, -0.002, 0.001)
    rows = [
        (lr, seed, 2 + 0.1 * math.log(lr / best) ** 2 + noise[(place + 2 * seed) % 4])
        for place, lr in enumerate(LRS)
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows, columns=["lr", "seed", "loss"])


def test_the_fit_of_a_sweep_is_that_of_the_engine():
    runs = sweep(2.3e-4)
    table = runs_table([row for row in make_sweep(16, lrs=[*LRS]) if row["seed"] == 0])
    table = pd.concat([table.assign(seed=seed) for seed in range(3)]).sort_values(["lr", "seed"], ignore_index=True)
    table = table.assign(run_id=[f"r{n}" for n in range(15)], final_test_nll=runs["loss"], final_valid_nll=runs["loss"])
    [comparison] = comparisons(table, pd.DataFrame())
    fit = api.fit_lr(runs)
    assert fit.lr == pytest.approx(math.exp(comparison.fit.optima["LoRA r16"].value), rel=1e-9)
    assert fit.loss == pytest.approx(comparison.fit.minima["LoRA r16"].value, abs=1e-9)
    assert (fit.lr, fit.loss) == (pytest.approx(2.3e-4, rel=0.05), pytest.approx(2.0, abs=0.005))
    assert fit.lr_low < 2.3e-4 < fit.lr_high


def test_a_sweep_that_does_not_bound_its_optimum_names_the_next_learning_rate_and_noise_may_be_lent():
    at_the_edge = api.fit_lr(sweep(2e-3))
    assert (at_the_edge.inside, at_the_edge.problems) == (False, ("best LR at the edge of its grid",))
    assert at_the_edge.next_lr == pytest.approx(2.15e-3, rel=0.01)
    # A run that diverged bounds the optimum from above.
    diverged = pd.concat([sweep(8e-4), pd.DataFrame({"lr": 2.15e-3, "seed": 0, "loss": [math.inf]})])
    assert "best LR at the edge of its grid" not in api.fit_lr(diverged).problems
    once = sweep(2e-4, seeds=1).drop(columns="seed")
    assert api.fit_lr(once).problems == ("1 paired seeds, 3 needed",)
    lent = api.fit_lr(once, Noise(0.001, 2, "elsewhere"))
    assert (lent.lr_low < lent.lr < lent.lr_high, lent.problems) == (True, ())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": "high"}, "row 0: lr = 'high'; allowed: numbers above 0"),
        ({"loss": "low"}, "row 0: loss = 'low'; allowed: numbers, and null or infinity of a run that diverged"),
        ({"seed": 1}, "row 1: lr = 4.64e-05; allowed: each once with a seed, .*"),
    ],
)
def test_a_wrong_value_of_a_sweep_is_named(changed, message):
    runs = sweep(2e-4).astype(object)
    runs.loc[0, list(changed)] = list(changed.values())
    with pytest.raises(UserError, match=message):
        api.fit_lr(runs)
    with pytest.raises(UserError, match="the runs have no column loss; they have lr"):
        api.fit_lr(runs[["lr"]])

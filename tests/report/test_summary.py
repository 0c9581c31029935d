"""The tables of the report: their numbers are those of the fits and of the engine, and they name data left out."""

from __future__ import annotations

import json
import math

import pandas as pd
import pytest

from lorabench.analysis.comparison import Judging, comparisons
from lorabench.analysis.rewards import with_error_rates
from lorabench.claims.judge import CLAIMS, judge_claims
from lorabench.config.margins import DEFAULT_MARGINS
from lorabench.data.files import file_chats
from lorabench.data.sft import build_dataset
from lorabench.report.other_margins import UNTESTED, turned, verdicts_by_margin
from lorabench.report.summary import dataset_origins, experiment
from lorabench.store.layout import Layout
from lorabench.store.schemas import VERDICTS_BY_MARGIN
from lorabench.store.tables import Tables
from lorabench.utils.files import write_json

from ..handmade import claims_table, make_claim, rl
from ..handmade.sft import arm, tables
from ..hub.repositories import copies, tulu3_row, write_tulu3
from .conftest import at_twice_the_margins


def described(arms):
    runs, curves = tables(arms)
    return experiment("rank", runs.assign(experiments=[["rank"]] * len(runs)), Judging())["arms"], runs, curves


def test_the_optimum_of_a_row_is_that_of_the_fit():
    rows, runs, curves = described([arm(optimum=3e-4), arm(8, optimum=3e-3, floor=2.1)])
    [comparison] = comparisons(runs, curves)
    for row, label in zip(rows, ("FullFT", "LoRA r8"), strict=True):
        minimum, optimum = comparison.fit.minima[label], comparison.fit.optima[label]
        assert row["lr"] == pytest.approx(math.exp(optimum.value))
        assert [row["best"], row["best_low"], row["best_high"]] == pytest.approx([minimum.value, *minimum.interval()])
        assert row["resolved"]
    assert row["ratio_resolved"]
    assert row["ratio"] == pytest.approx(math.exp(comparison.fit.log_ratio("LoRA r8", "FullFT").value))


def test_results_of_rl_are_accuracies():
    [_, row], runs, curves = described([rl.arm(None, optimum=1e-4), rl.arm(16, optimum=1e-3)])
    [comparison] = comparisons(with_error_rates(runs), curves)
    assert row["best"] == pytest.approx(1 - comparison.fit.minima["LoRA r16"].value)
    assert row["best_low"] < row["best"] < row["best_high"]


def test_bad_rows_of_files_and_of_the_hub_are_shown_with_their_reasons(raw_preset, write_preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": f"Say {n}", "completion": str(n)}) for n in range(12)]
    lines[3:3] = ["not JSON", '{"prompt": "no answer"}', "{"]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    # One row repeats a prompt, and another has an answer that is too long.
    rows = [tulu3_row(number) for number in range(30)] + [tulu3_row(0), tulu3_row(40, answer="long " * 400)]
    write_tulu3(tmp_path / "copies", rows)
    sizes = {"max_chars": 1500, "mean_tokens": 50}
    sizes |= {"train": 8, "validation": 2, "test": 2}
    raw_preset["datasets"] = {
        "rows": {"kind": "file", "path": "rows.jsonl", **sizes},
        "tulu": {"kind": "hub", "id": "allenai/tulu-3-sft-mixture", **sizes},
    }
    raw_preset["experiments"]["rank"][0]["datasets"] = ["rows"]
    layout = Layout.of(write_preset(raw_preset))
    write_json(file_chats(layout.preset.datasets["rows"])[1].plain(), layout.tally("rows"))
    build_dataset(layout.preset.datasets["tulu"], layout.dataset("tulu"), copies(tmp_path / "copies"))
    file, hub = dataset_origins(layout)
    bad = ["2 not JSON (first: row 4)", "1 no text (first: row 5)"]
    assert file == {"name": "rows", "source": "file, prompt/completion", "rows": 15, "usable": 12, "left_out": bad}
    assert (hub["name"], hub["rows"], hub["usable"]) == ("tulu", 32, 30)
    assert hub["left_out"] == ["1 too long", "1 with the prompt of another"]


ARMS = {None: {"optimum": 4e-4}, **{rank: {"optimum": 3.3e-3, "floor": 2.02} for rank in (4, 64)}}
"""LoRA ends 0.02 nats above full fine-tuning, where the margin is 0.058, and its optimal LR is 8.25 times as high."""


def test_a_claim_turns_where_its_margin_passes_the_difference():
    # LRs so near to each other leave little doubt about the shape of the loss.
    factors = [1.1 * 1.8**step for step in range(-2, 3)]
    given = Tables(
        *tables(
            arm(rank, lrs=[factor * settings["optimum"] for factor in factors], **settings)
            for rank, settings in ARMS.items()
        )
    )
    chosen = [claim for claim in CLAIMS if claim.id in ("A7", "B1", "F1")]
    judged = judge_claims(given, chosen, DEFAULT_MARGINS)
    found = verdicts_by_margin(given, judged, DEFAULT_MARGINS)
    assert list(found.columns) == VERDICTS_BY_MARGIN.names
    verdicts = found.pivot(index="claim_id", columns="factor", values="verdict")
    assert list(verdicts.columns) == [0.25, 0.5, 1, 2, 4]
    own = judged.set_index("claim_id")["verdict"]
    assert verdicts[1.0].to_dict() == own[~own.isin(UNTESTED)].to_dict()
    assert verdicts.loc["A7"].tolist() == ["contradicted", *["confirmed"] * 4]
    margins = found[found["claim_id"] == "A7"]["margin_high"].tolist()
    assert margins == pytest.approx([0.058 * factor for factor in (0.25, 0.5, 1, 2, 4)], rel=0.01)
    # 8.25 is 10 within a factor of 1.27, and not within 1.13.
    assert verdicts.loc["B1"].tolist() == ["contradicted", *["confirmed"] * 4]
    # A margin of a whole accuracy could not be stated.
    wide = DEFAULT_MARGINS.model_copy(update={"reward": 0.3})
    assert 4 not in set(verdicts_by_margin(given, judged[:1], wide)["factor"])


def test_verdicts_of_an_earlier_table_are_not_shown():
    judged = claims_table([make_claim("A7"), make_claim("B1")])
    by_margin = at_twice_the_margins(judged)
    assert turned(by_margin, judged)["stay"] == ["A7", "B1"]
    assert turned(by_margin, judged.assign(verdict="inconclusive")) is None
    assert turned(pd.DataFrame(), judged) is None

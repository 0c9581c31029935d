"""Known optimal LRs are read from sources, and leaving one out gives the errors that follow by hand."""

import math

import pytest

from lorabench.sources.lr_optima import known_optima, measured_optima
from lorabench.sources.source import read_sources
from lorabench.store.tables import Tables

from ..handmade import make_sweep, runs_table
from .conftest import row


def test_the_optimum_of_a_grid(source):
    attributes = {"precision": "fp32 weights", "schedule": "constant", "alpha": "16", "base_kind": "base"}
    models = {"m": {"scale": "1B", "parameters": 10**9, "hidden_size": 2048}}
    [own] = read_sources([source(models=models, attributes=attributes)])
    fullft, lora = (optimum for optimum in known_optima([own]) if optimum.source == "made-up")
    # Losses 2.1, 2.0, 2.2 an octave apart: the parabola's lowest point is 1/6 of an octave below the middle.
    lowest = 2 ** (-1 / 6)
    assert [fullft.lr, lora.lr] == pytest.approx([2e-5 * lowest, 2e-4 * lowest], rel=1e-3)
    assert fullft.error == pytest.approx(math.log(2) / math.sqrt(12))
    assert (fullft.width, fullft.batch_size, fullft.steps, fullft.counts, lora.rank) == (2048, 8, 200, True, 8)
    assert fullft.losses == (2.1, 2.0, 2.2)


def test_folders_of_one_repository_are_one_source(source):
    folders = [source(name=name) for name in ("made-up-more", "made-up")]
    optima = [optimum for optimum in known_optima(read_sources(folders)) if optimum.source.startswith("made-up")]
    assert [optimum.source for optimum in optima] == ["made-up"] * 4


def test_an_edge_does_not_count_and_a_diverged_neighbour_bounds(source):
    falling = [row("fullft", lr, loss) for lr, loss in ((1e-5, 2.2), (2e-5, 2.1), (4e-5, 2.0))]
    [own] = read_sources([source(falling)])
    optima = known_optima([own])
    [edge] = [optimum for optimum in optima if optimum.source == "made-up"]
    assert (edge.lr, edge.counts) == (4e-5, False)
    assert math.isnan(edge.error)
    # The authors' sweep left out the runs at 3e-3 that diverged, so 1e-3 is inside.
    by_model = {optimum.model: optimum for optimum in optima if optimum.dataset == "tulu3"}
    assert (by_model["meta-llama/Llama-3.2-1B"].lr, by_model["meta-llama/Llama-3.2-1B"].counts) == (1e-3, True)


def test_optima_of_own_runs_have_their_model_and_interval():
    about = {"family": "llama", "hidden_size": 128, "base_params": 828_288, "model_sha256": '{"weights": "1"}'}
    rows = [row | about for rank in (None, 32) for row in make_sweep(rank=rank)]
    unknown = [row | {"model": "other"} for row in make_sweep(rank=None)]
    table = measured_optima(Tables.of({"runs": runs_table([*rows, *unknown])}))
    assert list(table["method"]) == ["fullft", "lora"]
    for optimum in table.to_dict("records"):
        assert (optimum["family"], optimum["width"], optimum["parameters"]) == ("llama", 128, 828_288)
        assert optimum["model"] == optimum["weights"] == '{"weights": "1"}'
        assert 0 < optimum["lr_low"] < optimum["lr"] < optimum["lr_high"]
        assert (optimum["error"] >= math.log(1.15), optimum["counts"]) == (True, True)
    assert table["remark"].tolist() == ["fitted", "fitted"]
    for run in rows:
        if run["rank"] == 32 and run["seed"]:
            run["final_test_nll"] += 0.1 * (-1) ** run["seed"]
    table = measured_optima(Tables.of({"runs": runs_table(rows)}))
    assert table["remark"].tolist() == ["fitted, not resolved"] * 2
    assert measured_optima(Tables.of({"runs": runs_table(unknown)})).empty

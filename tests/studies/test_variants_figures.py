"""The figures of variants of LoRA, from tables made by hand."""

from __future__ import annotations

import math

import pytest

from ..figures.layout import draw, lines, only
from ..handmade import rl
from ..handmade.sft import arm, tables

STANDARD = {"alpha": 32.0, "init_a": 1.0, "lr_ratio": 1.0}


def method(name, made):
    """Make the runs of an arm those of another method."""
    runs, curves = made
    for row in (*runs, *curves):
        row["run_id"] += name
    return [run | {"method": name} for run in runs], curves


def adapters(rank, **columns):
    """Make LoRA, rsLoRA with a lower loss and PiSSA with a higher one, and alpha 8, which is not a variant."""
    about, root = STANDARD | columns, math.sqrt(rank)
    return [
        arm(rank, optimum=2e-3, **about),
        arm(rank, optimum=2e-3 / root, floor=1.9, **(about | {"alpha": 32.0 * root})),
        method("pissa", arm(rank, optimum=5e-4, floor=2.1, **about)),
        arm(rank, optimum=2e-3, floor=1.5, **(about | {"alpha": 8.0})),
    ]


def test_gaps_and_ratios_are_to_lora_of_the_same_rank():
    size = {"hidden_size": 128, "steps": 50}
    arms = [arm(optimum=4e-4, **size), *adapters(4, **size), *adapters(16, **size)]
    figure, plotted = draw("variants_of_lora", *tables(arms))
    gaps = only(plotted, "gap")
    assert gaps["variant"].tolist() == ["fullft", "fullft", "rslora", "rslora", "pissa", "pissa"]
    assert gaps["rank"].tolist() == [4, 16] * 3
    assert gaps["gap"].tolist() == pytest.approx([0.0, 0.0, -0.1, -0.1, 0.1, 0.1], abs=1e-6)
    assert gaps["lr_ratio"].tolist() == pytest.approx([0.2, 0.2, 1 / 2, 1 / 4, 0.25, 0.25])
    # LR sqrt(1 + (LR / 1.69e-3)^2) is 3.10e-3 for LoRA, and half of it at 1.247e-3, for rsLoRA at rank 4.
    assert gaps["lr_ratio_predicted"].notna().tolist() == [False, False, True, True, False, False]
    assert gaps["lr_ratio_predicted"].iloc[2] == pytest.approx(1.247 / 2, rel=1e-3)
    # 2% of the gain from the base's 5 nats to the validation loss of full fine-tuning.
    assert gaps["margin"].tolist() == pytest.approx([0.02 * (5 - 2.1)] * 6, rel=0.01)
    assert gaps[["comparable", "resolved"]].all(axis=None)
    assert not plotted["arm"].str.contains("alpha 8").any()
    for axes, value in zip(figure.axes[2:], ("gap", "lr_ratio"), strict=True):
        marks = [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() in ("s", "<", "v")]
        assert marks == gaps[value].tolist()


def test_a_gap_of_one_seed_has_an_open_mark_and_no_interval():
    figure, plotted = draw("variants_of_lora", *tables(adapters(4, placement="attn", offsets=(0.0,))))
    gaps = only(plotted, "gap")
    assert gaps[["gap_low", "lr_ratio_high"]].isna().all(axis=None)
    faces = [line.get_markerfacecolor() for axes in figure.axes[1:] for line in lines(axes, marker="<")]
    assert faces == ["white"] * 2


def test_in_rl_gaps_are_of_error_rates():
    columns = STANDARD | {"experiments": None}
    arms = [rl.arm(optimum=1e-4, experiments=None), rl.arm(64, optimum=1e-3, **columns)]
    arms += [rl.arm(1, optimum=1e-3, peak=0.7, **columns)]
    arms += [method("dora", rl.arm(64, optimum=2e-3, peak=0.75, **columns))]
    _, plotted = draw("variants_of_lora_rl", *tables(arms))
    gaps = only(plotted, "gap").set_index(["variant", "rank"])
    wanted = {("fullft", 1): -0.1, ("fullft", 64): 0.0, ("dora", 64): 0.05}
    assert gaps["gap"].to_dict() == pytest.approx(wanted, abs=0.005)
    assert gaps.loc[("dora", 64), "lr_ratio"] == pytest.approx(2.0, rel=0.05)


def test_lora_alone_has_no_panels_of_gaps():
    figure, plotted = draw("variants_of_lora", *tables([arm(4, optimum=2e-3, diverges_from=1e-2)]))
    assert only(plotted, "gap").empty
    assert len(figure.axes) == 1
    _, plotted = draw("variants_of_lora", *tables([arm(4, optimum=2e-3, **(STANDARD | {"alpha": 8.0}))]))
    assert plotted.empty

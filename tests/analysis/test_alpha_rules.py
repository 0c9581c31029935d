"""LoRA is judged by the arms whose alpha follows one rule, that of the highest rank, and the reason says so."""

import pandas as pd
import pytest

from lorabench.analysis.alpha_rules import PAPERS, alpha_rule, judged_arms, remarks_on_alpha
from lorabench.analysis.arms import arm_labels
from lorabench.api import judge

from ..handmade import sft

LRS = (3e-4, 1e-3, 3e-3)


def runs_of(*alphas: tuple[int, float | None], few: tuple[tuple[int, float], ...] = ()) -> pd.DataFrame:
    """Return FullFT and LoRA of ranks and alphas with three LRs, and with one LR those of `few`."""
    arms = [sft.arm(rank, optimum=1e-3, lrs=LRS, alpha=alpha, offsets=(0.0,)) for rank, alpha in alphas]
    arms += [sft.arm(rank, optimum=1e-3, lrs=LRS[:1], alpha=alpha, offsets=(0.0,)) for rank, alpha in few]
    return sft.tables([sft.arm(optimum=1e-4, lrs=LRS, offsets=(0.0,)), *arms])[0].astype({"alpha": float})


EVERY = (1, 4, 16, 64)


@pytest.mark.parametrize(
    ("runs", "rule", "judged", "left_out"),
    [
        # The paper's alpha is the standard beside others of an experiment on the parametrization, also where it ties.
        (runs_of(*((rank, 32.0) for rank in EVERY)), "alpha 32", EVERY, ""),
        (runs_of((16, 8.0), (16, 32.0), (16, 128.0), (64, 32.0)), "alpha 32", (16, 64), ""),
        (runs_of((16, 32.0), (64, 32.0), few=((4, 8.0), (8, 16.0), (64, 128.0))), "alpha 32", (16, 64), "r4 r8 r64"),
        # Rules of others.
        (runs_of(*((rank, 2.0 * rank) for rank in EVERY)), "alpha = 2 r", EVERY, ""),
        (runs_of(*((rank, 11.3 * rank**0.5) for rank in EVERY)), "alpha = 11.3 sqrt(r)", EVERY, ""),
        (runs_of((8, 32.0), (16, 32.0), (32, 64.0), (64, 128.0)), "alpha = 2 r", (16, 32, 64), "r8"),
        # No rule is the paper's: the alpha that is nearest to it stands for the highest rank.
        (runs_of((64, 64.0), (64, 512.0)), "alpha 64", (64,), "r64"),
        # A rank with fewer learning rates does not set the rule.
        (runs_of((8, 16.0), (16, 32.0), (32, 64.0), few=((64, 32.0),)), "alpha = 2 r", (8, 16, 32), "r64"),
    ],
)
def test_one_rule_of_alpha_holds_in_a_comparison(runs, rule, judged, left_out):
    standard = judged_arms(runs)
    assert str(alpha_rule(runs)) == rule
    assert standard[runs["method"] == "fullft"].all()
    lora = runs[standard & (runs["method"] == "lora")]
    assert (tuple(sorted(lora["rank"].unique())), lora["run_id"].nunique()) == (judged, len(lora))
    # What is judged is judged the same when it is asked again, without the arms that are left out.
    assert judged_arms(runs[standard]).all()
    [remark] = remarks_on_alpha(runs, set(lora["run_id"])) or [""]
    assert remark.startswith(f"LoRA is judged at {rule}" if left_out or rule != str(PAPERS) else "")
    out = arm_labels(runs[~standard]) if left_out else []
    assert all(label in remark for label in out)
    assert {word for label in out for word in label.split()} >= set(left_out.split())


def test_of_alpha_that_grows_with_the_rank_the_highest_rank_is_judged():
    # Rank 16, which lacks capacity, is the only one with alpha 32, and 64 equals FullFT.
    arms = [
        sft.arm(rank, optimum=80e-3 / rank, floor=2.0 if rank == 64 else 2.3, alpha=2.0 * rank, steps=1000)
        for rank in (8, 16, 64)
    ]
    runs, curves = sft.tables([sft.arm(optimum=5e-4, steps=1000), *arms])
    claims = judge({"runs": runs, "curves": curves}, ("B1", "B2", "B3", "B4")).set_index("claim_id")
    assert "LoRA r64 alpha 128 - FullFT" in claims.loc["B2", "reason"]
    # The ratio of 10 is one at alpha 32, and optima that do not depend on the rank are those of the factor 1/r.
    assert claims["verdict"].tolist() == ["setting not met", "confirmed", "setting not met", "setting not met"]
    assert claims.loc["B1", "missing"].startswith("LoRA with alpha 32 (here alpha = 2 r;")

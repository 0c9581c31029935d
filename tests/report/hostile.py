"""A report in which every text tries to break out of its place in the page."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd
import pyarrow as pa

from lorabench.store.schemas import CLAIMS, CURVES, EVALS, RUNS

from ..handmade import make_eval, make_sweep

HOSTILE = (
    "'\"></script></style><script>window.hacked=1</script><img/src=x/onerror=window.hacked=1>"
    "<a/href=javascript:window.hacked=1>-->]]><x-evil/onclick=window.hacked=1>{{7*7}}\u2028\\u003cx-evil>&lt;"
)

# Columns that the page does not show in full (a time, a short hash) or at all, or that allow only a few values.
_KEPT = {
    "runs": {
        *("task", "method", "status", "started", "git_sha", "family", "protocol"),
        *("data_kind", "base_kind", "alpha_convention", "precision", "schedule"),
    },
    "curves": {"run_id"},
    "evals": {"run_id", "method", "about", "source", "template_sha256", "task_config", "placement"},
    "claims": {"kind", "verdict"},
}


def columns(name: str) -> list[str]:
    """Return the text columns of a table that are made hostile and that the page shows."""
    schema = {"runs": RUNS, "curves": CURVES, "evals": EVALS, "claims": CLAIMS}[name]
    return [column.name for column in schema if pa.types.is_string(column.type) and column.name not in _KEPT[name]]


def hostile_report(report: Any) -> Any:
    """Build the page of runs, curves, evaluations and claims with HOSTILE in each of these columns."""
    texts, scores = ({name: f"{name}{HOSTILE}" for name in columns(table)} for table in ("runs", "evals"))
    texts["versions"] = scores["versions"] = json.dumps({"torch": f"versions{HOSTILE}"})
    rows = []
    for place, row in enumerate(make_sweep(None) + make_sweep(1) + make_sweep(16)):
        own = {"run_id": f"run_id{HOSTILE}{place}", "experiments": ["rank", f"experiments{HOSTILE}"]}
        # Without LoRA on all layers no claim would have an estimate.
        layers = texts["placement"] if row["rank"] == 16 else row["placement"]
        rows.append(row | texts | own | {"placement": layers})
    evals = [make_eval(rank, 0.5, **scores) for rank in ("base", None)]

    def spoilt(name: str) -> Any:
        def spoil(table: pd.DataFrame) -> pd.DataFrame:
            texts = {column: f"{column}{HOSTILE}" for column in columns(name)}
            # The ids of claims stay distinct.
            ids = [f"claim_id{HOSTILE}{place}" for place in range(len(table))]
            return table.assign(**texts | ({"claim_id": ids} if name == "claims" else {}))

        return spoil

    evaluation = {"experiments": ["rank"], "tasks": [{"name": "hellaswag", "about": "forgotten"}]}
    return report(
        rows,
        evals,
        claims=spoilt("claims"),
        curves=spoilt("curves"),
        evaluation=evaluation,
        description=f"description{HOSTILE}",
        limits=[f"limit{HOSTILE}"],
    )

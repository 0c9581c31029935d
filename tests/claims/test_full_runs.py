"""Claims on whole runs leave out shorter comparisons where there are longer ones."""

from __future__ import annotations

from types import SimpleNamespace

import pandas as pd

from lorabench.claims.scopes import every_dataset, full_runs


def comparisons(*steps):
    return [SimpleNamespace(runs=pd.DataFrame({"steps": [number]})) for number in steps]


def test_shorter_runs_are_left_out_where_there_are_full_ones():
    short, full, longer = comparisons(999, 1000, 3000)
    assert [chosen for chosen, _ in full_runs(every_dataset)([short, full, longer])] == [full, longer]


def test_without_full_runs_all_are_judged():
    both = comparisons(50, 999)
    assert [chosen for chosen, _ in full_runs(every_dataset)(both)] == both

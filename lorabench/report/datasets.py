"""The origin of a preset's datasets and the examples left out of them, from the files that the runs read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lorabench.data.sft import about
from lorabench.data.tokens import count_left_out
from lorabench.store.layout import Layout


def dataset_origins(layout: Layout) -> list[dict[str, Any]]:
    """Describe each dataset that comes from a file or the hub, and each of which something was left out.

    Returns:
        For each dataset: `name`; `source`, as text; `rows` and `usable`, the numbers of all and of usable rows (null
        for a generated dataset, of which only the examples too long for a model are counted); and `left_out`, a list
        of texts that say how many examples were left out and why.
    """
    described = []
    for name in layout.preset.sources:
        row = _taken_from(layout, name)
        longer = list(_longer(layout, name)) if name in layout.preset.datasets else []
        if row is None and longer:
            row = {"source": "generated", "rows": None, "usable": None, "left_out": []}
        if row is not None:
            described.append({"name": name, **row, "left_out": row["left_out"] + longer})
    return described


def _taken_from(layout: Layout, name: str) -> dict[str, Any] | None:
    tally, path = layout.tally(name), layout.dataset(name)
    if tally.is_file():
        read = json.loads(tally.read_text())
        left_out = [f"{bad['rows']} {bad['reason']} (first: {read['unit']} {bad['first']})" for bad in read["bad"]]
        source = f"file, {read['format']}"
        return {"source": source, "rows": read["rows"], "usable": read["usable"], "left_out": left_out}
    if path.is_file() and (note := about(path)):
        left_out = [f"{count} {reason}" for reason, count in note["left_out"].items() if count]
        return {"source": note["id"], "rows": note["rows"], "usable": note["usable"], "left_out": left_out}
    return None


def _longer(layout: Layout, name: str) -> Iterator[str]:
    """Yield, for each model and split, how many examples have more tokens than the dataset allows."""
    for model in layout.preset.models:
        path = layout.tokens(model, name)
        if path.is_file():
            for split, count in count_left_out(path).items():
                if count:
                    yield f"{count} of {split} with more tokens than max_tokens for {model}"

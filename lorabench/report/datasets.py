"""What a preset's datasets were taken from, and what was left out: said by the files that the runs read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from lorabench.data.sft import about
from lorabench.data.tokens import examples_left_out
from lorabench.layout import Layout


def datasets(layout: Layout) -> list[dict[str, Any]]:
    """Rows and usable rows of each dataset from a file or the hub, and what was left out of any dataset, and why.

    Each has `name`, `source`, `rows` and `usable` (null where only examples too long for a model are known), and
    `left_out`, in words. Datasets made here, of which nothing was left out, are not listed.
    """
    found = []
    for name in layout.preset.sources:
        row = _taken_from(layout, name)
        longer = list(_longer(layout, name)) if name in layout.preset.datasets else []
        if row is None and longer:
            row = {"source": "made here", "rows": None, "usable": None, "left_out": []}
        if row is not None:
            found.append({"name": name, **row, "left_out": row["left_out"] + longer})
    return found


def _taken_from(layout: Layout, name: str) -> dict[str, Any] | None:
    tally, path = layout.tally(name), layout.dataset(name)
    if tally.is_file():
        said = json.loads(tally.read_text())
        bad = [f"{one['rows']} {one['reason']} (first: {said['unit']} {one['first']})" for one in said["bad"]]
        return {"source": f"file, {said['format']}", "rows": said["rows"], "usable": said["usable"], "left_out": bad}
    if path.is_file() and (note := about(path)):
        bad = [f"{count} {reason}" for reason, count in note["left_out"].items() if count]
        return {"source": note["id"], "rows": note["rows"], "usable": note["usable"], "left_out": bad}
    return None


def _longer(layout: Layout, name: str) -> Iterator[str]:
    """Examples longer than the dataset's limit, for each model."""
    for model in layout.preset.models:
        path = layout.tokens(model, name)
        if path.is_file():
            for split, count in examples_left_out(path).items():
                if count:
                    yield f"{count} of {split} with more tokens than max_tokens for {model}"

"""The groups of test examples: examples of one group share their source, so that what helps with one helps with others.

Groups are what test examples are drawn from and other examples would not come from, such as the packages of docstrings:
those of the test split are not trained on, and stand for further packages. The tasks and templates of generated text
are no groups. They are a fixed list, on which runs are trained and tested alike, and of which each example is drawn
independently.
"""

from __future__ import annotations

from pathlib import Path

from lorabench.config.inputs import DatasetSpec, FileDataset, FileProblems, HubDataset, ProblemSpec, ShippedDataset
from lorabench.errors import UserError
from lorabench.utils.files import damage_explained


def has_groups(spec: DatasetSpec | ProblemSpec) -> bool:
    """Return whether examples come in groups, which are then named by the column `source` of the dataset's file."""
    if isinstance(spec, FileDataset | FileProblems | HubDataset):
        return spec.group is not None
    return isinstance(spec, ShippedDataset)


def groups_of_tests(dataset: Path, tokens: Path | None) -> list[str]:
    """Return the group of each test example in the order of a run's losses; UserError if the dataset's file is damaged.

    Args:
        dataset: the file of a dataset or a problem set that has groups.
        tokens: its tokens for the runs' model, which lack the examples over its limit of tokens; None without a limit.
    """
    # Every start of the workflow imports this module, so it must be fast.
    import pyarrow.parquet as pq

    from lorabench.data.tokens import left_out_of_test

    if not dataset.is_file():
        raise UserError(f"{dataset} is missing, which names the groups of its test examples: make it again")
    with damage_explained(dataset), pq.ParquetFile(dataset) as file:
        rows = file.read(["split", "source"]).to_pylist()
    groups = [row["source"] for row in rows if row["split"] == "test"]
    left_out = left_out_of_test(tokens) if tokens is not None else set()
    return [group for number, group in enumerate(groups) if number not in left_out]

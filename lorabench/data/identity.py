"""What stands for the data of a dataset or a problem set: a hash of its rules, and whether its examples have groups.

Groups are what test examples are drawn from and other examples would not come from, such as the packages of docstrings:
those of the test split are not trained on, and stand for further packages, so that what helps with one example of a
group helps with others. The tasks and templates of generated text are no groups. They are a fixed list, on which runs
are trained and tested alike, and of which each example is drawn independently.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from lorabench.config.inputs import (
    DatasetSpec,
    FactsDataset,
    FileDataset,
    FileProblems,
    GeneratedSplits,
    HubDataset,
    HubProblems,
    ProblemSpec,
    ShippedDataset,
)
from lorabench.runs import PROTOCOL_VERSION
from lorabench.utils.files import digest, file_sha256

SHIPPED = {
    "docstrings": {
        1: "1940b28c060a980a76853e49b001060b81f53c107ec2d7b22df2517ee6c755f8",
        2: "1acbff41e5f9fc73737b5adfd28e91217753e62164c91e655f6d10479323bddf",
    },
    "documentation": {
        1: "a250013e22cab6a91ef8798f2dd257fb4dca6ae2b6ac1a8d8557995e561c7c60",
        2: "4be4018475a6c3c74e4a7a26020712bc361b530795201253c22d14c3d7ac202d",
    },
}
"""For each kind of `ShippedDataset`, the SHA-256 of the file that was shipped when each edition was the last.

The file of today is that of edition 2; it also holds the rows of edition 1, whose datasets keep the ids that they had
with the former file. The file names the hashes of its sources.
"""


def dataset_id(spec: DatasetSpec | ProblemSpec) -> str:
    """Return the hash of everything that determines the examples of a dataset, or the problems of a problem set."""
    # The ids of data with these fields at their defaults are as they were before the fields were.
    defaults = ("group", None), ("test_seed", None), ("edition", 1)
    without = {name for name, value in defaults if getattr(spec, name, value) == value} | {"curve_examples"}
    if isinstance(spec, FileDataset | FileProblems):
        # The file's content counts, not its path.
        rules = spec.model_dump(exclude=without | {"path", "mean_tokens"})
        path = Path(spec.path)
        return digest([PROTOCOL_VERSION, rules, _content(path, path.stat().st_size, path.stat().st_mtime_ns)], 8)
    content = [SHIPPED[spec.kind][spec.edition]] if isinstance(spec, ShippedDataset) else []
    # Data of the hub once had a path, which counts as null.
    former = {"path": None} if isinstance(spec, HubDataset | HubProblems) else {}
    return digest([PROTOCOL_VERSION, spec.model_dump(exclude=without) | former, *content], 8)


def id_of_test(spec: DatasetSpec | ProblemSpec, first_seed: int) -> str:
    """Return what identifies the test examples of data in a preset with a first seed: the id of the data with the first
    seed 0, followed by the first seed where it gives other test examples (see `Preset.first_seed`)."""
    if first_seed and isinstance(spec, FactsDataset):
        return f"{dataset_id(spec.model_copy(update={'seed': spec.seed - first_seed}))}@{first_seed}"
    if first_seed and isinstance(spec, GeneratedSplits) and spec.test_seed == first_seed:
        return f"{dataset_id(spec.model_copy(update={'test_seed': None}))}@{first_seed}"
    return dataset_id(spec)


@cache
def _content(path: Path, size: int, changed_ns: int) -> str:
    """Return a file's hash, which this process computes again only if the file's size or time has changed."""
    return file_sha256(path)


def has_groups(spec: DatasetSpec | ProblemSpec) -> bool:
    """Return whether examples come in groups, which are then named by the column `source` of the dataset's file."""
    return isinstance(spec, ShippedDataset) or getattr(spec, "group", None) is not None

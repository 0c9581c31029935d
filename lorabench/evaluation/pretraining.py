"""Held-out pretraining text of the tiny bases: what fine-tuning may forget.

The text that the shipped held-out losses were measured on: the first documents of the seed after that of the
training text. All tiny bases share the tasks and the seed, so one file serves them all.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pyarrow as pa

from lorabench.models.tiny import END, RECIPES, documents
from lorabench.tables import write_table


def write_pretraining(count: int, path: Path) -> None:
    """Write so many documents as parquet with a column `text`; without the end token, which lm-eval does not score."""
    recipe = RECIPES["llama-128"]
    texts = [text.removesuffix(END) for text in islice(documents(recipe, recipe.seed + 1), count)]
    write_table(pa.table({"text": texts}), path)

"""Held-out pretraining text of the tiny bases, on which an evaluation measures what fine-tuning has forgotten.

It is the text that the shipped held-out losses were measured on: the first documents of the seed that follows the
seed of the training text. All tiny bases share the pretraining tasks and the seed, so one file serves them all.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pyarrow as pa

from lorabench.models.tiny import END, RECIPES, documents
from lorabench.store.io import write_table


def write_pretraining(count: int, path: Path) -> None:
    """Write the first `count` documents as parquet with a column `text`, without the end token, which is not scored."""
    recipe = RECIPES["llama-128"]
    texts = [text.removesuffix(END) for text in islice(documents(recipe, recipe.seed + 1), count)]
    write_table(pa.table({"text": texts}), path)

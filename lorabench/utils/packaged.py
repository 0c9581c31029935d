"""Files outside the package that it needs: the workflow with its presets, published numbers, and known optimal LRs.

In a clone, `lorabench/packaged` holds links to the repository's files; in a wheel, it holds copies of them.
"""

from __future__ import annotations

from pathlib import Path

PACKAGED = Path(__file__).parents[1] / "packaged"
SNAKEFILE = PACKAGED / "Snakefile"
WORKFLOW = PACKAGED / "workflow"
REFERENCE = PACKAGED / "reference"
"""Published numbers, each with its source (SOURCES.md)."""
LR_OPTIMA = PACKAGED / "lr_optima.csv"
"""The optimal learning rates that are known, a table that `lorabench evidence` writes."""

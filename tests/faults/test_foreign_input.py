"""Hundreds of seeded mutations of foreign files: commands end soon, in a result or a sentence.

Inputs that once failed are cases of the tests of what reads them.
"""

import json
import math
import random
import resource
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from lorabench.cli.commands import app

from ..conftest import REPOSITORY
from ..handmade import curves_of, make_sweep, runs_table

SECONDS, BYTES = 10.0, 2**30
"""What one command may take."""

NONSENSE = [
    *("", "nan", ".inf", "-1", "0", "1e400", "9" * 5000, "x" * 5000, "'", '"', "[" * 2000, "{a: " * 2000, "-" * 3000),
    *("${A:-" * 50, "&a [*a, *a]", "*a", "<<: *a", "!!python/name:os.system", "\ufeff", "\0", "\x1b[2J", "\n::error::"),
]


VALUES = [
    *(None, [], {}, math.nan, math.inf, -1, 0, 1, 2, 7, 100, 10**30, 0.5, 3e-4, 1e-320, 1e308, "", "x", "é", True),
    *([1, 2], {"a": 1}, "x" * 5000, "1e400", [[]]),
]
"""What takes the place of a value, of whatever type."""


def other_value(content: bytes, chance: random.Random) -> bytes:
    """Return JSON or YAML with one value replaced, or left out."""
    data = yaml.safe_load(content)
    inner, depth = data, chance.randint(0, 6)
    while True:
        key = chance.choice(list(inner)) if isinstance(inner, dict) else chance.randrange(len(inner))
        if depth == 0 or not isinstance(inner[key], dict | list) or not inner[key]:
            break
        inner, depth = inner[key], depth - 1
    if chance.random() < 0.2:
        del inner[key]
    else:
        inner[key] = chance.choice(VALUES)
    return json.dumps(data).encode()


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Return content with one to three changes: a part is left out, repeated, or replaced by a byte or nonsense."""
    for _ in range(chance.randint(1, 3)):
        start = chance.randrange(len(content) + 1)
        end = start + chance.randint(0, 20)
        nonsense = chance.choice(NONSENSE).encode()
        part = chance.choice([b"", content[start:end] * 300, nonsense, bytes([chance.randrange(256)])])
        content = content[:start] + part + content[end:]
    return content


def preset(folder: Path, chance: random.Random) -> list[object]:
    """Write a changed preset, and return the command that reads it."""
    text = (REPOSITORY / "workflow/presets/smoke.yaml").read_bytes()
    change = chance.choice([mutated, other_value, other_value])
    (folder / "mine.yaml").write_bytes(change(text, chance))
    return ["plan", "--preset", folder / "mine.yaml"]


def table(folder: Path, chance: random.Random) -> list[object]:
    """Write tables of which one is changed, and return the command that reads them."""
    runs = runs_table(make_sweep(None) + make_sweep(8))
    runs.to_csv(folder / "runs.csv", index=False)
    curves_of(runs).to_parquet(folder / "curves.parquet")
    path = folder / chance.choice(["runs.csv", "runs.csv", "curves.parquet"])
    path.write_bytes(mutated(path.read_bytes(), chance))
    return ["claims", "--tables", folder, "--out", folder / "out"]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "number"), [(preset, 80), (table, 40)])
def test_mutated_input_ends_in_a_result_or_a_sentence(make, number, tmp_path):
    understood, limit = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + BYTES
    for seed in range(number):
        place = tmp_path / str(seed)
        place.mkdir()
        words, start = make(place, random.Random(f"{make.__name__} {seed}")), time.monotonic()
        result = CliRunner().invoke(app, list(map(str, words)))
        assert result.exception is None or isinstance(result.exception, SystemExit), place
        assert result.exit_code in (0, 1, 2), place
        assert "Traceback" not in result.output, place
        assert time.monotonic() - start < SECONDS, place
        understood += result.exit_code < 2
    assert understood >= number / 20, "so few inputs are understood that the mutations test little"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < limit

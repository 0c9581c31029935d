"""The benchmark's numbers as a CSV file and as a table for a terminal."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

REPOSITORY = Path(__file__).parents[2]
RESULTS = Path(__file__).parents[1] / "speed.csv"
_PACKAGES = ("torch", "transformers", "peft", "trl")


def say(line: str) -> None:
    """Print a line of progress and flush it."""
    print(line, flush=True)


@dataclass(frozen=True)
class Row:
    """The measurements of an arm; `seconds` is the median for all of its `runs` together."""

    part: str
    """"sweep", "step", "rl" or "peak"."""
    case: str
    """The case, common to all arms that are compared; the first arm of a case is the reference of the ratios."""
    arm: str
    threads: int
    runs: int
    seconds: float
    cpu_seconds: float | None = None
    """Median of the CPU seconds of all processes of the arm; other work on the machine disturbs it less."""
    train_nll: float | None = None
    """Loss of the last steps in nats per scored token, the mean over runs."""
    test_nll: float | None = None
    reward: float | None = None
    """Mean reward over the measured steps of RL."""
    gflops: float | None = None
    """GFLOP/s of matmul in part "peak", elsewhere of training with FLOPs counted as in the paper."""
    share_of_peak: float | None = None
    ratio: float | None = None
    """Seconds per run divided by those of the first arm of the case."""


def with_ratios(rows: Iterable[Row]) -> list[Row]:
    """Return the rows, each with its ratio to the first row of its case."""
    first: dict[tuple[str, str], float] = {}
    complete = []
    for row in rows:
        seconds = row.seconds / row.runs
        complete.append(replace(row, ratio=seconds / first.setdefault((row.part, row.case), seconds)))
    return complete


def facts(load: float, turns: int, device: str) -> dict[str, Any]:
    """Return the date, commit, package versions, and what is given, of a measurement: load before it, turns, device."""
    command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--exclude", "*"]
    described = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "commit": described.stdout.strip() or "unknown",
        "device": device,
        "load": round(load, 1),
        "turns": turns,
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }


def write(rows: list[Row], measured: dict[str, Any], path: Path) -> None:
    """Write the rows, with the facts of the measurement in each, as a CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*measured, *(field.name for field in fields(Row))], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            numbers = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow(measured | numbers)


def shown(rows: Iterable[Row]) -> str:
    """Return the rows as a table for a terminal."""
    lines = [
        f"{'what':44} {'arm':38} {'runs':>4} {'s':>8} {'s per run':>9} {'s of CPU':>8} {'ratio':>6} "
        f"{'train':>7} {'test':>7} {'reward':>6} {'GFLOP/s':>7} of peak"
    ]
    for row in rows:
        numbers = (
            f"{row.runs:4d} {row.seconds:8.3g} {row.seconds / row.runs:9.3g} {_number(row.cpu_seconds, '.3g'):>8} "
            f"{_number(row.ratio, '.2f'):>6} "
            f"{_number(row.train_nll, '.4f'):>7} {_number(row.test_nll, '.4f'):>7} {_number(row.reward, '.2f'):>6} "
            f"{_number(row.gflops, '.1f'):>7} {_number(row.share_of_peak, '.0%'):>7}"
        )
        lines.append(f"{row.case:44} {row.arm:38} {numbers.rstrip()}")
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "" if value is None or pd.isna(value) else format(value, form)

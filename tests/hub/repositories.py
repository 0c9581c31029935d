"""Small repositories of exactly the form that those of the hub have: files, configurations, columns, types.

Each is written into `<root>/<owner>/<name>`. The forms are those of the dataset cards on the hub, at the commits that
the presets `core` and `paper` name; what the cards do not say follows from file names in public code.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.utils.hub import FetchedRepository

Row = Mapping[str, Any]
TEXT = pa.string()
SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory")
SUBJECTS += ("prealgebra", "precalculus")


@dataclass(frozen=True)
class Copy(FetchedRepository):
    """A repository as if it had been fetched, whose files are in the folder `root/owner/name`."""

    root: Path = Path()

    def data_files(self, config: str | None, split: str) -> list[Path]:
        files = (self.root / self.id / (config or "")).rglob(f"{split}*")
        return sorted(file for file in files if file.suffix in (".parquet", ".jsonl"))


def copies(root: Path) -> dict[str, FetchedRepository]:
    names = ["/".join(folder.parts[-2:]) for folder in root.glob("*/*")]
    return {name: Copy("dataset", name, "0" * 40, {}, root) for name in names}


def write_card(folder: Path, configs: Mapping[str, Mapping[str, str]]) -> None:
    """Write the card, which says which files make which split of which configuration."""
    files = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in splits.items()]}
        for name, splits in configs.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': files})}\n---\n# A dataset\n")


def write_configs(
    folder: Path,
    configs: Mapping[str, Mapping[str, Sequence[Row]]],
    schema: Mapping[str, pa.DataType] | None = None,
    files: int = 1,
) -> Path:
    """Write some parquet files of each split of each configuration, and the card that lists them; return the folder.

    The rows of the only configuration, `default`, are in the folder `data`. Columns have the types of the rows, or
    those of a schema.
    """
    card: dict[str, dict[str, str]] = {}
    for config, splits in configs.items():
        for split, rows in splits.items():
            place = f"{'data' if config == 'default' else config}/{split}-"
            for number in range(files):
                path = folder / f"{place}{number:05}-of-{files:05}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                part = list(rows[number::files])
                pq.write_table(pa.Table.from_pylist(part, schema=schema and pa.schema(list(schema.items()))), path)
            card.setdefault(config, {})[split] = f"{place}*"
    write_card(folder, card)
    return folder


def write_jsonl(path: Path, rows: Iterable[Row]) -> Path:
    """Write a repository without configurations: a file of JSON lines and a card; return the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (path.parent / "README.md").write_text("# A dataset\n")
    return path.parent


# https://huggingface.co/datasets/allenai/tulu-3-sft-mixture: 939,343 rows in data/train-*-of-00006.parquet.
TULU3 = {"id": TEXT, "messages": pa.list_(pa.struct([("content", TEXT), ("role", TEXT)])), "source": TEXT}


def tulu3_row(number: int, question: str | None = None, answer: str | None = None) -> dict[str, Any]:
    """Return a row; a third of the rows has a system prompt and two turns."""
    turns = [("user", question or f"question {number}"), ("assistant", answer or f"answer {number}")]
    if number % 3 == 0:
        turns = [("system", "be brief"), *turns, ("user", "and more?"), ("assistant", "no")]
    messages = [{"content": content, "role": role} for role, content in turns]
    return {"id": f"row_{number}", "messages": messages, "source": f"ai2-adapt-dev/part{number % 2}"}


def write_tulu3(root: Path, rows: Iterable[Row], files: int = 2) -> Path:
    return write_configs(root / "allenai/tulu-3-sft-mixture", {"default": {"train": list(rows)}}, TULU3, files)


# https://huggingface.co/datasets/openai/gsm8k: configurations main and socratic, of the same columns.
def write_gsm8k(root: Path, train: int = 60, test: int = 20) -> Path:
    def row(config: str, n: int) -> Row:
        answer = f"It is <<{n}*1000={n * 1000}>>.\n#### {n * 1000:,}" if config == "main" else "#### 0"
        return {"question": f"How many\u2028are {n} thousand?", "answer": answer}

    numbers = {"train": range(train), "test": range(1000, 1000 + test)}
    configs = {
        config: {split: [row(config, n) for n in numbers[split]] for split in numbers}
        for config in ("main", "socratic")
    }
    return write_configs(root / "openai/gsm8k", configs)


# https://huggingface.co/datasets/EleutherAI/hendrycks_math: a configuration per subject.
def write_hendrycks_math(root: Path) -> Path:
    def row(subject: str, split: str, n: int) -> Row:
        solution = rf"It is $\boxed{{\frac{{{n}}}{{7}}}}$."
        problem = f"What is {n} in {subject} of {split}?"
        return {"problem": problem, "level": f"Level {n % 5 + 1}", "type": subject.title(), "solution": solution}

    configs = {
        subject: {split: [row(subject, split, n) for n in range(6)] for split in ("train", "test")}
        for subject in SUBJECTS
    }
    return write_configs(root / "EleutherAI/hendrycks_math", configs)


# https://huggingface.co/datasets/HuggingFaceH4/MATH-500: test.jsonl, no configurations in the card.
def write_math500(root: Path) -> Path:
    rows = [
        {"problem": f"What is {n} in {subject} of test?", "solution": "?", "answer": rf"\frac{{{n}}}{{7}}", "level": 1}
        for subject in SUBJECTS[:2]
        for n in range(6)
    ]
    return write_jsonl(root / "HuggingFaceH4/MATH-500/test.jsonl", rows)


# https://huggingface.co/datasets/zwhe99/DeepMath-103K: 103,110 rows, difficulty a float, three long solutions.
def write_deepmath(root: Path) -> Path:
    solutions = {f"r1_solution_{k}": "long" for k in (1, 2, 3)}
    rows = [
        {"question": f"What is {n}?", "final_answer": rf"\dfrac{{{n}}}{{7}}", "difficulty": 5.5, "topic": "Algebra"}
        | solutions
        for n in range(100)
    ]
    return write_configs(root / "zwhe99/DeepMath-103K", {"default": {"train": rows}}, files=2)

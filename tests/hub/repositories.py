"""Small repositories of exactly the form that those of the hub have: files, configurations, columns, types.

Each is written into `<root>/<owner>/<name>`. The forms are those of the dataset cards on the hub, at the commits that
the presets `core` and `paper` name; what the cards do not say follows from file names in public code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

TEXT = pa.string()
SUBJECTS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory")
SUBJECTS += ("prealgebra", "precalculus")


def write_parquet(path: Path, schema: Mapping[str, pa.DataType], rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=pa.schema(list(schema.items()))), path)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_card(folder: Path, configs: Mapping[str, Mapping[str, str]]) -> None:
    """Write the card, which says which files make which split of which configuration."""
    files = [
        {"config_name": name, "data_files": [{"split": split, "path": path} for split, path in splits.items()]}
        for name, splits in configs.items()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(f"---\n{json.dumps({'configs': files})}\n---\n# A dataset\n")


# https://huggingface.co/datasets/allenai/tulu-3-sft-mixture: 939,343 rows in data/train-*-of-00006.parquet.
TULU3 = {"id": TEXT, "messages": pa.list_(pa.struct([("content", TEXT), ("role", TEXT)])), "source": TEXT}


def tulu3_row(number: int, question: str | None = None, answer: str | None = None) -> dict[str, Any]:
    """Return a row; a third of the rows has a system prompt and two turns."""
    turns = [("user", question or f"question {number}"), ("assistant", answer or f"answer {number}")]
    if number % 3 == 0:
        turns = [("system", "be brief"), *turns, ("user", "and more?"), ("assistant", "no")]
    messages = [{"content": content, "role": role} for role, content in turns]
    return {"id": f"row_{number}", "messages": messages, "source": f"ai2-adapt-dev/part{number % 2}"}


def write_tulu3(root: Path, rows: Iterable[Mapping[str, Any]], files: int = 2) -> Path:
    folder, rows = root / "allenai/tulu-3-sft-mixture", list(rows)
    for number in range(files):
        write_parquet(folder / f"data/train-{number:05}-of-{files:05}.parquet", TULU3, rows[number::files])
    write_card(folder, {"default": {"train": "data/train-*"}})
    return folder


# https://huggingface.co/datasets/open-thoughts/OpenThoughts3-1.2M: 1,200,000 rows in 120 files, about 28 GB; 16 answers
# to each question; no system prompts (https://forgather.readthedocs.io/en/latest/examples/datasets/open-thoughts/).
OPENTHOUGHTS3 = {
    "difficulty": pa.int64(),
    "source": TEXT,
    "domain": TEXT,
    "conversations": pa.list_(pa.struct([("from", TEXT), ("value", TEXT)])),
}


def openthoughts3_row(number: int) -> dict[str, Any]:
    """Return a row; each question has two answers here."""
    chat = [
        {"from": "human", "value": f"riddle {number // 2}"},
        {"from": "gpt", "value": f"<think>\u2028</think> {number}"},
    ]
    return {"difficulty": 7 if number % 2 else None, "source": "ai2", "domain": "math", "conversations": chat}


def write_openthoughts3(root: Path, rows: Iterable[Mapping[str, Any]], files: int = 3) -> Path:
    folder, rows = root / "open-thoughts/OpenThoughts3-1.2M", list(rows)
    for number in range(files):
        write_parquet(folder / f"data/train-{number:05}-of-{files:05}.parquet", OPENTHOUGHTS3, rows[number::files])
    write_card(folder, {"default": {"train": "data/train-*"}})
    return folder


# https://huggingface.co/datasets/openai/gsm8k: configurations main and socratic, of the same columns.
def write_gsm8k(root: Path, train: int = 60, test: int = 20) -> Path:
    folder, schema = root / "openai/gsm8k", {"question": TEXT, "answer": TEXT}
    for config in ("main", "socratic"):
        for split, numbers in {"train": range(train), "test": range(1000, 1000 + test)}.items():
            rows = [
                {
                    "question": f"How many\u2028are {n} thousand?",
                    "answer": f"It is <<{n}*1000={n * 1000}>>.\n#### {n * 1000:,}" if config == "main" else "#### 0",
                }
                for n in numbers
            ]
            write_parquet(folder / f"{config}/{split}-00000-of-00001.parquet", schema, rows)
    splits = {config: {s: f"{config}/{s}-*" for s in ("train", "test")} for config in ("main", "socratic")}
    write_card(folder, splits)
    return folder


# https://huggingface.co/datasets/EleutherAI/hendrycks_math: a configuration per subject.
def write_hendrycks_math(root: Path, count: int = 6) -> Path:
    folder = root / "EleutherAI/hendrycks_math"
    for subject in SUBJECTS:
        for split in ("train", "test"):
            rows = [
                {
                    "problem": f"What is {n} in {subject} of {split}?",
                    "level": f"Level {n % 5 + 1}",
                    "type": subject.title(),
                    "solution": rf"It is $\boxed{{\frac{{{n}}}{{7}}}}$.",
                }
                for n in range(count)
            ]
            schema = dict.fromkeys(("problem", "level", "type", "solution"), TEXT)
            write_parquet(folder / f"{subject}/{split}-00000-of-00001.parquet", schema, rows)
    splits = {subject: {s: f"{subject}/{s}-*" for s in ("train", "test")} for subject in SUBJECTS}
    write_card(folder, splits)
    return folder


# https://huggingface.co/datasets/HuggingFaceH4/MATH-500: test.jsonl, no configurations in the card.
def write_math500(root: Path, count: int = 12) -> Path:
    folder = root / "HuggingFaceH4/MATH-500"
    rows = [
        {
            # Problems of Hendrycks' test split.
            "problem": f"What is {n % 6} in {SUBJECTS[n // 6]} of test?",
            "solution": rf"It is $\boxed{{\frac{{{n % 6}}}{{7}}}}$.",
            "answer": rf"\frac{{{n % 6}}}{{7}}",
            "subject": SUBJECTS[n // 6].title(),
            "level": n % 5 + 1,
            "unique_id": f"test/{SUBJECTS[n // 6]}/{n}.json",
        }
        for n in range(count)
    ]
    write_jsonl(folder / "test.jsonl", rows)
    (folder / "README.md").write_text("# MATH-500\n")
    return folder


# https://huggingface.co/datasets/zwhe99/DeepMath-103K: 103,110 rows, difficulty a float, three long solutions.
DEEPMATH = {"question": TEXT, "final_answer": TEXT, "difficulty": pa.float64(), "topic": TEXT}
DEEPMATH |= dict.fromkeys(("r1_solution_1", "r1_solution_2", "r1_solution_3"), TEXT)


def write_deepmath(root: Path, count: int = 100) -> Path:
    folder = root / "zwhe99/DeepMath-103K"
    rows = [
        {"question": f"What is {n}?", "final_answer": rf"\dfrac{{{n}}}{{7}}", "difficulty": 5.5, "topic": "Algebra"}
        | {f"r1_solution_{k}": "long" for k in (1, 2, 3)}
        for n in range(count)
    ]
    for number in range(2):
        write_parquet(folder / f"data/train-{number:05}-of-00002.parquet", DEEPMATH, rows[number::2])
    write_card(folder, {"default": {"train": "data/train-*"}})
    return folder


# https://huggingface.co/datasets/HuggingFaceH4/aime_2024: one split, called train.
def write_aime24(root: Path, count: int = 30) -> Path:
    folder = root / "HuggingFaceH4/aime_2024"
    schema = {"id": pa.int64()} | dict.fromkeys(("problem", "solution", "answer", "url", "year"), TEXT)
    rows = [
        {"id": 60 + n, "problem": f"{n}?", "solution": "?", "answer": f"{n:03}", "url": "https://", "year": "2024"}
        for n in range(count)
    ]
    write_parquet(folder / "data/train-00000-of-00001.parquet", schema, rows)
    write_card(folder, {"default": {"train": "data/train-*"}})
    return folder


# https://huggingface.co/datasets/math-ai/aime25: test.jsonl, all columns text.
def write_aime25(root: Path, count: int = 30) -> Path:
    folder = root / "math-ai/aime25"
    write_jsonl(folder / "test.jsonl", [{"problem": f"{n}!", "answer": f"{n}", "id": f"{n}"} for n in range(count)])
    (folder / "README.md").write_text("# AIME 2025\n")
    return folder

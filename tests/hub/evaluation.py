"""Repositories of the hub that tasks of lm-eval read: files, columns and types of the real ones, with few rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .repositories import write_aime25, write_card, write_gsm8k, write_jsonl, write_math500

SUBJECTS = 57
"""The number of members of MMLU."""


def write_repositories(root: Path) -> None:
    """Write the data that the tasks of the presets `core` and `paper` read."""
    write_gsm8k(root, train=8, test=3)
    write_math500(root, count=3)
    write_aime25(root, count=3)
    aime = [
        {"ID": f"2024-I-{i}", "Problem": f"Find {i}.", "Solution": f"\\boxed{{{i}}}", "Answer": i} for i in range(3)
    ]
    _write(root / "Maxwell-Jia/AIME_2024/aime_2024_problems.parquet", aime)
    write_jsonl(root / "google/IFEval/ifeval_input_data.jsonl", _instructions())
    endings = ["runs away.", "eats.", "sings.", "sleeps."]
    story = {
        "ind": 1,
        "activity_label": "Sports",
        "ctx_a": "A man jumps.",
        "ctx_b": "he",
        "ctx": "A man jumps. he",
        "endings": endings,
        "source_id": "activitynet~v_1",
        "split": "val",
        "split_type": "indomain",
        "label": "2",
    }
    for split in ("train", "validation", "test"):
        label = "" if split == "test" else "2"
        _write(root / f"Rowan/hellaswag/data/{split}-00000-of-00001.parquet", [story | {"label": label}] * 3)
    science = {
        "id": "Mercury_1",
        "question": "What is ice?",
        "choices": {"text": ["water", "fire", "stone", "air"], "label": ["A", "B", "C", "D"]},
        "answerKey": "A",
    }
    thirds = {split: [science] * 3 for split in ("train", "validation", "test")}
    _configs(root / "allenai/ai2_arc", {"ARC-Challenge": thirds, "ARC-Easy": thirds})
    subject = {"question": "2 + 2?", "subject": "x", "choices": ["1", "2", "4", "8"], "answer": 2}
    member = {"test": [subject] * 3, "validation": [subject], "dev": [subject] * 5}
    _configs(root / "cais/mmlu", dict.fromkeys(_mmlu_subjects(), member))


def _instructions() -> list[dict[str, Any]]:
    """Return prompts whose instructions need the sentence splitter, a language detector, and neither."""
    wanted = [
        ("punctuation:no_comma", {}),
        ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 30}),
        ("language:response_language", {"language": "de"}),
        ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 1}),
    ]
    names = sorted({name for _, arguments in wanted for name in arguments})
    return [
        {
            "key": 1000 + i,
            "prompt": "Write about the sea.",
            "instruction_id_list": [instruction],
            "kwargs": [dict.fromkeys(names) | arguments],
        }
        for i, (instruction, arguments) in enumerate(wanted)
    ]


def _mmlu_subjects() -> list[str]:
    """Return the names of MMLU's members, as lm-eval's own tasks have them."""
    import lm_eval
    import yaml

    folder = Path(lm_eval.__file__).parent / "tasks/mmlu/default"
    subjects = [yaml.safe_load(path.read_text())["dataset_name"] for path in folder.glob("mmlu_*.yaml")]
    assert len(subjects) == SUBJECTS
    return sorted(subjects)


def _configs(repository: Path, configs: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """Write a repository of parquet files whose card lists its configurations."""
    for config, splits in configs.items():
        for split, rows in splits.items():
            _write(repository / config / f"{split}-00000-of-00001.parquet", rows)
    write_card(
        repository, {config: {split: f"{config}/{split}-*" for split in splits} for config, splits in configs.items()}
    )


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as parquet, with the types that they have."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)

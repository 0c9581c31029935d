"""Repositories of the hub that tasks of lm-eval read: files, columns and types of the real ones, with few rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
import yaml

from .repositories import write_aime25, write_configs, write_gsm8k, write_jsonl, write_math500

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
    write_configs(root / "Maxwell-Jia/AIME_2024", {"default": {"train": aime}})
    # The instructions need the sentence splitter, a language detector, and neither.
    wanted: list[tuple[str, dict[str, Any]]] = [
        ("punctuation:no_comma", {}),
        ("length_constraints:number_sentences", {"relation": "less than", "num_sentences": 30}),
        ("language:response_language", {"language": "de"}),
        ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 1}),
    ]
    names = sorted({name for _, arguments in wanted for name in arguments})
    instructions = [
        {
            "key": 1000 + i,
            "prompt": "Write about the sea.",
            "instruction_id_list": [instruction],
            "kwargs": [dict.fromkeys(names) | arguments],
        }
        for i, (instruction, arguments) in enumerate(wanted)
    ]
    write_jsonl(root / "google/IFEval/ifeval_input_data.jsonl", instructions)
    story = {
        "ind": 1,
        "activity_label": "Sports",
        "ctx_a": "A man jumps.",
        "ctx_b": "he",
        "ctx": "A man jumps. he",
        "endings": ["runs away.", "eats.", "sings.", "sleeps."],
        "source_id": "activitynet~v_1",
        "split": "val",
        "split_type": "indomain",
    }
    labels = {"train": "2", "validation": "2", "test": ""}
    stories = {split: [story | {"label": label}] * 3 for split, label in labels.items()}
    write_configs(root / "Rowan/hellaswag", {"default": stories})
    science = {
        "id": "Mercury_1",
        "question": "What is ice?",
        "choices": {"text": ["water", "fire", "stone", "air"], "label": ["A", "B", "C", "D"]},
        "answerKey": "A",
    }
    thirds = {split: [science] * 3 for split in ("train", "validation", "test")}
    write_configs(root / "allenai/ai2_arc", {"ARC-Challenge": thirds, "ARC-Easy": thirds})
    subject = {"question": "2 + 2?", "subject": "x", "choices": ["1", "2", "4", "8"], "answer": 2}
    member = {"test": [subject] * 3, "validation": [subject], "dev": [subject] * 5}
    # The names of MMLU's members are those of lm-eval's own tasks.
    tasks = (Path(lm_eval.__file__).parent / "tasks/mmlu/default").glob("mmlu_*.yaml")
    members = sorted(yaml.safe_load(path.read_text())["dataset_name"] for path in tasks)
    assert len(members) == SUBJECTS
    write_configs(root / "cais/mmlu", dict.fromkeys(members, member))

"""A hub on this machine, which answers the requests of `datasets` to huggingface.co from a folder.

The folder holds repositories `owner/name` with the files, columns and types that the real ones have, a few rows each.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""The commit of every repository."""

SUBJECTS = 57
"""The number of members of MMLU."""


@contextmanager
def serve(root: Path) -> Iterator[str]:
    """Serve the repositories below a folder, and yield the hub's address."""

    class Handler(_Handler):
        repositories = root

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    repositories: Path

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        match parts:
            case ["api", "datasets", owner, name]:
                self._repository(self.repositories / owner / name)
            case ["api", "datasets", owner, name, "revision", _]:
                self._repository(self.repositories / owner / name)
            case ["api", "datasets", owner, name, "tree", _, *folder]:
                self._folder(self.repositories / owner / name, Path(*folder))
            case ["datasets", owner, name, "resolve", _, *file]:
                self._file(self.repositories / owner / name / Path(*file))
            case _:
                self._answer(404)

    do_HEAD = do_GET  # noqa: N815

    def _repository(self, folder: Path) -> None:
        files = [{"rfilename": str(path.relative_to(folder))} for path in sorted(folder.rglob("*")) if path.is_file()]
        self._json({"id": "/".join(folder.parts[-2:]), "sha": COMMIT, "private": False, "tags": [], "siblings": files})

    def _folder(self, repository: Path, folder: Path) -> None:
        if not (repository / folder).is_dir():
            return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        entries = []
        for path in sorted((repository / folder).iterdir()):
            size, oid = (path.stat().st_size, _oid(path)) if path.is_file() else (0, "0" * 40)
            kind = "file" if path.is_file() else "directory"
            entries.append({"type": kind, "path": str(path.relative_to(repository)), "size": size, "oid": oid})
        return self._json(entries)

    def _file(self, path: Path) -> None:
        if not path.is_file():
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self._answer(200, path.read_bytes(), {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": COMMIT})

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


def write_repositories(root: Path) -> None:
    """Write the data that the tasks of the presets `core` and `paper` read."""
    sums = [
        {"question": f"What is {i} + 1?", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"} for i in range(8)
    ]
    _configs(root / "openai/gsm8k", {"main": {"train": sums, "test": sums[:3]}})
    boxed = [
        {
            "problem": f"Compute ${i} + 1$.",
            "solution": f"We get $\\boxed{{{i + 1}}}$.",
            "answer": str(i + 1),
            "subject": "Algebra",
            "level": 1,
            "unique_id": f"test/algebra/{i}.json",
        }
        for i in range(3)
    ]
    _jsonl(root / "HuggingFaceH4/MATH-500/test.jsonl", boxed)
    aime = [
        {"ID": f"2024-I-{i}", "Problem": f"Find {i}.", "Solution": f"\\boxed{{{i}}}", "Answer": i} for i in range(3)
    ]
    _parquet(root / "Maxwell-Jia/AIME_2024/aime_2024_problems.parquet", aime)
    _jsonl(
        root / "math-ai/aime25/test.jsonl",
        [{"problem": f"Find {i}.", "answer": str(i), "id": str(i)} for i in range(3)],
    )
    _jsonl(root / "google/IFEval/ifeval_input_data.jsonl", _instructions())
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
        _parquet(root / f"Rowan/hellaswag/data/{split}-00000-of-00001.parquet", [story | {"label": label}] * 3)
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
    card = ["---", "configs:"]
    for config, splits in configs.items():
        card += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
            _parquet(repository / config / f"{split}-00000-of-00001.parquet", rows)
    (repository / "README.md").write_text("\n".join([*card, "---", ""]))


def _parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

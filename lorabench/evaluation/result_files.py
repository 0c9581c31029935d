"""The scores of an evaluation in the files that lm-eval itself writes, which leaderboards and its tools read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorabench.config.fields import SamplerName
from lorabench.config.inputs import GgufModel, HubModel, ModelSpec, PathModel
from lorabench.utils.files import atomic_path

if TYPE_CHECKING:
    from lm_eval.loggers.evaluation_tracker import GeneralConfigTracker


def model_arguments(source: ModelSpec, adapter: str | None) -> dict[str, str]:
    """Return the arguments by which lm-eval's own command would load a model, with the folder of its adapter."""
    match source:
        case HubModel():
            arguments = {"pretrained": source.id, "revision": str(source.revision)}
        case PathModel() | GgufModel():
            arguments = {"pretrained": source.path}
        case _:
            arguments = {"pretrained": source.name}
    return arguments | ({"peft": adapter} if adapter else {})


def result_file(
    results: Mapping[str, Any],
    tracker: GeneralConfigTracker,
    sampler: SamplerName,
    arguments: Mapping[str, str],
    chat_template: str | None,
) -> dict[str, Any]:
    """Return what lm-eval writes of a call of `simple_evaluate`, without the samples.

    The tracker is lm-eval's clock, which was started before the call; `arguments` are those of `model_arguments`.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.utils import hash_string

    multiturn = signature(simple_evaluate).parameters["fewshot_as_multiturn"].default
    source = "vllm" if sampler == "vllm" else "hf"
    as_text = ",".join(f"{name}={value}" for name, value in arguments.items())
    tracker.log_experiment_args(source, as_text, None, chat_template, multiturn)
    tracker.log_end_time()
    hashes = {}
    for task, logged in results["samples"].items():
        parts = (sample[f"{name}_hash"] for sample in logged for name in ("doc", "prompt", "target"))
        hashes[task] = hash_string("".join(parts))
    return {
        **{name: value for name, value in results.items() if name != "samples"},
        "config": results["config"] | {"model": source, "model_args": as_text},
        "task_hashes": hashes,
        **asdict(tracker),
    }


def write_result_files(files: list[dict[str, Any]], folder: Path) -> None:
    """Write the files of an evaluation into their folder, in the place of those of an earlier one."""
    from lm_eval.utils import handle_non_serializable

    shutil.rmtree(folder, ignore_errors=True)
    for content in files:
        text = json.dumps(content, indent=2, default=handle_non_serializable, ensure_ascii=False)
        with atomic_path(folder / f"results_{datetime.now().isoformat().replace(':', '-')}.json") as unfinished:
            unfinished.write_text(text, encoding="utf-8")

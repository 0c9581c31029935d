"""One evaluation: a model is loaded once, lm-eval runs the preset's tasks on it, scores and samples become tables."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lorabench.config import Evaluation, ModelSpec, PathModel
from lorabench.data.tokens import template_key
from lorabench.errors import UserError
from lorabench.evaluation import catalog
from lorabench.evaluation.catalog import Loaded
from lorabench.layout import Layout
from lorabench.models.base import load_model, load_tokenizer, max_length, package_versions, weights_sha256
from lorabench.plan import EvalJob, Plan
from lorabench.records import RunFolder
from lorabench.tables import EVALS, best_lr, write_table
from lorabench.training.sweep import this_machine

if TYPE_CHECKING:
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

SAMPLES = pa.schema(
    [
        ("task", pa.string()),
        ("doc_id", pa.int64()),
        ("filter", pa.string()),
        ("target", pa.string()),
        ("response", pa.string()),
        ("filtered", pa.string()),
        ("metrics", pa.string()),
    ]
)
"""What the model answered, raw and as a filter has it. Answers of other than one text are JSON."""

# Resamples for the standard errors that have no formula.
_BOOTSTRAP = 1_000
_SEED = 0

_ARM = (
    *("dataset", "method", "rank", "placement", "alpha", "init_a", "lr_ratio"),
    *("eps", "lr", "batch_size", "steps", "seed"),
)


def evaluate_job(plan: Plan, job: EvalJob, layout: Layout) -> None:
    """Evaluate a base, or the best run of a sweep, and write scores and samples.

    A sweep whose runs all diverged has nothing to evaluate: its tables have no rows.

    Raises:
        UserError: a task is not known or draws more than the model takes, its data or the run's weights are not there,
            or the run is of another base.
    """
    evaluation = plan.preset.evaluation
    assert evaluation
    rows: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    record = best_record(job, layout) if job.sweep else None
    if record is not None or job.sweep is None:
        # What may be wrong is found before anything is computed, the cheapest first.
        spec = layout.model(job.model)
        if record is not None:
            check_run(record, job.model, spec, layout)
        tokenizer = load_tokenizer(spec)
        index = catalog.manager(evaluation.tasks)
        loaded = [catalog.load(index, task, layout) for task in evaluation.tasks]
        catalog.check_settings(loaded, job.model, max_length(spec))
        machine = this_machine(plan)
        model = load(spec, record, layout).to(machine.device)
        lm = harness(model, tokenizer, evaluation.batch_size, machine.autocast(plan.preset.protocol))
        scores, samples = run_tasks(lm, index, loaded, evaluation)
        rows = [{"model": job.model, **_run_columns(record)} | row for row in scores]
    write_table(pa.Table.from_pylist(samples, schema=SAMPLES), layout.samples(job))
    write_table(pa.Table.from_pylist(rows, schema=EVALS), layout.evals(job))


def best_record(job: EvalJob, layout: Layout) -> dict[str, Any] | None:
    """Record of the run that is evaluated: the first seed at the best LR; None if all runs diverged.

    Raises:
        UserError: a run of the grid is not done.
    """
    assert job.sweep
    records = []
    for run in job.sweep.grid():
        folder = RunFolder(layout.runs, run.run_id)
        if not folder.done():
            raise UserError(f"run {run.run_id} of sweep {job.sweep.sweep_id} is not done; train the sweep first")
        if run.seed == 0:
            records.append(folder.read_record())
    best = best_lr(records)
    return next((record for record in records if record["spec"]["lr"] == best), None)


def check_run(record: dict[str, Any], model: str, spec: ModelSpec, layout: Layout) -> None:
    """Refuse a run that can't be evaluated.

    Raises:
        UserError: the weights are not there, or were trained from other weights of the base.
    """
    run_id = record["run_id"]
    trained_from, base = record["environment"]["model_sha256"], weights_sha256(spec)
    if trained_from != base:
        raise UserError(
            f"run {run_id} was trained from a base with weights {_hashes(trained_from)}; "
            f"model {model!r} has {_hashes(base)}"
        )
    # PEFT would go on to a pickled file.
    file = "config.json" if record["spec"]["method"] == "fullft" else "adapter_model.safetensors"
    path = RunFolder(layout.runs, run_id).weights / file
    if not path.is_file():
        raise UserError(f"weights of run {run_id} are not there: no {path}")


def _hashes(weights: dict[str, str]) -> str:
    return ", ".join(f"{name} {value[:12]}" for name, value in weights.items())


def load(spec: ModelSpec, record: dict[str, Any] | None, layout: Layout) -> torch.nn.Module:
    """The base, with a run's adapter on it, or the model of a full fine-tuning."""
    model: torch.nn.Module
    if record is None:
        model = load_model(spec)
        return model
    weights, outcome = RunFolder(layout.runs, record["run_id"]).weights, record["outcome"]
    if record["spec"]["method"] == "fullft":
        size = {"parameters": outcome["base_params"], "hidden_size": outcome["hidden_size"]}
        model = load_model(PathModel(kind="path", path=str(weights), **size))
        return model
    from peft import PeftModel

    # Not merged: where the unembedding is the embedding, its update would change both.
    model = PeftModel.from_pretrained(load_model(spec), weights)
    return model


def harness(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int, autocast: torch.dtype | None
) -> HFLM:
    """lm-eval's view of a model that is loaded already."""
    import logging

    import torch
    from lm_eval.models.huggingface import HFLM

    # It warns that the model is not given by name, which is meant.
    logging.getLogger("lm_eval.models.huggingface").addFilter(lambda record: "`pretrained`" not in record.msg)
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        mixed_precision_dtype=autocast,
        softmax_dtype=torch.float32,
    )


def run_tasks(
    lm: HFLM, index: TaskManager, loaded: Iterable[Loaded], evaluation: Evaluation
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Scores as rows of `evals` without the columns of the model, and samples; one call of lm-eval per setting."""
    import logging

    from langdetect import DetectorFactory
    from lm_eval import evaluator

    # IFEval asks it for the language of an answer, and without a seed it guesses anew each time.
    DetectorFactory.seed = _SEED
    # It warns of each task whose examples are as many as the preset says.
    logging.getLogger("lm_eval.evaluator").addFilter(lambda record: "num_fewshot" not in record.msg)
    # With every call it would ask pip, compilers and drivers for versions, for seconds; those that count are kept here.
    evaluator.add_env_info = lambda results: None
    # Standard errors without a pool of processes, which would take every core.
    os.environ["DISABLE_MULTIPROC"] = "1"
    template = template_key(lm.tokenizer) if lm.tokenizer.chat_template else None
    settings: dict[tuple[bool, int | None, int | None, int | None], list[Loaded]] = {}
    for one in loaded:
        chat = one.task.chat and template is not None
        key = (chat, one.task.num_fewshot, one.task.limit, one.task.max_new_tokens)
        settings.setdefault(key, []).append(one)
    rows: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    versions = json.dumps(_versions(), sort_keys=True)
    for (chat, num_fewshot, limit, max_new_tokens), together in settings.items():
        results = evaluator.simple_evaluate(
            lm,
            tasks=[item for one in together for item in one.items],
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat,
            gen_kwargs={"max_gen_toks": max_new_tokens} if max_new_tokens else None,
            # It would index all its tasks anew.
            task_manager=index,
            bootstrap_iters=_BOOTSTRAP,
            random_seed=_SEED,
            numpy_random_seed=_SEED,
            torch_random_seed=_SEED,
            fewshot_random_seed=_SEED,
        )
        assert results
        common = {"eval_batch_size": evaluation.batch_size, "versions": versions}
        # Null where prompts are used as they are.
        common["template_sha256"] = template if chat else None
        for one in together:
            rows += [common | row for row in _rows(results, one)]
            samples += [row for name in one.leaves for row in _samples(name, results["samples"][name])]
    return rows, samples


def _rows(results: Any, one: Loaded) -> list[dict[str, Any]]:
    """One row per metric and filter: of the task, or of a group's mean; of a group without one, of each member."""
    whole = [one.task.name] if _metrics(results["results"].get(one.task.name, {})) else list(one.leaves)
    rows = []
    for name in whole:
        scores = results["results"][name]
        leaves = [name] if name in one.leaves else list(one.leaves)
        revisions = {leaf: catalog.data_revision(one.leaves[leaf]) for leaf in leaves}
        config = {leaf: results["configs"][leaf] | {"data_revision": revisions[leaf]} for leaf in leaves}
        for metric, filter_name in _metrics(scores):
            rows.append(
                {
                    "about": one.task.about,
                    "task": name,
                    "source": one.task.source,
                    "metric": metric,
                    "filter": filter_name,
                    "value": _number(scores[f"{metric},{filter_name}"]),
                    "stderr": _number(scores.get(f"{metric}_stderr,{filter_name}")),
                    "higher_is_better": _agreed(results["higher_is_better"][leaf].get(metric) for leaf in leaves),
                    "n_samples": sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
                    "num_fewshot": _agreed(results["n-shot"][leaf] for leaf in leaves),
                    "task_version": _text(results["versions"].get(name)),
                    "task_config": json.dumps(config.get(name, config), default=str, sort_keys=True),
                }
            )
    return rows


def _agreed(values: Iterable[Any]) -> Any:
    """What all members of a group have; None where they differ. lm-eval says it of members alone."""
    found = set(values)
    return found.pop() if len(found) == 1 else None


def _metrics(scores: dict[str, Any]) -> list[tuple[str, str]]:
    """Metrics and filters of a task's results, whose keys are `metric,filter`."""
    pairs = [tuple(key.split(",", 1)) for key in scores if "," in key]
    return [(metric, name) for metric, name in pairs if not metric.endswith("_stderr")]


def _samples(task: str, logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "task": task,
            "doc_id": sample["doc_id"],
            "filter": sample["filter"],
            "target": _text(sample["target"]),
            "response": _answer(sample["resps"]),
            "filtered": _answer(sample["filtered_resps"]),
            "metrics": json.dumps({name: sample[name] for name in sample["metrics"]}, default=_plain),
        }
        for sample in logged
    ]


def _answer(responses: list[Any]) -> str:
    """The text of the one response there is, else all as JSON."""
    while isinstance(responses, list) and len(responses) == 1:
        responses = responses[0]
    return _text(responses) or ""


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    """Numbers of numpy as Python's."""
    return value.item() if hasattr(value, "item") else str(value)


def _number(value: Any) -> float | None:
    """A number; None for what lm-eval has not (`N/A`) or could not compute."""
    if isinstance(value, str) or value is None:
        return None
    return float(value) if math.isfinite(value) else None


def _run_columns(record: dict[str, Any] | None) -> dict[str, Any]:
    if record is None:
        return {}
    outcome = record["outcome"]
    return {
        "run_id": record["run_id"],
        **{name: record["spec"].get(name) for name in _ARM},
        "final_test_nll": outcome.get("final_test_nll"),
        "final_reward": outcome.get("final_reward"),
    }


def _versions() -> dict[str, str]:
    return package_versions() | {name: version(name) for name in ("lm_eval", "datasets")}

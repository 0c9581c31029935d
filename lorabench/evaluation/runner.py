"""One evaluation: load a model, run the preset's tasks on it by lm-eval, and write scores and samples as tables."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lorabench.config.execution import Evaluation
from lorabench.config.fields import SamplerName
from lorabench.data.tokens import template_key
from lorabench.evaluation import catalog
from lorabench.evaluation.catalog import LoadedTask
from lorabench.evaluation.models import (
    best_record,
    check_run,
    lm_eval_model,
    load_evaluated_model,
    vllm_lm_eval_model,
)
from lorabench.models.base import load_tokenizer, max_length, package_versions
from lorabench.models.vllm_support import check_vllm, vllm_version
from lorabench.planning.plan import Plan
from lorabench.runs import EvalJob
from lorabench.store.io import write_table
from lorabench.store.layout import Layout
from lorabench.store.schemas import EVALS
from lorabench.training.run import machine_of

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

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
"""The table of a model's answers, raw and after a filter. An answer that is not a single text is JSON."""

# The number of bootstrap samples for standard errors that have no formula.
_BOOTSTRAP = 1_000
_SEED = 0

_ARM = (
    *("dataset", "method", "rank", "placement", "alpha", "init_a", "lr_ratio"),
    *("eps", "lr", "batch_size", "steps", "seed"),
)


def evaluate_job(plan: Plan, job: EvalJob, layout: Layout) -> None:
    """Evaluate a base, or the best run of a sweep, and write its scores and samples.

    If all runs of a sweep diverged there is no model to evaluate, and both tables have no rows.

    Raises:
        UserError: a task is not known or generates more tokens than the model takes, its data or the run's weights are
            missing, the run was trained from another base, or vLLM is to be used and cannot compute the model here.
    """
    evaluation = plan.preset.evaluation
    assert evaluation
    rows: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    record = best_record(job, layout) if job.sweep else None
    if record is not None or job.sweep is None:
        # All checks come before any computation, the cheapest first.
        spec = layout.model(job.model)
        if record is not None:
            check_run(record, job.model, spec, layout)
        machine = machine_of(plan)
        if plan.preset.execution.sampler == "vllm":
            check_vllm(spec, machine.device, None if record is None else record["spec"]["placement"])
        tokenizer = load_tokenizer(spec)
        index = catalog.task_index(evaluation.tasks)
        loaded = [catalog.load_task(index, task, layout) for task in evaluation.tasks]
        catalog.check_settings(loaded, job.model, max_length(spec))
        autocast = machine.autocast(plan.preset.protocol)
        lm: TemplateLM
        if plan.preset.execution.sampler == "vllm":
            lm = vllm_lm_eval_model(spec, record, layout, evaluation.batch_size, autocast, machine.device)
        else:
            model = load_evaluated_model(spec, record, layout).to(machine.device)
            lm = lm_eval_model(model, tokenizer, evaluation.batch_size, autocast)
        scores, samples = run_tasks(lm, index, loaded, evaluation, plan.preset.execution.sampler)
        about: dict[str, Any] = {"model": job.model}
        if record is not None:
            about |= {"run_id": record["run_id"], **{name: record["spec"].get(name) for name in _ARM}}
            about |= {name: record["outcome"].get(name) for name in ("final_test_nll", "final_reward")}
        rows = [about | row for row in scores]
    write_table(pa.Table.from_pylist(samples, schema=SAMPLES), layout.samples(job))
    write_table(pa.Table.from_pylist(rows, schema=EVALS), layout.evals(job))


def run_tasks(
    lm: TemplateLM,
    index: TaskManager,
    loaded: Iterable[LoadedTask],
    evaluation: Evaluation,
    sampler: SamplerName,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run tasks on a model, with one call of lm-eval for all tasks of the same settings.

    Returns:
        The scores, as rows of the table `evals` without the columns of the model, and the samples, as rows of SAMPLES.
    """
    import logging

    from langdetect import DetectorFactory
    from lm_eval import evaluator

    # IFEval asks langdetect for the language of an answer; without a seed its guess varies from call to call.
    DetectorFactory.seed = _SEED
    # lm-eval warns of each task whose number of few-shot examples the preset sets, which is intended.
    logging.getLogger("lm_eval.evaluator").addFilter(lambda record: "num_fewshot" not in record.msg)
    # Every call would ask pip, compilers and drivers for versions, for seconds; the column `versions` records enough.
    evaluator.add_env_info = lambda results: None
    # Standard errors are computed without a pool of processes, which would take every core.
    os.environ["DISABLE_MULTIPROC"] = "1"
    template = template_key(lm.tokenizer) if lm.tokenizer.chat_template else None
    settings: dict[tuple[bool, int | None, int | None, int | None], list[LoadedTask]] = {}
    for loaded_task in loaded:
        task = loaded_task.task
        key = (task.chat and template is not None, task.num_fewshot, task.limit, task.max_new_tokens)
        settings.setdefault(key, []).append(loaded_task)
    rows: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    versions = package_versions() | {name: version(name) for name in ("lm_eval", "datasets")}
    versions |= {"vllm": vllm_version()} if sampler == "vllm" else {}
    for (chat, num_fewshot, limit, max_new_tokens), together in settings.items():
        results = evaluator.simple_evaluate(
            lm,
            tasks=[item for loaded_task in together for item in loaded_task.items],
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat,
            gen_kwargs={"max_gen_toks": max_new_tokens} if max_new_tokens else None,
            # Without it, lm-eval would index all its tasks again.
            task_manager=index,
            bootstrap_iters=_BOOTSTRAP,
            random_seed=_SEED,
            numpy_random_seed=_SEED,
            torch_random_seed=_SEED,
            fewshot_random_seed=_SEED,
        )
        assert results
        common: dict[str, Any] = {"sampler": sampler, "eval_batch_size": evaluation.batch_size}
        common["versions"] = json.dumps(versions, sort_keys=True)
        # Null where prompts are used without a chat template.
        common["template_sha256"] = template if chat else None
        for loaded_task in together:
            rows += [common | row for row in _rows(results, loaded_task)]
            samples += [row for name in loaded_task.leaves for row in _samples(name, results["samples"][name])]
    return rows, samples


def _rows(results: Any, loaded: LoadedTask) -> list[dict[str, Any]]:
    """Return a row per metric and filter of a task; for a group the rows are of its mean, or else of each member."""
    task, members = loaded.task, loaded.leaves
    names = [task.name] if _metrics(results["results"].get(task.name, {})) else list(members)
    rows = []
    for name in names:
        scores = results["results"][name]
        leaves = [name] if name in members else list(members)
        revisions = {leaf: catalog.data_revision(members[leaf]) for leaf in leaves}
        config = {leaf: results["configs"][leaf] | {"data_revision": revisions[leaf]} for leaf in leaves}
        for metric, filter_name in _metrics(scores):
            rows.append(
                {
                    "about": task.about,
                    "task": name,
                    "source": task.source,
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
    """Return the value that all members of a group share, or None where they differ."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def _metrics(scores: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the metrics and filters of a task's results, whose keys are `metric,filter`."""
    pairs = [tuple(key.split(",", 1)) for key in scores if "," in key]
    return [(metric, name) for metric, name in pairs if not metric.endswith("_stderr")]


def _samples(task: str, logged: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def answer(responses: Any) -> str:
        """Return the text of a single response, or several responses as JSON."""
        while isinstance(responses, list) and len(responses) == 1:
            responses = responses[0]
        return _text(responses) or ""

    return [
        {
            "task": task,
            "doc_id": sample["doc_id"],
            "filter": sample["filter"],
            "target": _text(sample["target"]),
            "response": answer(sample["resps"]),
            "filtered": answer(sample["filtered_resps"]),
            "metrics": json.dumps({name: sample[name] for name in sample["metrics"]}, default=_plain),
        }
        for sample in logged
    ]


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    """Convert a number of numpy to Python, and any other object to text, for JSON."""
    return value.item() if hasattr(value, "item") else str(value)


def _number(value: Any) -> float | None:
    """Return a number, or None for a value that lm-eval lacks (`N/A`) or could not compute."""
    if isinstance(value, str) or value is None:
        return None
    return float(value) if math.isfinite(value) else None

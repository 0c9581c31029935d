"""One evaluation: load a base or the best run of a sweep, run the preset's tasks on it by lm-eval, and write tables."""

from __future__ import annotations

import atexit
import importlib.metadata
import json
import logging
import math
import os
import shutil
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from lorabench.config.execution import Evaluation
from lorabench.config.fields import SamplerName
from lorabench.config.inputs import ModelSpec, PathModel
from lorabench.data.identity import id_of_test
from lorabench.data.tokens import template_key
from lorabench.errors import UserError
from lorabench.evaluation import catalog
from lorabench.evaluation.catalog import LoadedTask
from lorabench.models.base import load_model, load_tokenizer, max_length, model_folder, package_versions, weights_sha256
from lorabench.models.vllm_support import cache_bytes, check_vllm, max_lora_rank, vllm_environment, vllm_version
from lorabench.planning.memory import EngineBatch
from lorabench.planning.plan import Plan
from lorabench.runs import EvalJob, Run, best_lr, finished_losses, validation_loss
from lorabench.store.io import write_table
from lorabench.store.layout import Layout
from lorabench.store.run_folder import RunFolder
from lorabench.store.schemas import EVALS
from lorabench.training.run import machine_of

if TYPE_CHECKING:
    import torch
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

SAMPLES = pa.schema(
    [("task", pa.string()), ("doc_id", pa.int64())]
    + [(name, pa.string()) for name in ("filter", "target", "response", "filtered", "metrics")]
)
"""The table of a model's answers, raw and after a filter. An answer that is not a single text is JSON."""

# The number of bootstrap samples for standard errors that have no formula.
_BOOTSTRAP = 1_000
_SEED = 0
# The least bytes of keys and values of vLLM on a CPU.
_CACHE_ON_CPU = 1 << 30

_ARM = (
    *("dataset", "method", "rank", "placement", "alpha", "init_a", "lr_ratio"),
    *("eps", "lr", "batch_size", "steps", "seed"),
)


def evaluate_job(plan: Plan, job: EvalJob, layout: Layout) -> None:
    """Evaluate a base, or the best run of a sweep, and write its scores and samples.

    If all runs of a sweep diverged there is no model to evaluate, and both tables have no rows. UserError says that a
    task is not known or draws more tokens than the model takes, its data or the run's weights are missing, the run was
    trained from another base, or vLLM is to be used and cannot compute the model here.
    """
    evaluation, sampler = plan.preset.evaluation, plan.preset.execution.sampler
    assert evaluation
    rows: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    # All checks come before any computation, the cheapest first.
    record = best_record(job, layout) if job.sweep else None
    if record is not None or job.sweep is None:
        spec, machine = layout.model(job.model), machine_of(plan)
        if sampler == "vllm":
            check_vllm(spec, placement=None if record is None else record["spec"]["placement"])
        tokenizer = load_tokenizer(spec)
        index = catalog.task_index(evaluation.tasks)
        loaded = [catalog.load_task(index, task, layout) for task in evaluation.tasks]
        catalog.check_lengths(loaded, job.model, max_length(spec))
        evaluated_model = vllm_model if sampler == "vllm" else transformers_model
        settings = evaluation.batch_size, machine.autocast, machine.device
        lm = evaluated_model(spec, record, layout, tokenizer, *settings)
        scores, samples = run_tasks(lm, index, loaded, evaluation, sampler)
        about: dict[str, Any] = {"model": job.model}
        if record is not None:
            about |= {"run_id": record["run_id"], **{name: record["spec"].get(name) for name in _ARM}}
            about |= {name: record["outcome"].get(name) for name in ("final_test_nll", "final_reward")}
        sources, first_seed = layout.preset.sources, layout.preset.first_seed
        data = {name: id_of_test(spec, first_seed) for name, spec in sources.items()}
        rows = [about | row | {"test_data": data.get(row["source"])} for row in scores]
    write_table(pa.Table.from_pylist(samples, schema=SAMPLES), layout.samples(job))
    write_table(pa.Table.from_pylist(rows, schema=EVALS), layout.evals(job))


def best_record(job: EvalJob, layout: Layout) -> dict[str, Any] | None:
    """Return the record of the run to evaluate: the first seed at the best LR; None if all runs diverged.

    UserError says that a run of the sweep is not done, or the run's weights are missing, damaged or of another base.
    """
    assert job.sweep
    sweep = job.sweep

    def read(run: Run) -> dict[str, Any]:
        folder = RunFolder(layout.runs, run.run_id)
        if not folder.done():
            raise UserError(f"run {run.run_id} of sweep {sweep.sweep_id} is not done; train the sweep first")
        return folder.read_record()

    best = best_lr(sweep, finished_losses(sweep, lambda run: validation_loss(read(run))))
    if best is None:
        return None
    record = read(Run(sweep.condition, best, sweep.seeds.first))
    run_id = record["run_id"]
    trained_from, base = record["environment"]["model_sha256"], weights_sha256(layout.model(job.model))
    if trained_from != base:
        raise UserError(f"run {run_id} was trained from the weights {trained_from}; model {job.model!r} has {base}")
    # If this file is missing, PEFT would look for a pickled file.
    file = "config.json" if record["spec"]["method"] == "fullft" else "adapter_model.safetensors"
    folder = RunFolder(layout.runs, run_id)
    path = folder.weights / file
    if not path.is_file():
        raise UserError(f"weights of run {run_id} are missing: {path} does not exist")
    folder.check_files(folder.weights)
    return record


def _trained_model(spec: ModelSpec, record: dict[str, Any] | None, layout: Layout) -> tuple[ModelSpec, str | None]:
    """Return the model to load and the folder of the adapter to put on it: of a base (no record), or of a run."""
    if record is None:
        return spec, None
    folder, outcome = str(RunFolder(layout.runs, record["run_id"]).weights), record["outcome"]
    if record["spec"]["method"] != "fullft":
        return spec, folder
    # The folder of a full fine-tuning has no tokenizer.
    size = {"parameters": outcome["base_params"], "hidden_size": outcome["hidden_size"]}
    return PathModel(kind="path", path=folder, **size), None


def transformers_model(
    spec: ModelSpec,
    record: dict[str, Any] | None,
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    autocast: torch.dtype | None,
    device: torch.device,
) -> HFLM:
    """Load a base (no record), or a run's model, and wrap it for lm-eval."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from peft import PeftModel

    from lorabench.models.lora import round_to_nf4, tie_beneath

    source, adapter = _trained_model(spec, record, layout)
    model: Any = load_model(source)
    if adapter is not None:
        if record is not None and record["spec"]["method"] == "qlora":
            round_to_nf4(model)
        # Not merged: where the unembedding is the embedding, its update would change both.
        model = PeftModel.from_pretrained(model, adapter)
    model.to(device)
    if adapter is not None:
        # lm-eval ties the weights of a model that it is given.
        tie_beneath(model)
    # lm-eval warns that the model is not given by name, which is intended.
    logging.getLogger("lm_eval.models.huggingface").addFilter(lambda record: "`pretrained`" not in record.msg)
    types = {"mixed_precision_dtype": autocast, "softmax_dtype": torch.float32}
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, **types)


def vllm_model(
    spec: ModelSpec,
    record: dict[str, Any] | None,
    layout: Layout,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    autocast: torch.dtype | None,
    device: torch.device,
) -> TemplateLM:
    """Start lm-eval's own model `vllm` with what `transformers_model` loads; it computes in the autocast type."""
    import torch

    model, adapter = _trained_model(spec, record, layout)
    lora = {}
    if record is not None and adapter is not None:
        lora = {"lora_local_path": adapter, "max_lora_rank": max_lora_rank(record["spec"]["rank"]), "max_loras": 1}
    on_cpu, longest, dtype = device.type == "cpu", max_length(model), autocast or torch.float32
    caches = Path(tempfile.mkdtemp(prefix="lorabench-vllm-"))
    atexit.register(shutil.rmtree, caches, ignore_errors=True)
    for name, value in vllm_environment(on_cpu, caches).items():
        os.environ.setdefault(name, value)
    # lm-eval asks for the version of the distribution `vllm`; the one for CPUs has another name.
    importlib.metadata.version = lambda distribution_name: (
        vllm_version() if distribution_name == "vllm" else version(distribution_name)
    )
    try:
        from lm_eval.models.vllm_causallms import VLLM
    finally:
        importlib.metadata.version = version

    lm = VLLM(
        str(model_folder(model)),
        dtype=str(dtype).removeprefix("torch."),
        tokenizer=str(model_folder(spec)),
        trust_remote_code=getattr(spec, "trust_remote_code", False),
        seed=0,
        # The engine gets all requests at once. With `auto`, vLLM would divide by the time that a bar of tqdm shows.
        batch_size=sys.maxsize,
        max_model_len=longest,
        # On a GPU sequences do not wait for the longest of a batch, and vLLM takes the memory that is free.
        max_num_seqs=batch_size if on_cpu else max(batch_size, EngineBatch().responses),
        max_num_batched_tokens=None if on_cpu else EngineBatch().tokens,
        kv_cache_memory_bytes=max(_CACHE_ON_CPU, cache_bytes(model, dtype, longest)) if on_cpu else None,
        enforce_eager=on_cpu,
        **lora,
    )
    if lora:
        lm.model.apply_model(_adapt_all_logits)
    # The preset may give a model the template that its folder lacks.
    lm.tokenizer = tokenizer
    lm.hf_chat_template = tokenizer.chat_template
    return lm


def _adapt_all_logits(model: torch.nn.Module) -> None:
    """Make the only adapter of an engine apply to the unembedding wherever logits are computed.

    vLLM applies it to the logits of drawn tokens alone: those of prompts lack it on a GPU, and are refused on a CPU
    (https://github.com/vllm-project/vllm/issues/51594).
    """
    from vllm.lora.layers import LogitsProcessorWithLoRA

    def add(logits: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        return logits.add_((x @ a[0, 0].T) @ b[0, 0].T, alpha=scale)

    for module in model.modules():
        if isinstance(module, LogitsProcessorWithLoRA):
            module.punica_wrapper.add_lora_logits = add


def run_tasks(
    lm: TemplateLM, index: TaskManager, loaded: Iterable[LoadedTask], evaluation: Evaluation, sampler: SamplerName
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Run tasks on a model, with one call of lm-eval for all tasks of the same settings.

    Returned are scores, as rows of the table `evals` without the model's columns, and samples, as rows of SAMPLES.
    """
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
    settings: dict[tuple[bool, int | None, int | None, int | None], list[LoadedTask]] = defaultdict(list)
    for loaded_task in loaded:
        task = loaded_task.task
        setting = task.chat and template is not None, task.num_fewshot, task.limit, task.max_new_tokens
        settings[setting].append(loaded_task)
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
            **dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), _SEED),
        )
        assert results
        common: dict[str, Any] = {"sampler": sampler, "eval_batch_size": evaluation.batch_size}
        # The template is null where prompts are used without one.
        common |= {"versions": json.dumps(versions, sort_keys=True), "template_sha256": template if chat else None}
        for loaded_task in together:
            rows += [common | row for row in _rows(results, loaded_task)]
            samples += [_sample(name, logged) for name in loaded_task.leaves for logged in results["samples"][name]]
    return rows, samples


def _rows(results: Any, loaded: LoadedTask) -> list[dict[str, Any]]:
    """Return a row per metric and filter of a task; for a group the rows are of its mean, or else of each member."""

    def metrics(name: str) -> list[list[str]]:
        """Return the metrics and filters of a task's results, whose keys are `metric,filter`."""
        pairs = [key.split(",", 1) for key in results["results"].get(name, {}) if "," in key]
        return [pair for pair in pairs if not pair[0].endswith("_stderr")]

    def agreed(values: Iterable[Any]) -> Any:
        """Return the value that all members of a group share, or None where they differ."""
        distinct = set(values)
        return distinct.pop() if len(distinct) == 1 else None

    def number(value: Any) -> float | None:
        """Return a number, or None for a value that lm-eval lacks (`N/A`) or could not compute."""
        return None if isinstance(value, str) or value is None or not math.isfinite(value) else float(value)

    task, members = loaded.task, loaded.leaves
    rows = []
    for name in [task.name] if metrics(task.name) else list(members):
        scores, leaves = results["results"][name], [name] if name in members else list(members)
        config = {
            leaf: results["configs"][leaf] | {"data_revision": catalog.data_revision(members[leaf])} for leaf in leaves
        }
        rows += [
            {
                "about": task.about,
                "task": name,
                "source": task.source,
                "metric": metric,
                "filter": filter_name,
                "value": number(scores[f"{metric},{filter_name}"]),
                "stderr": number(scores.get(f"{metric}_stderr,{filter_name}")),
                "higher_is_better": agreed(results["higher_is_better"][leaf].get(metric) for leaf in leaves),
                "n_samples": sum(results["n-samples"][leaf]["effective"] for leaf in leaves),
                "num_fewshot": agreed(results["n-shot"][leaf] for leaf in leaves),
                "task_version": _text(results["versions"].get(name)),
                "task_config": json.dumps(config.get(name, config), default=str, sort_keys=True),
            }
            for metric, filter_name in metrics(name)
        ]
    return rows


def _sample(task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of SAMPLES for an answer as lm-eval logs it; several responses become JSON."""
    row = {"task": task, "doc_id": sample["doc_id"], "filter": sample["filter"], "target": _text(sample["target"])}
    for name, responses in (("response", sample["resps"]), ("filtered", sample["filtered_resps"])):
        while isinstance(responses, list) and len(responses) == 1:
            responses = responses[0]
        row[name] = _text(responses) or ""
    return row | {"metrics": _text({name: sample[name] for name in sample["metrics"]})}


def _text(value: Any) -> str | None:
    """Return a text or None as it is, and all else as JSON, with numbers of numpy as those of Python."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, default=lambda other: other.item() if hasattr(other, "item") else str(other))

"""What is evaluated, the best run of a sweep or a base, as a model of lm-eval by transformers or by vLLM."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from lorabench.config.inputs import ModelSpec, PathModel
from lorabench.errors import UserError
from lorabench.models.base import load_model, load_tokenizer, max_length, model_folder, weights_sha256
from lorabench.models.vllm_support import cache_bytes, max_lora_rank, set_vllm_environment, vllm_version
from lorabench.runs import EvalJob, Run, best_lr, finished_losses, validation_loss
from lorabench.store.layout import Layout
from lorabench.store.run_folder import RunFolder

if TYPE_CHECKING:
    import torch
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerBase

# The least number of sequences that vLLM answers at once on a GPU, and the least bytes of keys and values on a CPU.
_SEQUENCES_ON_GPU, _CACHE_ON_CPU = 256, 1 << 30


def best_record(job: EvalJob, layout: Layout) -> dict[str, Any] | None:
    """Return the record of the run to evaluate: the first seed at the best LR; None if all runs diverged.

    Raises:
        UserError: a run of the sweep is not done.
    """
    assert job.sweep
    sweep = job.sweep

    def folder(run: Run) -> RunFolder:
        return RunFolder(layout.runs, run.run_id)

    def loss_of(run: Run) -> float:
        if not folder(run).done():
            raise UserError(f"run {run.run_id} of sweep {sweep.sweep_id} is not done; train the sweep first")
        return validation_loss(folder(run).read_record())

    best = best_lr(sweep, finished_losses(sweep, loss_of))
    return None if best is None else folder(Run(sweep.condition, best, 0)).read_record()


def check_run(record: dict[str, Any], model: str, spec: ModelSpec, layout: Layout) -> None:
    """Refuse a run that cannot be evaluated.

    Raises:
        UserError: the run's weights are missing, or were trained from other weights of the base.
    """
    run_id = record["run_id"]
    trained_from, base = record["environment"]["model_sha256"], weights_sha256(spec)
    if trained_from != base:
        first, second = (
            ", ".join(f"{name} {value[:12]}" for name, value in weights.items()) for weights in (trained_from, base)
        )
        raise UserError(f"run {run_id} was trained from a base with weights {first}; model {model!r} has {second}")
    # If this file is missing, PEFT would look for a pickled file.
    file = "config.json" if record["spec"]["method"] == "fullft" else "adapter_model.safetensors"
    path = RunFolder(layout.runs, run_id).weights / file
    if not path.is_file():
        raise UserError(f"weights of run {run_id} are missing: {path} does not exist")


def load_evaluated_model(spec: ModelSpec, record: dict[str, Any] | None, layout: Layout) -> torch.nn.Module:
    """Load the base (no record), the base with a run's adapter, or the model of a full fine-tuning."""
    full = record is not None and record["spec"]["method"] == "fullft"
    model: torch.nn.Module = load_model(fine_tuned(record, layout) if record is not None and full else spec)
    if record is not None and not full:
        from peft import PeftModel

        # Not merged: where the unembedding is the embedding, its update would change both.
        model = PeftModel.from_pretrained(model, RunFolder(layout.runs, record["run_id"]).weights)
    return model


def fine_tuned(record: dict[str, Any], layout: Layout) -> PathModel:
    """Return the model that a full fine-tuning saved; its folder has no tokenizer."""
    outcome = record["outcome"]
    size = {"parameters": outcome["base_params"], "hidden_size": outcome["hidden_size"]}
    return PathModel(kind="path", path=str(RunFolder(layout.runs, record["run_id"]).weights), **size)


def lm_eval_model(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int, autocast: torch.dtype | None
) -> HFLM:
    """Wrap a loaded model for lm-eval."""
    import logging

    import torch
    from lm_eval.models.huggingface import HFLM
    from peft import PeftModel

    from lorabench.models.lora import tie_beneath

    # lm-eval warns that the model is not given by name, which is intended.
    logging.getLogger("lm_eval.models.huggingface").addFilter(lambda record: "`pretrained`" not in record.msg)
    # lm-eval ties the weights of a model that it is given.
    if isinstance(model, PeftModel):
        tie_beneath(model)
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        mixed_precision_dtype=autocast,
        softmax_dtype=torch.float32,
    )


def vllm_lm_eval_model(
    spec: ModelSpec,
    record: dict[str, Any] | None,
    layout: Layout,
    batch_size: int,
    autocast: torch.dtype | None,
    device: torch.device,
) -> TemplateLM:
    """Start lm-eval's own model `vllm` with what `load_evaluated_model` loads; it computes in the autocast type.

    Raises:
        UserError: vLLM takes no adapter of the run's rank.
    """
    import importlib.metadata

    import torch

    model, lora = spec, {}
    if record is not None and record["spec"]["method"] == "fullft":
        model = fine_tuned(record, layout)
    elif record is not None:
        folder = str(RunFolder(layout.runs, record["run_id"]).weights)
        lora = {"lora_local_path": folder, "max_lora_rank": max_lora_rank(record["spec"]["rank"]), "max_loras": 1}
    on_cpu, longest, dtype = device.type == "cpu", max_length(model), autocast or torch.float32
    set_vllm_environment(device)
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
        max_num_seqs=batch_size if on_cpu else max(batch_size, _SEQUENCES_ON_GPU),
        kv_cache_memory_bytes=max(_CACHE_ON_CPU, cache_bytes(model, dtype, longest)) if on_cpu else None,
        enforce_eager=on_cpu,
        **lora,
    )
    if lora:
        lm.model.apply_model(_adapt_all_logits)
    # The preset may give a model the template that its folder lacks.
    lm.tokenizer = load_tokenizer(spec)
    lm.hf_chat_template = lm.tokenizer.chat_template
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

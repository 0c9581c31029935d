"""lm-eval's backend vLLM, with the prompts, limits and answers of its backend transformers, so that scores agree.

Importing this module imports vLLM, which takes seconds; `set_vllm_environment` comes before.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM
from vllm.lora.layers import LogitsProcessorWithLoRA

from lorabench.config.models import ModelSpec
from lorabench.models.base import max_length, model_folder
from lorabench.models.vllm_support import cache_bytes, max_lora_rank, vllm_version

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_version = importlib.metadata.version
# lm-eval asks for the version of the distribution `vllm`; the one for CPUs has another name.
importlib.metadata.version = lambda distribution_name: (
    vllm_version() if distribution_name == "vllm" else _version(distribution_name)
)
try:
    from lm_eval.models.vllm_causallms import VLLM
finally:
    importlib.metadata.version = _version

# A text of the model's length and one more token, which is scored but not read, goes through vLLM as a whole, and vLLM
# always draws a token after it.
_BEYOND = 2

# The least number of sequences that a GPU answers at once, and the largest number of prompt tokens that are read at
# once, whose logits are in memory in fp32.
_SEQUENCES_ON_GPU, _READ_AT_ONCE = 256, 2048

# The least bytes of keys and values on a CPU.
_CACHE = 1 << 30


def _adapt_all_logits(model: torch.nn.Module) -> None:
    """Make the only adapter of an engine apply to the unembedding wherever logits are computed.

    vLLM applies it to the logits of drawn tokens alone: those of prompts lack it on a GPU, and are refused on a CPU
    (https://github.com/vllm-project/vllm/issues/51594).
    """

    def add(logits: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
        return logits.add_((x @ a[0, 0].T) @ b[0, 0].T, alpha=scale)

    for module in model.modules():
        if isinstance(module, LogitsProcessorWithLoRA):
            module.punica_wrapper.add_lora_logits = add


class VllmBackend(VLLM):  # type: ignore[misc]
    """A model in an engine of its own; with an adapter, every request goes through the adapter.

    Args:
        spec: the model that the engine loads.
        tokenizer: the tokenizer of prompts and answers.
        tokenizer_folder: the folder from which the engine loads the same tokenizer.
        adapter: the folder of a PEFT adapter and its rank, or None.
        batch_size: the largest number of sequences that go through the model at once on a CPU, and at least on a GPU.
        dtype: the type of weights and activations.
        device: what the engine computes on.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tokenizer: PreTrainedTokenizerBase,
        tokenizer_folder: Path,
        adapter: tuple[Path, int] | None,
        batch_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        longest = max_length(spec) + _BEYOND
        lora: dict[str, Any] = {}
        if adapter is not None:
            path, rank = adapter
            lora = {"lora_local_path": str(path), "max_lora_rank": max_lora_rank(rank), "max_loras": 1}
        # On a GPU vLLM takes what is free, and sequences do not wait for the longest of a batch.
        sequences = batch_size if device.type == "cpu" else max(batch_size, _SEQUENCES_ON_GPU)
        cache = max(_CACHE, cache_bytes(spec, dtype, longest)) if device.type == "cpu" else None
        super().__init__(
            str(model_folder(spec)),
            dtype=str(dtype).removeprefix("torch."),
            tokenizer=str(tokenizer_folder),
            trust_remote_code=getattr(spec, "trust_remote_code", False),
            seed=0,
            # The engine gets all requests at once. With `auto`, vLLM would divide by the time that a bar of tqdm shows.
            batch_size=sys.maxsize,
            max_num_seqs=sequences,
            max_num_batched_tokens=max(_READ_AT_ONCE, sequences),
            kv_cache_memory_bytes=cache,
            max_model_len=longest,
            hf_overrides={"max_position_embeddings": longest},
            enforce_eager=device.type == "cpu",
            **lora,
        )
        if adapter is not None:
            self.model.apply_model(_adapt_all_logits)
        self.tokenizer = tokenizer
        configured = self.model.llm_engine.model_config.try_get_generation_config()
        self._repetition_penalty = configured.get("repetition_penalty") or 1.0

    # vLLM's own would pass further arguments to the template.
    apply_chat_template = HFLM.apply_chat_template

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer prompts; prompt and answer together are at most as long as the model takes."""
        self._max_length -= _BEYOND
        try:
            answers: list[str] = super().generate_until(requests, disable_tqdm)
        finally:
            self._max_length += _BEYOND
        return answers

    def _model_generate(self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None) -> Any:
        if not generate:
            return super()._model_generate(requests)
        for parameters in sampling_params:
            # Of the model's own configuration, transformers applies this setting to greedy answers too.
            parameters.repetition_penalty = self._repetition_penalty
        outputs = super()._model_generate(requests, generate, sampling_params)
        for output in outputs:
            # Special tokens may end an answer, but are no part of its text.
            answer = output.outputs[0]
            answer.text = self.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        return outputs

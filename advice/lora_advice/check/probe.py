"""What a model computes on a short text: its logits for each token, with and without an adapter."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_advice.adapter_config import read_adapter_config
from lora_advice.check.adapter import listed
from lora_advice.errors import UserError
from lora_advice.finding import Finding, Level
from lora_advice.models import ModelFacts
from lora_advice.patterns import matching

try:
    import torch
    from peft import PeftModel
    from torch import Tensor
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
except ImportError as error:
    raise UserError(f"comparing models needs {error.name}: pip install 'lora-advice[models]'") from error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEXT = Path(__file__).with_name("probe.txt")
"""The text that is probed with if the user names none: prose, a dialogue, code, numbers and other languages."""
_MOST_TOKENS, _FEWEST_TOKENS = 512, 8
_WIDEST, _PACKED = 8, 16
"""Up to so many times a model's width a rank is not a mistake, and so many weights one number of a file may hold."""


@dataclass(frozen=True)
class Probe:
    """A base model in fp32, and what it computes on a text, with and without an adapter."""

    model: ModelFacts
    adapter: Path
    base: PreTrainedModel
    ids: Tensor
    """The tokens of the text, (tokens,)."""
    base_logits: Tensor
    """The logits after each token, (tokens, vocabulary), in fp32 on the CPU."""
    adapter_logits: Tensor
    findings: tuple[Finding, ...]
    """What loading the adapter shows."""


def probe(model: ModelFacts, adapter: Path, text: Path | None) -> Probe:
    """Load a model in fp32, on a GPU if there is one, and compute a text's logits with and without an adapter.

    Raises:
        UserError: the model, the adapter or the text can't be read, or the adapter does not fit the model.
    """
    try:
        content = (text or TEXT).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"text {str(text)!r} can't be read as UTF-8: {error}") from error
    config, most = read_adapter_config(adapter), _WIDEST * model.width
    # PEFT makes as much room for a layer that the file lacks.
    if (rank := max(config.r, *(config.rank_pattern or {"": 1}).values())) > most:
        raise UserError(
            f"adapter {str(adapter)!r} has rank {rank:,}; allowed: up to {most:,}, {_WIDEST} times the width"
        )
    base = load_model(model, torch.float32).to("cuda" if torch.cuda.is_available() else "cpu")
    with one_sentence(f"the tokenizer of {model.name} can't be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(model.name, local_files_only=True)
    most = min(model.max_length or _MOST_TOKENS, _MOST_TOKENS)
    ids = torch.tensor(tokenizer(content, truncation=True, max_length=most)["input_ids"])
    if len(ids) < _FEWEST_TOKENS:
        raise UserError(f"text {str(text)!r} has {len(ids)} tokens; at least {_FEWEST_TOKENS} are needed")
    with adapted(base, adapter, torch.float32) as (with_adapter, findings):
        return Probe(model, adapter, base, ids, logits(base, ids), logits(with_adapter, ids), tuple(findings))


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Turn any error into a UserError that begins with `what`: transformers and PEFT raise errors of all kinds."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # PyTorch names the first weight of a wrong size in the second line.
        reason = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
        raise UserError(f"{what}: {reason}") from error


def load_model(model: ModelFacts, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load a model from safetensors on this machine.

    Raises:
        UserError: it can't be loaded, or lacks most of the weights that its config.json describes, which transformers
            would make up, as many as there is memory for.
    """
    if model.sizes and model.parameters and model.sizes.parameters > _PACKED * model.parameters:
        message = f"model {model.name!r} has a config.json for {model.sizes.parameters:,} parameters and files with "
        raise UserError(f"{message}{model.parameters:,}; allowed: {_PACKED} times as many, as in 2 bits")
    logging.disable_progress_bar()
    with one_sentence(f"model {model.name!r} can't be loaded"):
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model.name, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    return loaded.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Return the logits after each token of a text, (tokens, vocabulary), in fp32 on the CPU."""
    device = next(model.parameters()).device
    result: Tensor = model(input_ids=ids[None].to(device), use_cache=False).logits[0]
    return result.float().cpu()


def token_nlls(computed: Tensor, ids: Tensor) -> Tensor:
    """Return the NLL in nats of each token but the first, (tokens - 1,)."""
    return torch.nn.functional.cross_entropy(computed[:-1], ids[1:], reduction="none")


def in_dtype(base: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a copy of a model with weights in another type; transformers computes positions in fp32 whatever it is."""
    copied = copy.deepcopy(base)
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(dtype)
    return copied


@contextmanager
def adapted(base: PreTrainedModel, folder: Path, dtype: torch.dtype) -> Iterator[tuple[PeftModel, list[Finding]]]:
    """Provide a copy of a base model in a type, with an adapter as PEFT loads it, and what loading shows.

    Raises:
        UserError: PEFT can't put the adapter on the model.
    """
    # PEFT would match the configuration's regular expressions without a limit of time.
    matching([*read_adapter_config(folder).patterns], [name for name, _ in base.named_modules()])
    with warnings.catch_warnings(), one_sentence(f"adapter {str(folder)!r} does not fit the model"):
        # What they say of keys becomes findings.
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(in_dtype(base, dtype), str(folder))
        result: Any = model.load_adapter(str(folder), "default")
        # The names as the adapter's file has them.
        keys = (result.unexpected_keys, result.missing_keys)
        ignored, missing = (sorted({key.replace(".default", "") for key in some}) for some in keys)
        findings = []
        if ignored:
            message = f"{len(ignored)} weights of the adapter match no module of the model, and PEFT ignores them "
            findings.append(finding("ignored", "error", f"{message}silently: {listed(ignored)}"))
        if missing:
            message = f"the adapter has no weights for {len(missing)} LoRA layers of the model, which stay as "
            findings.append(finding("missing", "error", f"{message}initialized: {listed(missing)}"))
        yield model.eval(), findings


def finding(code: str, level: Level, message: str, source: str = "the model with the adapter") -> Finding:
    """Return a finding of what was computed."""
    return Finding(code, level, message, source, "computed")

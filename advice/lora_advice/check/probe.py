"""What a model computes on a short text: its logits for each token, with and without an adapter."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorabench.audit.adapter_config import read_adapter_config
from lorabench.audit.finding import Finding, Level
from lorabench.check.adapter import listed
from lorabench.config.inputs import GgufModel, PathModel
from lorabench.custom.model import UserModel
from lorabench.errors import UserError
from lorabench.models.base import load_model, load_tokenizer, model_errors
from lorabench.models.specs import dimensions_of_config, read_config
from lorabench.utils.patterns import matching

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

TEXT = Path(__file__).with_name("probe.txt")
"""The text that is probed with if the user names none: prose, a dialogue, code, numbers and other languages."""
_MOST_TOKENS, _FEWEST_TOKENS = 512, 8
_WIDEST = 8
"""Up to so many times a model's width a rank is not a mistake."""
_PACKED = 16
"""The most weights that one number of a file holds: 16 of 2 bits."""


@dataclass(frozen=True)
class Probe:
    """A base model in fp32, and what it computes on a text, with and without an adapter."""

    model: UserModel
    adapter: Path
    base: PreTrainedModel
    ids: Tensor
    """The tokens of the text, (tokens,)."""
    base_logits: Tensor
    """The logits after each token, (tokens, vocabulary), in fp32 on the CPU."""
    adapter_logits: Tensor
    findings: tuple[Finding, ...]
    """What loading the adapter shows."""


def probe(model: UserModel, adapter: Path, text: Path | None) -> Probe:
    """Load a model in fp32, on a GPU if there is one, and compute a text's logits with and without an adapter.

    Raises:
        UserError: the model, the adapter or the text can't be read, or the adapter does not fit the model.
    """
    if isinstance(model.spec, GgufModel):
        raise UserError(f"model {model.name!r} is a GGUF file: name the folder or hub id of the model it was made from")
    try:
        content = (text or TEXT).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"text {str(text)!r} can't be read as UTF-8: {error}") from error
    refuse_lacking(model)
    config, most = read_adapter_config(adapter), _WIDEST * model.sizes.hidden
    # PEFT makes as much room for a layer that the file lacks.
    if (rank := max(config.r, *(config.rank_pattern or {"": 1}).values())) > most:
        raise UserError(
            f"adapter {str(adapter)!r} has rank {rank:,}; allowed: up to {most:,}, {_WIDEST} times the width"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    most = min(model.max_length or _MOST_TOKENS, _MOST_TOKENS)
    ids = torch.tensor(load_tokenizer(model.spec)(content, truncation=True, max_length=most)["input_ids"])
    if len(ids) < _FEWEST_TOKENS:
        raise UserError(f"text {str(text)!r} has {len(ids)} tokens; at least {_FEWEST_TOKENS} are needed")
    base = load_model(model.spec).eval().to(device)
    with adapted(base, adapter, torch.float32) as (with_adapter, findings):
        return Probe(model, adapter, base, ids, logits(base, ids), logits(with_adapter, ids), tuple(findings))


def refuse_lacking(model: UserModel) -> None:
    """Raise a UserError if a folder lacks most of the weights that its config.json describes.

    transformers would make them up, as many as there is memory for.
    """
    with suppress(KeyError):
        if isinstance(model.spec, PathModel):
            described = dimensions_of_config(read_config(Path(model.name))).parameters
            if described > _PACKED * model.parameters:
                message = f"model {model.name!r} has a config.json for {described:,} parameters and files with "
                raise UserError(f"{message}{model.parameters:,}; allowed: {_PACKED} times as many, as in 2 bits")


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
    """Return a copy of a model with weights in another type.

    Buffers keep theirs, since transformers computes the angles of positions in fp32 whatever the type of the weights.
    """
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
    from peft import PeftModel

    # PEFT would match the configuration's regular expressions without a limit of time.
    matching([*read_adapter_config(folder).patterns], [name for name, _ in base.named_modules()])
    with warnings.catch_warnings(), model_errors(f"adapter {str(folder)!r} does not fit the model"):
        # What they say of keys becomes findings.
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(in_dtype(base, dtype), str(folder))
        result = model.load_adapter(str(folder), "default")
        yield model.eval(), list(_findings_of(result))


def _findings_of(result: Any) -> Iterator[Finding]:
    ignored, missing = (_plain(keys) for keys in (result.unexpected_keys, result.missing_keys))
    if ignored:
        message = f"{len(ignored)} weights of the adapter match no module of the model, and PEFT ignores them silently"
        yield finding("ignored", "error", f"{message}: {listed(ignored)}")
    if missing:
        message = f"the adapter has no weights for {len(missing)} LoRA layers of the model, which stay as initialized"
        yield finding("missing", "error", f"{message}: {listed(missing)}")


def _plain(keys: list[str]) -> list[str]:
    """Return the names as the adapter's file has them."""
    return sorted({key.replace(".default", "") for key in keys})


def finding(code: str, level: Level, message: str, source: str = "the model with the adapter") -> Finding:
    """Return a finding of what was computed."""
    return Finding(code, level, message, source, "computed")

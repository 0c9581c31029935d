"""Whether a model with an adapter merged into its weights computes the same as the model with the adapter beside it.

The measure is the rounding of the unmerged model: how far its logits on a short text move when weights and products are
rounded to a type. Merging is right in this type if it moves them not much further.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
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
from lora_advice.user_model import find_model

try:
    import torch
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer, ParamWrapper
    from peft.utils import AuxiliaryTrainingWrapper
    from torch import Tensor
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging
except ImportError as error:
    raise UserError(f"comparing models needs {error.name}: pip install 'lora-advice[models]'") from error

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TEXT = Path(__file__).with_name("probe.txt")
"""The text to compare on if the user names none: prose, a dialogue, code, numbers and other languages."""
_MOST_TOKENS, _FEWEST_TOKENS = 512, 8
_WIDEST, _PACKED = 8, 16
"""Up to so many times a model's width a rank is not a mistake, and so many weights one number of a file may hold."""
_ROUNDINGS = 2.0
"""A merged model may be off by so many times the rounding of the unmerged one, since merging rounds twice."""
_LOST = 0.2
"""A merged model may lack this share of the adapter's effect."""
_FP32 = 2e-5
"""The rounding of fp32 as a share of the logits' root mean square, by which the order of sums moves them."""


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


@dataclass(frozen=True)
class Difference:
    """How far some logits are from others."""

    largest: float
    mean: float
    """The mean of the absolute differences."""
    kl: float
    """The mean over tokens of KL(these || others) in nats."""


@dataclass(frozen=True)
class Merged:
    """A merged model against the unmerged adapter in fp32; differences are null if its logits are not finite."""

    name: str
    """`merged`, or the folder of a model that the user has merged."""
    dtype: str
    nll: float | None
    difference: Difference | None
    rounding: Difference | None
    """The unmerged adapter in this type against that in fp32."""
    kept: float | None
    """The share of the adapter's effect on the logits that is left: 1 if all is, 0 if the model is the base."""
    same: bool
    verdict: str
    """One sentence."""


@dataclass(frozen=True)
class Merging:
    """A base, its adapter and the merged models on a text; as a dict it is what `--json` prints."""

    model: str
    adapter: str
    tokens: int
    base_nll: float
    adapter_nll: float
    effect: Difference
    """The adapter against the base, both in fp32."""
    merged: tuple[Merged, ...]
    findings: tuple[Finding, ...]


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
        allowed = f"allowed: up to {most:,}, {_WIDEST} times the width"
        raise UserError(f"adapter {str(adapter)!r} has rank {rank:,}; {allowed}")
    base = _load_model(model, torch.float32).to("cuda" if torch.cuda.is_available() else "cpu")
    with _one_sentence(f"the tokenizer of {model.name} can't be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(model.name, local_files_only=True)
    most = min(model.max_length or _MOST_TOKENS, _MOST_TOKENS)
    ids = torch.tensor(tokenizer(content, truncation=True, max_length=most)["input_ids"])
    if len(ids) < _FEWEST_TOKENS:
        raise UserError(f"text {str(text)!r} has {len(ids)} tokens; at least {_FEWEST_TOKENS} are needed")
    with _adapted(base, adapter, torch.float32) as (with_adapter, findings):
        return Probe(model, adapter, base, ids, _logits(base, ids), _logits(with_adapter, ids), tuple(findings))


def check_merging(probe: Probe, dtypes: Sequence[str], own: Path | None = None) -> Merging:
    """Merge an adapter in some of DTYPES and compare what the merged models compute, and one that was merged elsewhere.

    Raises:
        UserError: the merged model can't be loaded, or has other weights than the base.
    """
    if unknown := [name for name in dtypes if name not in DTYPES]:
        raise UserError(f"--dtypes: {unknown[0]!r} is not known; allowed: {', '.join(DTYPES)}")
    effect = _difference(probe.base_logits, probe.adapter_logits)
    if effect is None:
        raise UserError(f"adapter {str(probe.adapter)!r} can't be compared: with it, logits in fp32 are not finite")
    findings, rows = [*probe.findings], []
    for dtype in dtypes:
        with _adapted(probe.base, probe.adapter, DTYPES[dtype]) as (unmerged, _):
            targets, apart = _targets(unmerged), _logits(unmerged, probe.ids)
            try:
                merged = unmerged.merge_and_unload()
            except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
                reason = str(error).strip().splitlines()[0]
                findings.append(_finding("merged", "error", f"PEFT can't merge the adapter in {dtype}: {reason}"))
                continue
            findings += _changes(probe.base, merged, targets, dtype)
            row = _row(probe, "merged", dtype, _logits(merged, probe.ids), apart)
        rows.append(row)
        findings += [] if row.same else [_finding("merged", "error" if dtype == "fp32" else "warning", row.verdict)]
    if own is not None:
        dtype, computed = _own_logits(own, probe)
        with _adapted(probe.base, probe.adapter, DTYPES[dtype]) as (unmerged, _):
            row = _row(probe, str(own), dtype, computed, _logits(unmerged, probe.ids))
        rows.append(row)
        findings += [] if row.same else [_finding("merged", "error", row.verdict)]
    base_nll, adapter_nll = (_nll(computed, probe.ids) for computed in (probe.base_logits, probe.adapter_logits))
    model, tokens = probe.model.name, len(probe.ids)
    return Merging(model, str(probe.adapter), tokens, base_nll, adapter_nll, effect, tuple(rows), tuple(findings))


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Turn any error into a UserError that begins with `what`: transformers and PEFT raise errors of all kinds."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # PyTorch names the first weight of a wrong size in the second line.
        reason = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
        raise UserError(f"{what}: {reason}") from error


def _load_model(model: ModelFacts, dtype: torch.dtype | str) -> PreTrainedModel:
    """Load a model from safetensors on this machine.

    Raises:
        UserError: it can't be loaded, or lacks most of the weights that its config.json describes, which transformers
            would make up, as many as there is memory for.
    """
    if model.sizes and model.parameters and model.sizes.parameters > _PACKED * model.parameters:
        message = f"model {model.name!r} has a config.json for {model.sizes.parameters:,} parameters and files with "
        raise UserError(f"{message}{model.parameters:,}; allowed: {_PACKED} times as many, as in 2 bits")
    logging.disable_progress_bar()
    with _one_sentence(f"model {model.name!r} can't be loaded"):
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model.name, dtype=dtype, use_safetensors=True, local_files_only=True
        )
    return loaded.eval()


@torch.no_grad()
def _logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Return the logits after each token of a text, (tokens, vocabulary), in fp32 on the CPU."""
    device = next(model.parameters()).device
    result: Tensor = model(input_ids=ids[None].to(device), use_cache=False).logits[0]
    return result.float().cpu()


def _nll(logits: Tensor, ids: Tensor) -> float:
    """Return the mean NLL in nats of all tokens but the first."""
    return float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none").mean())


def _in_dtype(base: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return a copy of a model with weights in another type; transformers computes positions in fp32 whatever it is."""
    copied = copy.deepcopy(base)
    for parameter in copied.parameters():
        parameter.data = parameter.data.to(dtype)
    return copied


@contextmanager
def _adapted(base: PreTrainedModel, folder: Path, dtype: torch.dtype) -> Iterator[tuple[PeftModel, list[Finding]]]:
    """Provide a copy of a base model in a type, with an adapter as PEFT loads it, and what loading shows.

    Raises:
        UserError: PEFT can't put the adapter on the model.
    """
    # PEFT would match the configuration's regular expressions without a limit of time.
    matching([*read_adapter_config(folder).patterns], [name for name, _ in base.named_modules()])
    with warnings.catch_warnings(), _one_sentence(f"adapter {str(folder)!r} does not fit the model"):
        # What they say of keys becomes findings.
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(_in_dtype(base, dtype), str(folder))
        result: Any = model.load_adapter(str(folder), "default")
        # The names as the adapter's file has them.
        keys = (result.unexpected_keys, result.missing_keys)
        ignored, missing = (sorted({key.replace(".default", "") for key in some}) for some in keys)
        findings = []
        if ignored:
            message = f"{len(ignored)} weights of the adapter match no module of the model, and PEFT ignores them "
            findings.append(_finding("ignored", "error", f"{message}silently: {listed(ignored)}"))
        if missing:
            message = f"the adapter has no weights for {len(missing)} LoRA layers of the model, which stay as "
            findings.append(_finding("missing", "error", f"{message}initialized: {listed(missing)}"))
        yield model.eval(), findings


def _finding(code: str, level: Level, message: str) -> Finding:
    return Finding(code, level, message, "the model with the adapter", "computed")


def _difference(reference: Tensor, other: Tensor) -> Difference | None:
    if not (torch.isfinite(reference).all() and torch.isfinite(other).all()):
        return None
    gap = (other - reference).abs()
    log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return Difference(float(gap.max()), float(gap.mean(dtype=torch.float64)), max(0.0, float(kl.mean())))


def _row(probe: Probe, name: str, dtype: str, computed: Tensor, apart: Tensor) -> Merged:
    """Compare a merged model's logits with those of the unmerged adapter in fp32 and, as `apart`, in its own type."""
    in_type = probe.base_logits if dtype == "fp32" else _logits(_in_dtype(probe.base, DTYPES[dtype]), probe.ids)
    rounding, off = (_difference(probe.adapter_logits, other) for other in (apart, computed))
    what = f"the merged model in {dtype}" if name == "merged" else f"the model in {name} ({dtype})"
    if off is None:
        also = "" if rounding else ", and so does the unmerged adapter"
        sentence = f"{what} computes logits that are not finite{also}: this type has too small a range for it"
        return Merged(name, dtype, None, None, rounding, None, False, sentence)
    scale = float(probe.adapter_logits.square().mean().sqrt())
    far = off.mean > _ROUNDINGS * (rounding.mean if rounding else 0.0) + _FP32 * scale
    # The coefficient of a regression of what the merged model adds to its base on what the adapter adds.
    effect = (probe.adapter_logits - probe.base_logits).double().flatten()
    kept, squared = None, float(effect @ effect)
    if squared and torch.isfinite(in_type).all():
        kept = float((computed - in_type).double().flatten() @ effect) / squared
    lost = kept is not None and abs(kept - 1) > _LOST
    sentence = f"{what} is {'NOT ' if far else ''}the same as the adapter within the rounding of {dtype}"
    if lost and not far:
        sentence = f"{what} has NOT the adapter's effect, which is smaller than the rounding of {dtype}"
    sentence += f": its logits differ by {off.mean:.2g} on average"
    if rounding and rounding.mean:
        sentence += f", those of the unmerged adapter by {rounding.mean:.2g} from rounding alone"
    sentence += "" if kept is None else f"; {kept:.1%} of the adapter's effect is left"
    return Merged(name, dtype, _nll(computed, probe.ids), off, rounding, kept, not far and not lost, sentence)


def _targets(unmerged: torch.nn.Module) -> set[str]:
    """Return the names of the base's parameters that merging may change."""
    names = set()
    for name, module in unmerged.named_modules():
        name = name.removeprefix("base_model.model.")
        if isinstance(module, LoraLayer):
            # For two parameters of a module PEFT nests two wrappers.
            owner = ".".join(part for part in name.split(".") if part != "base_layer")
            parameters = [module.parameter_name] if isinstance(module, ParamWrapper) else ["weight", "bias"]
            names |= {f"{owner}.{parameter}" for parameter in parameters}
        elif isinstance(module, AuxiliaryTrainingWrapper):
            names |= {f"{name}.{own}" for own, _ in module.original_module.named_parameters()}
    return names


def _changes(base: torch.nn.Module, merged: torch.nn.Module, targets: set[str], dtype: str) -> Iterator[Finding]:
    """Compare the weights of a merged model with the base's, and say which changed that should not have."""
    before, after = (dict(model.named_parameters(remove_duplicate=False)) for model in (base, merged))
    if before.keys() != after.keys():
        message = f"merging adds or removes weights: {listed(sorted(before.keys() ^ after.keys()))}"
        yield _finding("changed", "error", message)
    common = before.keys() & after.keys()
    changed = {name for name in common if not torch.equal(before[name].to(after[name].dtype), after[name])}
    tied = {name for name in changed - targets if any(after[name] is after[own] for own in targets & common)}
    if tied:
        message = f"merging in {dtype} also changes {listed(sorted(tied))}, which is one matrix with a layer with LoRA"
        yield _finding("tied", "error", f"{message}: untie them before, or serve the adapter unmerged")
    if others := sorted(changed - targets - tied):
        yield _finding("changed", "error", f"merging in {dtype} changes weights without LoRA: {listed(others)}")


def _own_logits(folder: Path, probe: Probe) -> tuple[str, Tensor]:
    """Return the type of a merged model's weights, and its logits."""
    if not folder.is_dir():
        raise UserError(f"merged model {str(folder)!r} is no folder")
    model = _load_model(find_model(str(folder)), "auto")
    names = {dtype: name for name, dtype in DTYPES.items()}
    if model.dtype not in names:
        raise UserError(f"merged model {str(folder)!r} has weights in {model.dtype}; allowed: {', '.join(DTYPES)}")
    with _one_sentence(f"merged model {str(folder)!r} can't compute"):
        computed = _logits(model.to(probe.base.device), probe.ids)
    if computed.shape != probe.base_logits.shape:
        sizes = " and ".join(str(part.shape[-1]) for part in (computed, probe.base_logits))
        raise UserError(f"merged model {str(folder)!r} and the base have vocabularies of {sizes} tokens")
    return names[model.dtype], computed

"""Whether a model with an adapter merged into its weights computes the same as the model with the adapter beside it.

The measure is the rounding of the unmerged model: how far its logits move when weights and products are rounded to a
type. Merging is right in this type if it moves them not much further.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_advice.check.adapter import listed
from lora_advice.check.probe import Probe, adapted, finding, in_dtype, load_model, logits, one_sentence, token_nlls
from lora_advice.errors import UserError
from lora_advice.finding import Finding
from lora_advice.user_model import find_model

# isort: split
import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ROUNDINGS = 2.0
"""A merged model may be off by so many times the rounding of the unmerged one, since merging rounds twice."""
_LOST = 0.2
"""A merged model may lack this share of the adapter's effect."""
_FP32 = 2e-5
"""The rounding of fp32 as a share of the logits' root mean square, by which the order of sums moves them."""


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


def check_merging(probe: Probe, dtypes: Sequence[str], own: Path | None = None) -> Merging:
    """Merge an adapter in some types and compare what the merged models compute.

    Args:
        probe: what base and adapter compute.
        dtypes: names of `DTYPES`.
        own: the folder of a model that was merged elsewhere, which is compared too.

    Raises:
        UserError: the merged model can't be loaded, or has other weights than the base.
    """
    if unknown := [name for name in dtypes if name not in DTYPES]:
        raise UserError(f"--dtypes: {unknown[0]!r} is not known; allowed: {', '.join(DTYPES)}")
    effect = _difference(probe.base_logits, probe.adapter_logits)
    if effect is None:
        raise UserError(f"adapter {str(probe.adapter)!r} can't be compared: with it, logits in fp32 are not finite")
    findings, rows = [*probe.findings], []
    for name in dtypes:
        with adapted(probe.base, probe.adapter, DTYPES[name]) as (unmerged, _):
            targets, apart = _targets(unmerged), logits(unmerged, probe.ids)
            try:
                merged = unmerged.merge_and_unload()
            except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
                reason = str(error).strip().splitlines()[0]
                findings.append(finding("merged", "error", f"PEFT can't merge the adapter in {name}: {reason}"))
                continue
            findings += _changes(probe.base, merged, targets, name)
            row = _row(probe, "merged", name, logits(merged, probe.ids), apart)
        rows.append(row)
        if not row.same:
            findings.append(finding("merged", "error" if name == "fp32" else "warning", row.verdict))
    if own is not None:
        dtype, computed = _own_logits(own, probe)
        with adapted(probe.base, probe.adapter, DTYPES[dtype]) as (unmerged, _):
            row = _row(probe, str(own), dtype, computed, logits(unmerged, probe.ids))
        rows.append(row)
        findings += [] if row.same else [finding("merged", "error", row.verdict)]
    nll, adapter_nll = (
        float(token_nlls(computed, probe.ids).mean()) for computed in (probe.base_logits, probe.adapter_logits)
    )
    about = (probe.model.name, str(probe.adapter), len(probe.ids))
    return Merging(*about, nll, adapter_nll, effect, tuple(rows), tuple(findings))


def _difference(reference: Tensor, other: Tensor) -> Difference | None:
    if not (torch.isfinite(reference).all() and torch.isfinite(other).all()):
        return None
    gap = (other - reference).abs()
    log_p, log_q = reference.log_softmax(-1), other.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return Difference(float(gap.max()), float(gap.mean(dtype=torch.float64)), max(0.0, float(kl.mean())))


def effect_share(base: Tensor, full: Tensor, other: Tensor, other_base: Tensor) -> float | None:
    """Return how far `other` lies on the way from its base to the full effect: 1 with all of it, 0 with none.

    It is the coefficient of a regression of (other - other_base) on (full - base); None if there is no effect.
    """
    direction = (full - base).double().flatten()
    squared = float(direction @ direction)
    return float((other - other_base).double().flatten() @ direction) / squared if squared else None


def _row(probe: Probe, name: str, dtype: str, computed: Tensor, apart: Tensor) -> Merged:
    """Compare a merged model's logits with those of the unmerged adapter in fp32 and, as `apart`, in its own type."""
    in_type = probe.base_logits if dtype == "fp32" else logits(in_dtype(probe.base, DTYPES[dtype]), probe.ids)
    rounding, off = (_difference(probe.adapter_logits, other) for other in (apart, computed))
    what = f"the merged model in {dtype}" if name == "merged" else f"the model in {name} ({dtype})"
    if off is None:
        also = "" if rounding else ", and so does the unmerged adapter"
        sentence = f"{what} computes logits that are not finite{also}: this type has too small a range for it"
        return Merged(name, dtype, None, None, rounding, None, False, sentence)
    scale = float(probe.adapter_logits.square().mean().sqrt())
    allowed = _ROUNDINGS * (rounding.mean if rounding else 0.0) + _FP32 * scale
    finite = bool(torch.isfinite(in_type).all())
    kept = effect_share(probe.base_logits, probe.adapter_logits, computed, in_type) if finite else None
    far, lost = off.mean > allowed, kept is not None and abs(kept - 1) > _LOST
    sentence = f"{what} is {'NOT ' if far else ''}the same as the adapter within the rounding of {dtype}"
    if lost and not far:
        sentence = f"{what} has NOT the adapter's effect, which is smaller than the rounding of {dtype}"
    sentence += f": its logits differ by {off.mean:.2g} on average"
    if rounding and rounding.mean:
        sentence += f", those of the unmerged adapter by {rounding.mean:.2g} from rounding alone"
    sentence += "" if kept is None else f"; {kept:.1%} of the adapter's effect is left"
    same = not far and not lost
    return Merged(name, dtype, float(token_nlls(computed, probe.ids).mean()), off, rounding, kept, same, sentence)


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
    before: dict[str, Any] = dict(base.named_parameters(remove_duplicate=False))
    after: dict[str, Any] = dict(merged.named_parameters(remove_duplicate=False))
    if before.keys() != after.keys():
        message = f"merging adds or removes weights: {listed(sorted(before.keys() ^ after.keys()))}"
        yield finding("changed", "error", message)
    common = before.keys() & after.keys()
    changed = {name for name in common if not torch.equal(before[name].to(after[name].dtype), after[name])}
    tied = {name for name in changed - targets if any(after[name] is after[own] for own in targets & common)}
    if tied:
        message = f"merging in {dtype} also changes {listed(sorted(tied))}, which is one matrix with a layer with LoRA"
        yield finding("tied", "error", f"{message}: untie them before, or serve the adapter unmerged")
    if others := sorted(changed - targets - tied):
        yield finding("changed", "error", f"merging in {dtype} changes weights without LoRA: {listed(others)}")


def _own_logits(folder: Path, probe: Probe) -> tuple[str, Tensor]:
    """Return the type of a merged model's weights, and its logits."""
    if not folder.is_dir():
        raise UserError(f"merged model {str(folder)!r} is no folder")
    model = load_model(find_model(str(folder)), "auto")
    names = {dtype: name for name, dtype in DTYPES.items()}
    if model.dtype not in names:
        raise UserError(f"merged model {str(folder)!r} has weights in {model.dtype}; allowed: {', '.join(DTYPES)}")
    with one_sentence(f"merged model {str(folder)!r} can't compute"):
        computed = logits(model.to(probe.base.device), probe.ids)
    if computed.shape != probe.base_logits.shape:
        sizes = " and ".join(str(part.shape[-1]) for part in (computed, probe.base_logits))
        raise UserError(f"merged model {str(folder)!r} and the base have vocabularies of {sizes} tokens")
    return names[model.dtype], computed

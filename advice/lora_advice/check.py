"""What the file of a finished LoRA adapter says by itself, without the model's weights and without torch.

The update of a weight is scale * B A. Its singular values come from the triangular factors of B and A (by QR), which
have r rows and columns each, so the update itself is never formed.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_high

import numpy as np
from safetensors import SafetensorError, deserialize

from lora_advice.adapter_config import NAME, AdapterConfig, ends
from lora_advice.errors import UserError
from lora_advice.finding import Finding, Level
from lora_advice.foreign import typed

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT writes before the name of each module
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""The types of tensors that are read, as numpy has them; it has no bf16."""
_DIRECTION = 1e-5
"""A direction whose singular value is below this share of the largest one does not count towards the rank."""
_LORA = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
_OTHER = ("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_B.bias", "lora_A.bias")
_SHOWN, _LONGEST = 5, 1000  # the most names of a list in a message, and the characters of the longest name of a tensor


@dataclass(frozen=True)
class ModuleUpdate:
    """LoRA on one module; of a stack of experts, on all of them together."""

    module: str
    rank: int  # the rank of each expert's LoRA, of a stack of experts
    experts: int
    d_in: int
    d_out: int
    scale: float  # alpha/r, or alpha/sqrt(r) with rsLoRA
    norm: float  # Frobenius norm of scale B A
    numerical_rank: int  # directions of B A of at least 1e-5 of the strongest one; the smallest number of all experts
    effective_rank: float  # exponential of the entropy of the singular values (Roy and Vetterli), mean over experts


@dataclass(frozen=True)
class Adapter:
    """An adapter as its folder describes it; as a dict it is what `--json` prints."""

    folder: str
    base_model: str | None
    rank: int
    alpha: float
    scale: float
    rslora: bool
    dora: bool
    dtypes: dict[str, int]  # the number of tensors by their type
    parameters: int
    modules: tuple[ModuleUpdate, ...]
    saved_whole: dict[str, int]  # the number of parameters of each tensor that is no part of LoRA
    findings: tuple[Finding, ...]


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's folder, and judge what its files say; raises UserError if a file can't be read."""
    path = folder / NAME
    try:
        config, tensors = typed(AdapterConfig, path.read_bytes(), str(path)), _read_tensors(folder / WEIGHTS)
    except OSError as error:
        raise UserError(f"{path}, which PEFT writes, can't be read: {error.strerror}") from error
    factors: dict[str, dict[str, str]] = defaultdict(dict)
    whole, not_finite, foreign = dict[str, int](), list[str](), list[str]()
    for key, (_, stored) in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _LORA.fullmatch(name)
        if name == key or ("lora_" in name and match is None and not name.endswith(_OTHER)):
            foreign.append(key)
        elif match:
            factors[match[1]][match[2]] = key
        elif "lora_" not in name:
            whole[name] = stored.size
            not_finite += [] if _is_finite(stored) else [name]
    modules, findings = list[ModuleUpdate](), list[Finding]()
    scales = config.scales([*map(plain, factors)])
    for module, keys in factors.items():
        if len(keys) < 2:
            continue
        a, b = (tensors[keys[part]][1] for part in "AB")
        if not _is_finite(a) or not _is_finite(b):
            not_finite.append(module)
            continue
        rank, scale = scales[plain(module)]
        sized = a.ndim == b.ndim == 2 and a.size and b.size
        experts = len(a) // rank if sized and config.parameters_in(plain(module)) else 1
        if sized and len(a) == b.shape[1] == experts * rank:
            modules.append(_update(module, a, b, rank, experts, scale))
        else:
            message = f"{module} has A {a.shape} and B {b.shape}, and the configuration gives it rank {rank}"
            findings.append(_finding("shape", "error", message))
    if not_finite:
        message = f"{len(not_finite)} modules have weights that are NaN or infinite: {listed(not_finite)}"
        findings.append(_finding("not-finite", "error", message))
    findings += _findings(config, factors, foreign, whole, modules)
    return Adapter(
        str(folder),
        config.base_model_name_or_path,
        config.r,
        config.lora_alpha,
        config.scale(config.r, config.lora_alpha),
        bool(config.use_rslora),
        bool(config.use_dora),
        dict(Counter(dtype for dtype, _ in tensors.values())),
        sum(stored.size for _, stored in tensors.values()),
        tuple(modules),
        whole,
        tuple(findings),
    )


def _read_tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Return by name the type of each tensor of a safetensors file and its content, bf16 as fp32."""
    if not path.is_file():
        other = [file.name for file in sorted(path.parent.glob("adapter_model.*"))]
        pickled = f" ({', '.join(other)} is not loaded)" if other else ""
        raise UserError(f"adapter folder {str(path.parent)!r} has no {path.name}{pickled}")
    tensors = {}
    try:
        entries = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error
    for name, entry in sorted(entries, key=lambda entry: entry[0]):
        if len(name) > _LONGEST or not name.isprintable():
            raise UserError(f"{path}: tensor {name[:80]!r}: allowed: names of up to {_LONGEST:,} printable characters")
        dtype = entry["dtype"]
        if dtype not in _TYPES:
            raise UserError(f"{path}: tensor {name} has the type {dtype}; allowed: {', '.join(_TYPES)}")
        values = np.frombuffer(entry["data"], _TYPES[dtype]).reshape(entry["shape"])
        tensors[name] = (dtype, (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values)
    return tensors


def _update(module: str, a: np.ndarray, b: np.ndarray, rank: int, experts: int, scale: float) -> ModuleUpdate:
    """Describe an update by A (experts * rank, d_in), rows by expert, and B (d_out, rank * experts), by direction."""
    energy, numerical, effective = 0.0, [], []
    columns = b.reshape(len(b), rank, experts).transpose(2, 0, 1)
    for own_a, own_b in zip(a.reshape(experts, rank, -1), columns, strict=True):
        right, left = (np.asarray(np.linalg.qr(part.astype(np.float64), mode="r")) for part in (own_a.T, own_b))
        values = np.linalg.svd(left @ right.T, compute_uv=False)
        energy += float((values**2).sum())
        shares = values[values > 0] / (values.sum() or 1.0)
        numerical.append(int((values > _DIRECTION * values[0]).sum()))
        effective.append(float(np.exp(-(shares * np.log(shares)).sum())) if values[0] else 0.0)
    norm = scale * math.sqrt(energy)
    return ModuleUpdate(
        module, rank, experts, a.shape[1], len(b), scale, norm, min(numerical), float(np.mean(effective))
    )


def _is_finite(values: np.ndarray) -> bool:
    """Return whether all values are finite as fp32, in which PEFT computes."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(values.astype(np.float32)).all())


def plain(module: str) -> str:
    """Return the name without what PEFT adds for the second parameter of a module."""
    return re.sub(r"(\.base_layer)+$", "", module)


def _finding(code: str, level: Level, message: str) -> Finding:
    return Finding(code, level, message, "the adapter's files", "certain")


def listed(names: Sequence[str]) -> str:
    """Return the first of some names as a part of a sentence."""
    others = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {others} more" if others > 0 else "")


def _findings(
    config: AdapterConfig,
    factors: Mapping[str, Mapping[str, str]],
    foreign: list[str],
    whole: Mapping[str, int],
    modules: list[ModuleUpdate],
) -> Iterator[Finding]:
    """Compare the names in the file with those in the configuration, and find updates that do little."""
    for there, lacking in ("AB", "BA"):
        half = [module for module, keys in factors.items() if there in keys and lacking not in keys]
        if half:
            yield _finding("missing", "error", f"{len(half)} modules have {there} but no {lacking}: {listed(half)}")
    if not factors:
        yield _finding("missing", "error", "the file has no LoRA weights")
    if foreign:
        message = f"{len(foreign)} names are not of the form `{PREFIX}MODULE.lora_A.weight`, so PEFT ignores them"
        yield _finding("keys", "error", f"{message}: {listed(foreign)}")
    names = {module: plain(module) for module in factors}
    targeted = config.targeted([*names.values()])
    unnamed = [module for module, name in names.items() if name not in targeted]
    if unnamed and (config.targets is not None or config.target_parameters):
        message = f"{len(unnamed)} modules in the file are not among the targets of {NAME}, so PEFT ignores them"
        yield _finding("keys", "error", f"{message}: {listed(unnamed)}")
    if not isinstance(config.targets, str):
        used = set(config.targets or ()).intersection(end for name in names.values() for end in ends(name))
        unused = [name for name in config.targets or () if name not in used]
        if unused:
            message = f"targets of {NAME} have no weights in the file: {listed(unused)}"
            yield _finding("keys", "error" if len(unused) == len(config.targets or ()) else "warning", message)
    if whole:
        message = f"the file also holds {sum(whole.values()):,} parameters that are no LoRA, of modules_to_save or"
        yield _finding("whole", "note", f"{message} PEFT's copy of an embedding: {listed([*whole])}")
    count = len(factors)
    if zero := [module.module for module in modules if not module.norm]:
        message = f"B A is zero in {len(zero)} of {count} modules, which have no effect: {listed(zero)}"
        if len(zero) == count:
            message = "B A is zero in all modules, so the adapter has no effect: it was not trained, or not saved"
        yield _finding("no-effect", "error" if len(zero) == count else "warning", message)
    limits = [(module, min(module.rank, module.d_in, module.d_out)) for module in modules if module.norm]
    deficient = [f"{m.module} ({m.numerical_rank} of {m.rank})" for m, limit in limits if m.numerical_rank < limit]
    if deficient:
        message = f"the update of {len(deficient)} modules has a lower rank than r: {listed(deficient)}"
        yield _finding("rank", "warning", message)
    shares = [module.effective_rank / limit for module, limit in limits]
    if shares and (middle := median_high(shares)) < 0.1:
        message = f"half of the modules have an effective rank below {middle:.0%} of r"
        yield _finding("rank", "note", f"{message}: a lower rank might have done")

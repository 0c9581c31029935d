"""What the file of a finished LoRA adapter says by itself, without the model's weights and without torch.

The update of a weight is scale * B A. Its singular values come from the triangular factors of B and A (by QR), which
have r rows and columns each, so the update itself is never formed.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lorabench.audit.finding import Finding, Level
from lorabench.errors import UserError
from lorabench.utils.patterns import matching

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT writes before the name of each module."""
_DIRECTION = 1e-5
"""A direction whose singular value is below this share of the largest one does not count towards the rank."""
_LORA = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
_OTHER = ("lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_B.bias", "lora_A.bias")
_LAYER = re.compile(r"\.(\d+)\.")
_NOT_SHOWN = 5


@dataclass(frozen=True)
class AdapterConfig:
    """What an `adapter_config.json` of PEFT says of LoRA."""

    base_model: str | None
    rank: int
    alpha: float
    rslora: bool
    dora: bool
    initialization: bool | str | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: tuple[str, ...] | str | None
    """Names of modules, or a regular expression of them."""
    target_parameters: tuple[str, ...]
    saved_modules: tuple[str, ...]
    layers: tuple[int, ...] | None
    """The numbers of the layers with LoRA; null for all."""
    patterns: tuple[str, ...]
    """All regular expressions that PEFT matches with names of modules."""

    def parameters_in(self, module: str) -> list[str]:
        """Return the names of the parameters of a module that carry LoRA without being modules."""
        names = [name for name in self.target_parameters if _ends(module, name.rpartition(".")[0])]
        return [f"{module}.{name.rpartition('.')[2]}" for name in names]

    def targeted(self, modules: Sequence[str]) -> set[str]:
        """Return the modules on which the configuration puts LoRA."""
        if not isinstance(self.targets, str):
            named = [module for module in modules if any(_ends(module, name) for name in self.targets or ())]
        elif self.targets == "all-linear":
            named = list(modules)
        else:
            [named] = matching([self.targets], modules)
        return {*named, *filter(self.parameters_in, modules)}

    def scales(self, modules: Sequence[str]) -> dict[str, tuple[int, float]]:
        """Return the rank and the scale of each module, as PEFT finds them."""
        names = {module: [*self.parameters_in(module), module] for module in modules}
        ranks = _of_patterns(self.rank_pattern, names, self.rank)
        alphas = _of_patterns(self.alpha_pattern, names, self.alpha)
        roots = {module: math.sqrt(rank) if self.rslora else rank for module, rank in ranks.items()}
        return {module: (ranks[module], alphas[module] / roots[module]) for module in modules}


@dataclass(frozen=True)
class ModuleUpdate:
    """LoRA on one module; of a stack of experts, on all of them together."""

    module: str
    rank: int
    """The rank of each expert's LoRA, of a stack of experts."""
    experts: int
    d_in: int
    d_out: int
    scale: float
    """alpha/r, or alpha/sqrt(r) with rsLoRA."""
    a_scale: float | None
    """Root mean square of A over that of PEFT's default initialization; null with another one."""
    b_norm: float
    """Frobenius norm of B."""
    norm: float
    """Frobenius norm of scale B A."""
    numerical_rank: int
    """Directions of B A of at least 1e-5 of the strongest one; the smallest number of all experts."""
    effective_rank: float
    """The exponential of the entropy of the singular values (Roy and Vetterli), the mean over experts."""
    first_share: float
    """Share of the squared norm that lies in the strongest direction."""

    @property
    def kind(self) -> str:
        """The last part of the module's name, such as `q_proj`."""
        return _plain(self.module).rpartition(".")[2]

    @property
    def limit(self) -> int:
        """The highest rank that the update can have."""
        return min(self.rank, self.d_in, self.d_out)


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
    initialization: bool | str | None
    targets: tuple[str, ...] | str | None
    target_parameters: tuple[str, ...]
    dtypes: dict[str, int]
    """The number of tensors by their type."""
    parameters: int
    modules: tuple[ModuleUpdate, ...]
    saved_whole: dict[str, int]
    """The number of parameters of each tensor that is no part of LoRA."""
    findings: tuple[Finding, ...]


def read_config(folder: Path) -> AdapterConfig:
    """Read the configuration of an adapter.

    Raises:
        UserError: it is missing, damaged, or of another method than LoRA.
    """
    path = folder / CONFIG
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = raw.get("peft_type")
        if kind != "LORA":
            raise UserError(f"{path} has peft_type {kind!r}; allowed: LORA")
        targets = raw.get("target_modules")
        layers = raw.get("layers_to_transform")
        return AdapterConfig(
            raw.get("base_model_name_or_path"),
            int(raw["r"]),
            float(raw["lora_alpha"]),
            bool(raw.get("use_rslora")),
            bool(raw.get("use_dora")),
            raw.get("init_lora_weights", True),
            raw.get("rank_pattern") or {},
            raw.get("alpha_pattern") or {},
            targets if isinstance(targets, str) or targets is None else tuple(sorted(targets)),
            tuple(sorted(raw.get("target_parameters") or ())),
            tuple(raw.get("modules_to_save") or ()),
            None if layers is None else tuple(layers) if isinstance(layers, list) else (int(layers),),
            tuple(_patterns(raw)),
        )
    except FileNotFoundError:
        raise UserError(f"adapter folder {str(folder)!r} has no {CONFIG}, which PEFT writes") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} can't be read as the configuration of LoRA: {error!r}") from error


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter's folder, and judge what its files say.

    Raises:
        UserError: a file is missing or can't be read.
    """
    config = read_config(folder)
    factors: dict[str, dict[str, str]] = defaultdict(dict)
    whole, dtypes, bad, foreign = {}, defaultdict[str, int](int), [], []
    modules, findings, parameters = [], list[Finding](), 0
    with _Tensors(folder / WEIGHTS) as tensors:
        for key, (dtype, shape) in tensors.shapes.items():
            dtypes[dtype] += 1
            parameters += math.prod(shape)
            name = key.removeprefix(PREFIX)
            match = _LORA.fullmatch(name)
            if name == key or ("lora_" in name and match is None and not name.endswith(_OTHER)):
                foreign.append(key)
            elif match:
                factors[match[1]][match[3]] = key
            elif "lora_" not in name:
                whole[name] = math.prod(shape)
                bad += [] if np.isfinite(tensors.read(key)).all() else [name]
        scales = config.scales([*map(_plain, factors)])
        for module, keys in factors.items():
            if len(keys) == 2:
                a, b = tensors.read(keys["A"]), tensors.read(keys["B"])
                if not np.isfinite(a).all() or not np.isfinite(b).all():
                    bad.append(module)
                    continue
                embedding = "lora_embedding_" in keys["A"]
                update = _update(module, a, b, config, scales[_plain(module)], embedding)
                modules += [] if isinstance(update, Finding) else [update]
                findings += [update] if isinstance(update, Finding) else []
    findings += _finding_bad(bad)
    findings += _finding_keys(config, factors, foreign, whole)
    findings += _finding_effects(modules, len(factors))
    if len(dtypes) > 1:
        types = ", ".join(f"{count} in {dtype}" for dtype, count in sorted(dtypes.items()))
        findings.append(_finding("dtype", "note", f"the tensors have several types: {types}"))
    return Adapter(
        str(folder),
        config.base_model,
        config.rank,
        config.alpha,
        config.alpha / (math.sqrt(config.rank) if config.rslora else config.rank),
        config.rslora,
        config.dora,
        config.initialization,
        config.targets,
        config.target_parameters,
        dict(dtypes),
        parameters,
        tuple(modules),
        whole,
        tuple(findings),
    )


class _Tensors:
    """The tensors of a safetensors file as arrays of numpy, which has no bf16: it is read as fp32."""

    _TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # noqa: RUF012

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            other = [file.name for file in sorted(path.parent.glob("adapter_model.*"))]
            pickled = f" ({', '.join(other)} is not loaded)" if other else ""
            raise UserError(f"adapter folder {str(path.parent)!r} has no {path.name}{pickled}")
        try:
            # It checks that the header and the length of the file agree.
            with safe_open(path, "numpy"):
                pass
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is not a safetensors file: {error}") from error
        self._path, self._start = path, 8 + length
        self._entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        self.shapes = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in self._entries.items()}

    def __enter__(self) -> _Tensors:
        self._data = np.memmap(self._path, np.uint8, "r", self._start)
        return self

    def __exit__(self, *_: object) -> None:
        del self._data

    def read(self, name: str) -> np.ndarray:
        """Return a tensor."""
        dtype, shape = self.shapes[name]
        if dtype not in self._TYPES:
            allowed = ", ".join(self._TYPES)
            raise UserError(f"{self._path}: tensor {name} has the type {dtype}; allowed: {allowed}")
        start, end = self._entries[name]["data_offsets"]
        values = np.frombuffer(self._data[start:end].tobytes(), self._TYPES[dtype]).reshape(shape)
        return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values


def _update(
    module: str, a: np.ndarray, b: np.ndarray, config: AdapterConfig, rank_and_scale: tuple[int, float], embedding: bool
) -> ModuleUpdate | Finding:
    """Describe the update of a module by its factors, A (r, d_in) and B (d_out, r), or say why they can't be right."""
    rank, scale = rank_and_scale
    experts = len(a) // rank if config.parameters_in(_plain(module)) else 1
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or len(a) != experts * rank:
        shapes = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
        return _finding("shape", "error", f"{module} has {shapes}, and the configuration gives it rank {rank}")
    # PEFT keeps the rows of A by expert, and the columns of B by direction.
    by_expert = zip(a.reshape(experts, rank, -1), b.reshape(len(b), rank, experts).transpose(2, 0, 1), strict=True)
    spectra = np.array([_singular_values(own_a, own_b) for own_a, own_b in by_expert])
    energy = float((spectra**2).sum())
    effective, numerical = zip(*map(_ranks, spectra), strict=True)
    initial = None
    if config.initialization is True and not embedding:
        initial = float(np.sqrt(np.mean(np.square(a, dtype=np.float64)) * 3 * a.shape[1]))
    return ModuleUpdate(
        module,
        rank,
        experts,
        a.shape[1],
        len(b),
        scale,
        initial,
        float(np.linalg.norm(b.astype(np.float64))),
        scale * math.sqrt(energy),
        min(numerical),
        float(np.mean(effective)),
        float((spectra[:, 0] ** 2).sum() / energy) if energy else 0.0,
    )


def _singular_values(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the singular values of B A, of which there are at most r, in descending order."""
    right: np.ndarray = np.linalg.qr(a.T.astype(np.float64), mode="r")  # type: ignore[assignment]
    left: np.ndarray = np.linalg.qr(b.astype(np.float64), mode="r")  # type: ignore[assignment]
    values: np.ndarray = np.linalg.svd(left @ right.T, compute_uv=False)
    return np.pad(values, (0, len(a) - len(values)))


def _ranks(values: np.ndarray) -> tuple[float, int]:
    """Return the effective rank and the numerical rank that singular values show; both are 0 if all values are."""
    if not values[0]:
        return 0.0, 0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum())), int((values > _DIRECTION * values[0]).sum())


def _plain(module: str) -> str:
    """Return the name without what PEFT adds for the second parameter of a module."""
    return re.sub(r"(\.base_layer)+$", "", module)


def _ends(name: str, end: str) -> bool:
    """Return whether a full name is a shorter one, or ends with it as with whole parts."""
    return name == end or name.endswith(f".{end}")


def _of_patterns(patterns: Mapping[str, Any], names: Mapping[str, list[str]], default: Any) -> dict[str, Any]:
    """Return for each module the value of the first pattern that matches one of its names, or the default."""
    every = [name for own in names.values() for name in own]
    matched = matching([_after_any_path(pattern) for pattern in patterns], every)
    found = [(value, set(matches)) for value, matches in zip(patterns.values(), matched, strict=True)]
    return {
        module: next((value for value, matches in found if matches.intersection(own)), default)
        for module, own in names.items()
    }


def _after_any_path(pattern: str) -> str:
    """Return the regular expression that PEFT makes of a key of `rank_pattern`."""
    return rf"(.*\.)?({pattern})"


def _patterns(raw: Mapping[str, Any]) -> Iterator[str]:
    """Yield the regular expressions of a configuration as PEFT matches them."""
    yield from (raw[key] for key in ("target_modules", "exclude_modules") if isinstance(raw.get(key), str))
    for key, before, after in (
        ("modules_to_save", r"(^|.*\.)", r"($|\..*)"),
        ("layers_pattern", r"(?:^|.*?\.)", r"\.\d+\..*"),
    ):
        names = raw.get(key) or []
        yield from (before + name + after for name in ([names] if isinstance(names, str) else names))
    for key in ("rank_pattern", "alpha_pattern"):
        yield from map(_after_any_path, raw.get(key) or {})


def _finding(code: str, level: Level, message: str) -> Finding:
    return Finding(code, level, message, "the adapter's files", "certain")


def listed(names: list[str]) -> str:
    """Return the first of some names as a part of a sentence."""
    more = f" and {len(names) - _NOT_SHOWN} more" if len(names) > _NOT_SHOWN else ""
    return ", ".join(names[:_NOT_SHOWN]) + more


def _finding_bad(bad: list[str]) -> Iterator[Finding]:
    if bad:
        yield _finding(
            "not-finite", "error", f"{len(bad)} modules have weights that are NaN or infinite: {listed(bad)}"
        )


def _finding_keys(
    config: AdapterConfig, factors: Mapping[str, Mapping[str, str]], foreign: list[str], whole: Mapping[str, int]
) -> Iterator[Finding]:
    """Compare the names in the file with those in the configuration."""
    for there, lacking in ("AB", "BA"):
        half = [module for module, keys in factors.items() if there in keys and lacking not in keys]
        if half:
            yield _finding("missing", "error", f"{len(half)} modules have {there} but no {lacking}: {listed(half)}")
    if not factors:
        yield _finding("missing", "error", "the file has no LoRA weights")
    if foreign:
        message = f"{len(foreign)} names are not of the form `{PREFIX}MODULE.lora_A.weight`, so PEFT ignores them"
        message += f": {listed(foreign)}"
        yield _finding("keys", "error", message)
    plain = {module: _plain(module) for module in factors}
    targeted = config.targeted([*plain.values()])
    unnamed = [module for module, name in plain.items() if name not in targeted]
    if unnamed and (config.targets is not None or config.target_parameters):
        message = f"{len(unnamed)} modules in the file are not among the targets of {CONFIG}, so PEFT ignores them"
        yield _finding("keys", "error", f"{message}: {listed(unnamed)}")
    if not isinstance(config.targets, str):
        unused = [name for name in config.targets or () if not any(_ends(module, name) for module in plain.values())]
        if unused:
            message = f"targets of {CONFIG} have no weights in the file: {listed(unused)}"
            yield _finding("keys", "error" if len(unused) == len(config.targets or ()) else "warning", message)
    yield from _finding_gaps(config, set(plain.values()))
    # PEFT also trains single tokens of an embedding.
    trained = [
        n for n in whole if "token_adapter" in n or any(_ends(n.rpartition(".")[0], m) for m in config.saved_modules)
    ]
    saved = [name for name in whole if name not in trained]
    if trained:
        count = sum(whole[name] for name in trained)
        yield _finding("whole", "note", f"trained whole beside LoRA, with {count:,} parameters: {listed(trained)}")
    if saved:
        message = f"the file holds {sum(whole[name] for name in saved):,} parameters that are no LoRA and not in "
        message += f"modules_to_save, such as PEFT's copy of an embedding with LoRA: {listed(saved)}"
        yield _finding("whole", "note", message)


def _finding_gaps(config: AdapterConfig, modules: set[str]) -> Iterator[Finding]:
    """Find modules that most layers have with LoRA and others lack."""
    by_kind: dict[str, set[int]] = defaultdict(set)
    for module in modules:
        if match := _LAYER.search(f".{module}."):
            by_kind[f".{module}.".replace(match[0], ".*.", 1).strip(".")].add(int(match[1]))
    layers = set().union(*by_kind.values())
    gaps = [f"{kind} of layer {layer}" for kind, own in by_kind.items() for layer in sorted(layers - own)]
    if gaps and config.layers is None:
        yield _finding("gap", "warning", f"other layers have LoRA there, but not {listed(gaps)}")


def _finding_effects(modules: list[ModuleUpdate], count: int) -> Iterator[Finding]:
    """Find updates without effect, of lower rank than they could have, and hardly used ranks."""
    zero = [module.module for module in modules if not module.norm]
    if zero:
        everything = len(zero) == count
        message = "B A is zero in all modules, so the adapter has no effect: it was not trained, or not saved"
        if not everything:
            message = f"B A is zero in {len(zero)} of {count} modules, which have no effect: {listed(zero)}"
        yield _finding("no-effect", "error" if everything else "warning", message)
    deficient = [f"{m.module} ({m.numerical_rank} of {m.rank})" for m in modules if 0 < m.numerical_rank < m.limit]
    if deficient:
        message = f"the update of {len(deficient)} modules has a lower rank than r: {listed(deficient)}"
        yield _finding("rank", "warning", message)
    used = [module for module in modules if module.norm]
    if used:
        shares = sorted(module.effective_rank / module.limit for module in used)
        median = shares[len(shares) // 2]
        if median < 0.1:
            message = f"half of the modules have an effective rank below {median:.0%} of r"
            yield _finding("rank", "note", f"{message}: a lower rank might have done")

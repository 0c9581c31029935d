"""What an `adapter_config.json` of PEFT says of LoRA, for the audit and for the checks of weights; without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import Field

from lora_advice.foreign import Foreign
from lora_advice.limits import matching

NAME = "adapter_config.json"

_Name = Annotated[str, Field(max_length=1000)]
_Rank = Annotated[int, Field(ge=1, le=65_536)]
_Alpha = Annotated[float, Field(gt=0, le=1e9)]


class AdapterConfig(Foreign):
    """The options of LoRA by PEFT's names; null is what the file does not say."""

    peft_type: Literal["LORA"]
    r: _Rank
    lora_alpha: _Alpha
    lora_dropout: float | None = Field(None, ge=0, le=1)
    base_model_name_or_path: str | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    init_lora_weights: bool | _Name | None = True
    rank_pattern: dict[_Name, _Rank] | None = None
    alpha_pattern: dict[_Name, _Alpha] | None = None
    target_modules: tuple[_Name, ...] | str | None = None
    exclude_modules: tuple[_Name, ...] | str | None = None
    target_parameters: tuple[_Name, ...] | None = None
    modules_to_save: tuple[_Name, ...] | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layer_replication: Any = None

    @property
    def targets(self) -> tuple[str, ...] | str | None:
        """Names of modules, in order, or a regular expression of them."""
        named = self.target_modules
        return tuple(sorted(named)) if isinstance(named, tuple) else named

    @cached_property
    def _parameters(self) -> Mapping[str, Sequence[str]]:
        """The last parts of the names of target parameters, by what stands before."""
        by_owner: dict[str, list[str]] = {}
        for name in sorted(self.target_parameters or ()):
            owner, _, last = name.rpartition(".")
            by_owner.setdefault(owner, []).append(last)
        return by_owner

    def parameters_in(self, module: str) -> list[str]:
        """Return the names of the parameters of a module that carry LoRA without being modules."""
        return [f"{module}.{last}" for owner in ends(module) for last in self._parameters.get(owner, ())]

    def targeted(self, modules: Sequence[str]) -> set[str]:
        """Return the modules on which the configuration puts LoRA."""
        if self.targets == "all-linear":
            named = list(modules)
        elif isinstance(self.targets, str):
            [named] = matching([self.targets], modules)
        else:
            wanted = set(self.targets or ())
            named = [module for module in modules if not wanted.isdisjoint(ends(module))]
        return {*named, *filter(self.parameters_in, modules)}

    def scale(self, rank: int, alpha: float) -> float:
        """Return the factor of B A for a rank and an alpha."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def scales(self, modules: Sequence[str]) -> dict[str, tuple[int, float]]:
        """Return the rank and the scale of each module, as PEFT finds them."""
        names = {module: [*self.parameters_in(module), module] for module in modules}
        ranks = _of_patterns(self.rank_pattern or {}, names, self.r)
        alphas = _of_patterns(self.alpha_pattern or {}, names, self.lora_alpha)
        return {module: (ranks[module], self.scale(ranks[module], alphas[module])) for module in modules}


def ends(name: str) -> Iterator[str]:
    """Yield a full name, and what is left of it from each of its further parts on: the names that end it."""
    parts = name.split(".")
    yield from (".".join(parts[start:]) for start in range(len(parts)))


def _of_patterns(patterns: Mapping[str, Any], names: Mapping[str, list[str]], default: Any) -> dict[str, Any]:
    """Return for each module the value of the first pattern that matches one of its names, or the default."""
    every = [name for own in names.values() for name in own]
    matched = matching([rf"(.*\.)?({pattern})" for pattern in patterns], every)  # as PEFT makes them
    found = [(value, set(matches)) for value, matches in zip(patterns.values(), matched, strict=True)]
    return {
        module: next((value for value, matches in found if matches.intersection(own)), default)
        for module, own in names.items()
    }

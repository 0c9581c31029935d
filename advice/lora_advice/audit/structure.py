"""Findings about what is trained: layers without LoRA, experts that it misses, tied layers, and parameters.

What PEFT does with fused experts was tried with PEFT 0.21 and transformers 5.24 on tiny models of each family.
`experts.csv` has by family the names of an expert's former modules that PEFT takes for the fused ones, of which the
first two are one; whether it has another MLP than that of the experts; and whether these were fused before transformers
5. `missed_experts.csv` decides what is said of experts without LoRA: the first row that fits counts.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lora_advice import formats
from lora_advice.audit.config import TrainingConfig, say
from lora_advice.audit.readers.options import frameworks
from lora_advice.errors import UserError
from lora_advice.finding import Finding, Level
from lora_advice.limits import matching
from lora_advice.models import FUSED, Kind, ModelFacts, module_kind

# The frameworks that hand their targets to PEFT; the first two look for the names of all linear layers themselves.
_OWN_NAMES = ("axolotl", "llamafactory")
_PEFT = (*_OWN_NAMES, "trl", "peft")
_EMBEDDINGS = frozenset({"embed_tokens", "lm_head"})
_EXPERT_PARAMETERS = frozenset({"gate_up_proj", "down_proj", "up_proj", "gate_proj", "w1", "w2", "w3"})
_KINDS: dict[Kind, str] = {
    "attention": "attention",
    "mlp": "the MLP",
    "experts": "experts",
    "unembedding": "the unembedding",
}


@cache
def families() -> dict[str, dict[str, str]]:
    """Return the rows of `experts.csv` by family."""
    return {row["family"]: row for row in _rows("experts.csv")}


@cache
def _rows(name: str) -> list[dict[str, str]]:
    with Path(__file__).with_name(name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@dataclass(frozen=True)
class Adapted:
    """The layers with LoRA, by what a configuration says of them."""

    names: frozenset[str]  # last parts of names of modules; without those that `all_linear` stands for
    kinds: frozenset[Kind | None]  # None stands for modules whose kind the name does not say
    all_linear: bool = False
    by_default: bool = False  # whether PEFT chooses them, since the file does not


def adapted(config: TrainingConfig, model: ModelFacts | None) -> Adapted | None:
    """Return which layers have LoRA, None if none or unknown; a bad regular expression raises UserError."""
    if config.method != "lora":
        return None
    if config.targets is None:
        families_of_two = frameworks()["peft"]["queries_and_values"]
        if config.format == "trl" and model is not None and model.family in families_of_two:
            return Adapted(frozenset({"q_proj", "v_proj"}), frozenset({"attention"}), by_default=True)
        return None
    all_linear = "all-linear" in config.targets
    names, kinds = set[str](), set[Kind | None](("attention", "mlp") if all_linear else ())
    for target in config.targets:
        modules = _modules(target) if target != "all-linear" else ["all-linear"]
        if not modules:
            return None
        if target != "all-linear":
            names |= {module.rpartition(".")[2] for module in modules}
            kinds |= {module_kind(module) for module in modules}
    for parameter in config.target_parameters:
        last = parameter.removesuffix(".weight").rpartition(".")[2]
        if last in _EXPERT_PARAMETERS:
            kinds.add("experts")
        else:
            names.add(last)
            kinds.add(module_kind(last))
    return Adapted(frozenset(names), frozenset(kinds), all_linear) if kinds else None


@cache
def _modules(target: str) -> list[str]:
    """Return a module's name; of a regular expression the usual names of modules that it matches as a whole."""
    if not re.search(r"[\\^$*+?()\[\]|{}]", target):
        return [target]
    try:
        re.compile(target)
    except (re.error, OverflowError):  # Megatron's targets have other wildcards
        return []
    parts = [f"self_attn.{name}_proj" for name in "qkvo"]
    parts += [f"mlp{place}.{name}_proj" for place in ("", ".experts") for name in ("gate", "up", "down")]
    before = ("model.layers.1.", "model.language_model.layers.1.", "language_model.model.layers.1.")
    return matching([target], [start + part for start in before for part in parts])[0]


def check_layers(config: TrainingConfig, model: ModelFacts | None) -> Iterator[Finding]:
    """Yield what is found of the layers that a run trains, and their number of parameters."""
    lora, fused = None, list[Finding]()
    try:
        lora = adapted(config, model)
    except UserError as error:
        yield say("slow-pattern", config.line("targets"), error=error)
    if lora is not None and model is not None:
        fused = _fused(config, model, lora)
        yield from [*_missed(config, model, lora), *fused]
    dense = model is None or not model.mixture
    if lora is not None and lora.kinds == {"attention"} and dense and not fused:
        which = "queries and values alone" if lora.names == {"q_proj", "v_proj"} else "attention alone"
        which += ", PEFT's default where no targets are said" if lora.by_default else ""
        yield say("attention-only", config.line("targets", "rank", "method"), which=which, names=listed(lora.names))
    if config.method == "lora":
        yield from _embeddings(config, model)
    if model is not None and model.parameters is not None:
        yield from _parameters(config, model, model.parameters, lora)


def _missed(config: TrainingConfig, model: ModelFacts, lora: Adapted) -> list[Finding]:
    """Return the finding that no expert of a mixture has LoRA; none if they have it, or if that is not known."""
    if not model.mixture or "experts" in lora.kinds:
        return []
    line = config.line("targets", "target_parameters", "method")
    in_peft = config.format in _PEFT and model.fused_experts
    right = ""
    if in_peft and config.format == "llamafactory":
        right = "; LLaMA-Factory has no option for parameters that are no modules"
    elif in_peft:
        option = "lora_target_parameters" if config.format == "axolotl" else "target_parameters"
        first = "up_proj" if model.family == "nemotron_h" else "gate_up_proj"
        right = f"; {option} with experts.{first} and experts.down_proj would train them"
    experts = f"none of the {f'{model.experts} ' if model.experts else ''}experts of {model.name}"
    values = {"names": listed(lora.names), "model": model.name, "right": right, "rest": "", "experts": experts}
    if "mlp" not in lora.kinds and None not in lora.kinds:
        return [say("no-experts", line, **values)]
    family, stated = families().get(model.family), {name for name in lora.names if module_kind(name) == "mlp"}
    if family is None or not in_peft or not (lora.all_linear or stated):
        return []
    former, targets = family["former_modules"].split(), "other modules"
    if lora.all_linear:
        targets = "all-linear"
    elif stated & {*former}:
        targets = "half of a fused one" if len({*former[:2]} & lora.names) == 1 else "former modules"
    # PEFT 0.18, which LLaMA-Factory asks for, does not know that experts are fused.
    situation = {
        "targets": targets,
        "converts": "yes" if former and config.format != "llamafactory" else "no",
        "own_names": "yes" if config.format in _OWN_NAMES else "no",
        "other_mlp": family["other_mlp"],
    }
    fits = (row for row in _rows("missed_experts.csv") if all(row[key] in ("any", situation[key]) for key in situation))
    row = next(fits)
    if not row["text"]:
        return []
    sure = "certain for transformers 5"
    if family["fused_before"] == "no":
        sure += ", which fuses experts; in transformers 4 they are modules"
    if row["text"] == "unmatched-experts" and row["level"] == "error":
        sure = "certain"
    if not lora.all_linear:
        values["names"] = listed(stated)
    elif family["other_mlp"] == "no":
        values["rest"] = ", but attention alone"
    if row["text"] == "half-fused":
        values |= {"first": former[0], "second": former[1]}
    return [say(row["text"], line, level=row["level"], sure=sure, **values)]


def _fused(config: TrainingConfig, model: ModelFacts, lora: Adapted) -> list[Finding]:
    """Return whether LoRA is put on parts of layers that are one layer in the model, which PEFT does not find."""
    # A finished adapter was trained.
    if config.format not in _PEFT or config.format == "peft" or model.mixture or lora.all_linear:
        return []
    fused = [name for name in FUSED if name in model.linear and name not in lora.names and FUSED[name] & lora.names]
    if not fused or config.unsloth or "unsloth" in model.name.lower():
        return []
    trained = lora.names & set(model.linear)
    # The name of a copy does not say whether the layers are apart in it, as in unsloth's.
    original = model.name.startswith("microsoft/") or model.source.startswith("its config.json")
    level: Level = "error" if original and not trained else "warning"
    values = {
        "names": listed(set().union(*(FUSED[name] for name in fused)) & lora.names),
        "model": model.name,
        "right": " and ".join(fused),
        "happens": f"trains {listed(trained)} alone" if trained else "stops with an error",
        "sure": "certain" if original else "certain unless the copy has them apart, as unsloth's have",
    }
    return [say("fused", config.line("targets"), level=level, **values)]


def _embeddings(config: TrainingConfig, model: ModelFacts | None) -> Iterator[Finding]:
    """Yield what is odd about training embedding and unembedding: ties, and whole matrices at LoRA's learning rate."""
    targets, saved = _EMBEDDINGS & {*(config.targets or ())}, _EMBEDDINGS & {*config.saved_modules}
    if model is not None and model.tied and targets | saved and config.format in _PEFT:
        happens = "merging LoRA changes both" if targets else "each that is saved becomes a copy of its own"
        line = config.line("saved_modules", "targets")
        yield say("tied", line, model=model.name, names=listed(targets | saved), happens=happens)
    if saved:
        size = " are" if len(saved) > 1 else " is"
        if model is not None and model.vocabulary:
            size = f" ({formats.parameters(len(saved) * model.vocabulary * model.width)} parameters){size}"
        at = f" {config.lr:g}" if config.lr is not None else ""
        yield say("whole", config.line("saved_modules"), names=listed(saved), size=size, at=at)


def trained_parameters(config: TrainingConfig, model: ModelFacts, lora: Adapted) -> dict[Kind, int] | None:
    """Return LoRA's number of parameters by the kind of layer; None if the layers or sizes are not known."""
    if not config.rank or not model.linear:
        return None
    names = set(lora.names)
    if lora.all_linear:
        names |= {name for name, linear in model.linear.items() if linear.kind in ("attention", "mlp")}
    factors = dict.fromkeys(names, 1)
    if model.mixture:
        by_parameter = {name.rpartition(".")[2] for name in config.target_parameters}
        experts = dict.fromkeys(by_parameter & {"gate_up_proj", "down_proj"}, 1)
        converted = families().get(model.family, {}).get("former_modules", "").split()
        if config.format in _PEFT and not by_parameter and not _missed(config, model, lora):
            # PEFT doubles the rank where two former modules are one.
            experts = {"gate_up_proj": 2, "down_proj": 1} if lora.all_linear or names & {*converted} else {}
        others = names - {*converted, "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
        factors = dict.fromkeys(others, 1) | experts
    if not factors.keys() <= model.linear.keys():
        return None
    trained: dict[Kind, int] = {}
    for name, factor in factors.items():
        layer = model.linear[name]
        own = config.rank * factor * layer.number * (layer.d_in + layer.d_out)
        trained[layer.kind] = trained.get(layer.kind, 0) + own
    return trained


def _parameters(config: TrainingConfig, model: ModelFacts, parameters: int, lora: Adapted | None) -> Iterator[Finding]:
    """Yield how many parameters are trained, LoRA's by the kind of layer, and the memory that this takes."""
    if config.method == "fullft":
        frozen, total = 0.0, parameters
        what = f"full fine-tuning trains {formats.parameters(total)} parameters"
    elif lora is not None and (trained := trained_parameters(config, model, lora)):
        frozen, total = parameters * (config.bits or 16) / 8, sum(trained.values())
        parts = [f"{formats.parameters(trained[kind])} in {name}" for kind, name in _KINDS.items() if kind in trained]
        what = (
            f"LoRA of rank {config.rank} trains {formats.parameters(total)} parameters, {total / parameters:.2%} "
            f"of the model's {formats.parameters(parameters)}: {', '.join(parts)}"
        )
    else:
        return
    # What is trained takes 8 bytes per parameter if weights, gradients and moments are in bf16, and 16 in fp32.
    low, high = (f"{(frozen + size * total) / 1e9:.3g}" for size in (8, 16))
    yield say("parameters", config.line("rank"), what=what, low=low, high=high, source=model.source)


def listed(names: Collection[str]) -> str:
    """Return names in their order, as a part of a sentence."""
    *most, last = sorted(names) or [""]
    return f"{', '.join(most)} and {last}" if most else last

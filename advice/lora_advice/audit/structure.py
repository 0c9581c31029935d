"""Findings about what is trained: layers without LoRA, experts that it misses, tied layers, parameters and capacity.

What PEFT does with fused experts was tried with PEFT 0.21 and transformers 5.24 on tiny models of each family.
`experts.csv` has by family the names of an expert's former modules that PEFT takes for the fused ones, of which the
first two are one; whether it has another MLP than that of the experts; and whether these were fused before transformers
5. `missed_experts.csv` decides what is said of experts without LoRA: the first row that fits counts.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from lora_advice import formats
from lora_advice.audit.config import Knowledge, TrainingConfig
from lora_advice.audit.texts import say
from lora_advice.finding import Finding, Level
from lora_advice.layers import FUSED, Kind, module_kind
from lora_advice.models import ModelFacts, facts
from lora_advice.patterns import PatternError, SlowPatternError, matching

QUERIES_AND_VALUES = frozenset(
    [
        *("llama", "llama4", "mistral", "mixtral", "stablelm", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"),
        *("opt", "gptj", "gpt_neo"),
    ]
)
"""The families of which PEFT adapts `q_proj` and `v_proj` where no targets are said."""


@dataclass(frozen=True)
class Family:
    """How a family of mixtures holds its experts."""

    former_modules: tuple[str, ...]
    other_mlp: str
    fused_before: str


@cache
def families() -> dict[str, Family]:
    """Return the families of `experts.csv`."""
    rows = _rows("experts.csv")
    return {row.pop("family"): Family(tuple(row.pop("former_modules").split()), **row) for row in rows}


@cache
def _rows(name: str) -> list[dict[str, str]]:
    with Path(__file__).with_name(name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# The frameworks that hand their targets to PEFT; the first two look for the names of all linear layers themselves.
_OWN_NAMES = ("axolotl", "llamafactory")
_PEFT = (*_OWN_NAMES, "trl", "peft")
_EMBEDDINGS = frozenset({"embed_tokens", "lm_head"})
_EXPERT_PARAMETERS = frozenset({"gate_up_proj", "down_proj", "up_proj", "gate_proj", "w1", "w2", "w3"})
H100 = 0.35 * 989.5e12
"""FLOP/s of training on an H100: an assumed 35% of its peak in bf16."""


@dataclass(frozen=True)
class Adapted:
    """The layers with LoRA, by what a configuration says of them."""

    names: frozenset[str]
    """Last parts of names of modules; without those that `all_linear` stands for."""
    kinds: frozenset[Kind | None]
    """None stands for modules whose kind the name does not say."""
    all_linear: bool = False
    by_default: bool = False
    """Whether PEFT chooses them, since the file does not."""


def adapted(config: TrainingConfig, model: ModelFacts | None) -> Adapted | None:
    """Return which layers have LoRA; None if the run has none, or if it is not known."""
    if config.method != "lora":
        return None
    targets = config.targets
    if targets is None:
        if config.format == "trl" and model is not None and model.family in QUERIES_AND_VALUES:
            return Adapted(frozenset({"q_proj", "v_proj"}), frozenset({"attention"}), by_default=True)
        return None
    names: set[str] = set()
    kinds: set[Kind | None] = set()
    for target in targets:
        if target == "all-linear":
            kinds |= {"attention", "mlp"}
            continue
        modules = _matching(target) if _is_pattern(target) else [target]
        if not modules or isinstance(modules, SlowPatternError):
            return None
        names |= {module.rpartition(".")[2] for module in modules}
        kinds |= {module_kind(module) for module in modules}
    for parameter in config.target_parameters:
        last = parameter.removesuffix(".weight").rpartition(".")[2]
        if last in _EXPERT_PARAMETERS:
            kinds.add("experts")
        else:
            names.add(last)
            kinds.add(module_kind(last))
    if not kinds:
        return None
    return Adapted(frozenset(names), frozenset(kinds), "all-linear" in targets)


def _is_pattern(target: str) -> bool:
    return re.search(r"[\\^$*+?()\[\]|{}]", target) is not None


@cache
def _matching(pattern: str) -> list[str] | SlowPatternError:
    """Return those of the usual names of modules that a regular expression matches as a whole, as in PEFT."""
    parts = [f"self_attn.{name}_proj" for name in "qkvo"]
    parts += [f"mlp{place}.{name}_proj" for place in ("", ".experts") for name in ("gate", "up", "down")]
    before = ("model.layers.1.", "model.language_model.layers.1.", "language_model.model.layers.1.")
    try:
        [names] = matching([pattern], [start + part for start in before for part in parts])
    except SlowPatternError as error:
        return error
    except PatternError:
        return []
    return names


def _known(config: TrainingConfig, known: Knowledge) -> ModelFacts | None:
    return facts(config.model, Path(config.path).parent, known.hub)


def check_patterns(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return which targets are regular expressions that take too long."""
    results = (_matching(target) for target in config.targets or () if _is_pattern(target))
    slow = (result for result in results if isinstance(result, SlowPatternError))
    return [say("slow-pattern", config.line("targets"), error=error) for error in slow]


def check_experts(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return whether LoRA misses the experts of a mixture, or PEFT refuses to put it there."""
    model = _known(config, known)
    lora = adapted(config, model)
    if model is None or not model.mixture or lora is None:
        return []
    reached, line = "experts" in lora.kinds, config.line("targets", "target_parameters", "method")
    missed = None if reached else _missed(config, model, lora)
    if missed is not None:
        return [replace(missed, line=line)]
    # Axolotl leaves out dropout on experts, and a finished adapter was trained.
    if config.dropout and config.format in ("llamafactory", "trl"):
        family = families().get(model.family)
        by_name = family is not None and (lora.all_linear or lora.names & {*family.former_modules})
        if reached or (by_name and family is not None and family.former_modules):
            return [say("dropout", line, model=model.name, dropout=config.dropout)]
    return []


def _missed(config: TrainingConfig, model: ModelFacts, lora: Adapted) -> Finding | None:
    """Return the finding that no expert has LoRA; None if they have it, or if that is not known."""
    values = {"names": listed(lora.names), "model": model.name, "right": _how_to_reach(config, model), "rest": ""}
    values["experts"] = f"none of the {f'{model.experts} ' if model.experts else ''}experts of {model.name}"
    if not lora.kinds & {"mlp", "experts"} and None not in lora.kinds:
        return say("no-experts", **values)
    family = families().get(model.family)
    if family is None or config.format not in _PEFT or not model.fused_experts:
        return None
    stated, former = {name for name in lora.names if module_kind(name) == "mlp"}, family.former_modules
    targets = "other modules"
    if lora.all_linear:
        targets = "all-linear"
    elif not stated:
        return None
    elif stated & {*former}:
        targets = "half of a fused one" if len({*former[:2]} & lora.names) == 1 else "former modules"
    # PEFT 0.18, which LLaMA-Factory asks for, does not know that experts are fused.
    situation = {
        "targets": targets,
        "converts": "yes" if former and config.format != "llamafactory" else "no",
        "own_names": "yes" if config.format in _OWN_NAMES else "no",
        "other_mlp": family.other_mlp,
    }
    fits = (row for row in _rows("missed_experts.csv") if all(row[key] in ("any", situation[key]) for key in situation))
    row = next(fits)
    if not row["text"]:
        return None
    sure = "certain for transformers 5"
    if family.fused_before == "no":
        sure += ", which fuses experts; in transformers 4 they are modules"
    if row["text"] == "unmatched-experts" and row["level"] == "error":
        sure = "certain"
    if not lora.all_linear:
        values["names"] = listed(stated)
    elif family.other_mlp == "no":
        values["rest"] = ", but attention alone"
    if row["text"] == "half-fused":
        values |= {"first": former[0], "second": former[1]}
    return say(row["text"], level=row["level"], sure=sure, **values)


def _how_to_reach(config: TrainingConfig, model: ModelFacts) -> str:
    """Return the end of a sentence that says how the experts would be trained, if there is a way."""
    if config.format not in _PEFT or not model.fused_experts:
        return ""
    if config.format == "llamafactory":
        return "; LLaMA-Factory has no option for parameters that are no modules"
    option = "lora_target_parameters" if config.format == "axolotl" else "target_parameters"
    first = "up_proj" if model.family == "nemotron_h" else "gate_up_proj"
    return f"; {option} with experts.{first} and experts.down_proj would train them"


def check_fused(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return whether LoRA is put on parts of layers that are one layer in the model, which PEFT does not find."""
    model = _known(config, known)
    lora = adapted(config, model)
    # A finished adapter was trained.
    if model is None or lora is None or config.format not in _PEFT or config.format == "peft":
        return []
    if model.mixture or lora.all_linear or config.unsloth or "unsloth" in model.name.lower():
        return []
    fused = [name for name in FUSED if name in model.linear and name not in lora.names and FUSED[name] & lora.names]
    if not fused:
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


def check_attention_only(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return whether a dense model has LoRA on attention alone."""
    model = _known(config, known)
    lora = adapted(config, model)
    if lora is None or lora.kinds != {"attention"} or (model is not None and model.mixture):
        return []
    if check_fused(config, known):
        return []
    which = "attention alone"
    if lora.names == {"q_proj", "v_proj"}:
        which = "queries and values alone" + (", PEFT's default where no targets are said" if lora.by_default else "")
    return [say("attention-only", config.line("targets", "rank", "method"), which=which, names=listed(lora.names))]


def check_unembedding(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return what is odd about training embedding and unembedding: ties, and whole matrices at LoRA's learning rate."""
    model = _known(config, known)
    if config.method != "lora":
        return []
    findings = []
    targets, saved = _EMBEDDINGS & {*(config.targets or ())}, _EMBEDDINGS & {*config.saved_modules}
    if model is not None and model.tied and targets | saved and config.format in _PEFT:
        happens = "merging LoRA changes both" if targets else "each that is saved becomes a copy of its own"
        line = config.line("saved_modules", "targets")
        findings.append(say("tied", line, model=model.name, names=listed(targets | saved), happens=happens))
    if saved:
        size = " are" if len(saved) > 1 else " is"
        if model is not None and model.vocabulary:
            size = f" ({formats.parameters(len(saved) * model.vocabulary * model.width)} parameters){size}"
        at = f" {config.lr:g}" if config.lr is not None else ""
        findings.append(say("whole", config.line("saved_modules"), names=listed(saved), size=size, at=at))
    return findings


def trained_parameters(config: TrainingConfig, model: ModelFacts | None) -> dict[Kind, int] | None:
    """Return LoRA's number of parameters by the kind of layer; None if the layers or sizes are not known."""
    lora = adapted(config, model)
    if lora is None or model is None or not config.rank or not model.linear:
        return None
    names = set(lora.names)
    if lora.all_linear:
        names |= {name for name, linear in model.linear.items() if linear.kind in ("attention", "mlp")}
    trained: dict[Kind, int] = {}
    if model.mixture:
        by_parameter = {name.rpartition(".")[2] for name in config.target_parameters}
        factors = dict.fromkeys(by_parameter & {"gate_up_proj", "down_proj"}, 1)
        family = families().get(model.family)
        converted = family.former_modules if family else ()
        if config.format in _PEFT and not by_parameter and _missed(config, model, lora) is None:
            # PEFT doubles the rank where two former modules are one.
            factors = {"gate_up_proj": 2, "down_proj": 1} if lora.all_linear or names & {*converted} else {}
        names -= {*converted, "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
        experts = [(model.linear[name], factor) for name, factor in factors.items()]
        if experts:
            trained["experts"] = sum(
                config.rank * factor * layer.number * (layer.d_in + layer.d_out) for layer, factor in experts
            )
    if not names <= set(model.linear):
        return None
    for name in names:
        layer = model.linear[name]
        own = config.rank * layer.number * (layer.d_in + layer.d_out)
        trained[layer.kind] = trained.get(layer.kind, 0) + own
    return trained


def check_parameters(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return how many parameters are trained, LoRA's by the kind of layer, and the memory and hours that this takes."""
    model = _known(config, known)
    if model is None or model.parameters is None:
        return []
    trained = {} if config.method == "fullft" else trained_parameters(config, model)
    if trained is None or (config.method != "fullft" and not trained):
        return []
    total, order = sum(trained.values()) or model.parameters, ("attention", "mlp", "experts", "unembedding")
    what = f"full fine-tuning trains {formats.parameters(total)} parameters"
    if trained:
        parts = [f"{formats.parameters(trained[kind])} in {_KINDS[kind]}" for kind in order if kind in trained]
        what = (
            f"LoRA of rank {config.rank} trains {formats.parameters(total)} parameters, {total / model.parameters:.2%} "
            f"of the model's {formats.parameters(model.parameters)}: {', '.join(parts)}"
        )
    costs, sure = _costs(config, model, total if trained else None)
    return [say("parameters", config.line("rank"), what=what, costs=costs, source=model.source, sure=sure)]


def _costs(config: TrainingConfig, model: ModelFacts, lora: int | None) -> tuple[str, str]:
    """Return the memory of weights, gradients and Adam's moments and, if the tokens are bounded, hours of a GPU.

    What is trained takes 8 bytes per parameter if all is in bf16, and 16 if all is in fp32. A token takes 6 FLOPs per
    parameter, and 4 where the weights get no gradient.
    """
    assert model.parameters
    frozen = model.parameters * (config.bits or 16) / 8 if lora else 0.0
    low, high = (frozen + size * (lora or model.parameters) for size in (8, 16))
    text = f"; weights, gradients and Adam's moments take {low / 1e9:.3g} to {high / 1e9:.3g} GB, and activations more"
    steps, batch, length = config.steps, config.batch_size, config.max_length
    if config.task != "sft" or not (steps and steps > 0 and batch and length) or model.mixture:
        return text, "certain"
    hours = (4 if lora else 6) * model.parameters * steps * batch * length / H100 / 3600
    each = " for each device" if config.devices is None and config.global_batch is None else ""
    text += f"; {steps:g} steps take at most {hours:.2g} hours of an H100{each}"
    return text, "certain, but the hours, which are at 35% of its peak"


_KINDS = {"attention": "attention", "mlp": "the MLP", "experts": "experts", "unembedding": "the unembedding"}


def check_capacity(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return whether a supervised run has more scored tokens than LoRA has parameters."""
    trained = trained_parameters(config, _known(config, known))
    if not trained or config.task != "sft":
        return []
    parameters = sum(trained.values())
    tokens, what = None, ""
    if known.completion_tokens is not None and config.examples:
        tokens = known.completion_tokens * config.examples
        what = f"the data have {formats.parameters(round(tokens))} scored tokens"
    elif config.packing and config.steps and config.batch_size and config.max_length and not config.epochs:
        tokens = config.steps * config.batch_size * config.max_length
        what = f"{config.steps:g} steps see at most {formats.parameters(round(tokens))} tokens, prompts included"
    if tokens is None or tokens <= parameters:
        return []
    bound = known.completion_tokens is None
    values = {
        "what": what,
        "rank": config.rank,
        "parameters": formats.parameters(parameters),
        "enough": -(-round(tokens) * (config.rank or 1) // parameters),
        "bound": "an upper bound of the tokens" if bound else "the tokens are yours",
    }
    return [say("capacity", config.line("rank"), level="note" if bound else "warning", **values)]


def listed(names: Collection[str]) -> str:
    """Return names in their order, as a part of a sentence."""
    *most, last = sorted(names) or [""]
    return f"{', '.join(most)} and {last}" if most else last


CHECKS = (
    *(check_patterns, check_experts, check_fused, check_attention_only, check_unembedding, check_parameters),
    check_capacity,
)

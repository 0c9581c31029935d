"""Findings about what is trained: layers without LoRA, experts that it misses, tied layers, parameters and capacity.

What PEFT does with fused experts was tried with PEFT 0.21 and transformers 5.24 on tiny models of each family.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from lora_advice import formats
from lora_advice.audit.config import Knowledge, TrainingConfig
from lora_advice.audit.readers.options import THE_FILE
from lora_advice.audit.settings import RATIO, RATIO_HIGH, RATIO_LOW
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

CONVERTED = {
    **dict.fromkeys(
        [
            *("qwen3_moe", "deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "olmoe", "afmoe"),
            *("ernie4_5_moe", "qwen3_next"),
        ],
        ("gate_proj", "up_proj", "down_proj"),
    ),
    **dict.fromkeys(["mixtral", "minimax_m2"], ("w1", "w3", "w2")),
}
"""By family, the names of an expert's former modules that PEFT takes for the fused ones; the first two are one."""

NO_OTHER_MLP = frozenset(
    ["qwen3_moe", "mixtral", "gpt_oss", "olmoe", "granitemoe", "phimoe", "minimax_m2", "qwen3_vl_moe"]
)
"""Families with no MLP but that of the experts: no dense layers and no shared experts."""

_OTHERS = frozenset(
    [
        *("qwen2_moe", "llama4", "llama4_text", "kimi_linear", "qwen3_5_moe", "qwen3_5_moe_text", "jamba"),
        *("nemotron_h",),
    ]
)
# The frameworks that hand their targets to PEFT; the first two look for the names of all linear layers themselves.
_OWN_NAMES = ("axolotl", "llamafactory")
_PEFT = (*_OWN_NAMES, "trl", "peft")
# PEFT 0.18, which LLaMA-Factory asks for, does not know that experts are fused.
_WITHOUT_CONVERSION = ("llamafactory",)

_TRIED = "PEFT 0.21 and transformers 5.24, tried on tiny models"
_MODULES = "the names of modules in transformers 5"
_PLACEMENT = "the paper, figure 4; claims E1, E2 and E5 of docs/results.md"
_MEASURED = (
    "the paper found it on 8B and 30B models without intervals; measured here: 0.020 nats [0.004, 0.037] at 0.13B, "
    "which is borderline, and 0.008 [0.000, 0.016] at 0.8M parameters, which is undecided"
)
_EMBEDDINGS = frozenset({"embed_tokens", "lm_head"})
_EXPERT_PARAMETERS = frozenset({"gate_up_proj", "down_proj", "up_proj", "gate_proj", "w1", "w2", "w3"})


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

    @property
    def attention_alone(self) -> bool:
        """Whether all of them are of attention."""
        return self.kinds == {"attention"}


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


def check_patterns(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return which targets are regular expressions that take too long."""
    results = [_matching(target) for target in config.targets or () if _is_pattern(target)]
    sure, line = "certain for PEFT, which matches them too", config.line("targets")
    return [
        Finding("not-read", "warning", f"{error}, so the layers with LoRA are not known", THE_FILE, sure, line=line)
        for error in results
        if isinstance(error, SlowPatternError)
    ]


H100 = 0.35 * 989.5e12
"""FLOP/s of training on an H100: an assumed 35% of its peak in bf16."""


def _known(config: TrainingConfig, known: Knowledge) -> ModelFacts | None:
    return facts(config.model, Path(config.path).parent, known.hub)


def check_experts(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return whether LoRA misses the experts of a mixture, or PEFT refuses to put it there."""
    model = _known(config, known)
    lora = adapted(config, model)
    if model is None or not model.mixture or lora is None:
        return []
    line = config.line("targets", "target_parameters", "method")
    reached = "experts" in lora.kinds
    finding = None if reached else _missed(config, model, lora)
    if finding is None and config.format in _PEFT and config.format not in ("axolotl", "peft"):
        # Axolotl leaves out dropout on experts, and a finished adapter was trained.
        by_name = lora.all_linear or lora.names & {*CONVERTED.get(model.family, ())}
        if config.dropout and (reached or (by_name and model.family in CONVERTED)):
            message = (
                f"LoRA on the fused experts of {model.name} does not work with lora_dropout {config.dropout:g}: PEFT "
                "stops with an error; it has to be 0"
            )
            finding = Finding("experts", "error", message, _TRIED, "certain for PEFT 0.21 and transformers 5")
    return [] if finding is None else [replace(finding, line=line)]


def _missed(config: TrainingConfig, model: ModelFacts, lora: Adapted) -> Finding | None:
    """Return the finding that no expert has LoRA; None if they have it, or if that is not known."""
    number = f"{model.experts} " if model.experts else ""
    experts, right = f"none of the {number}experts of {model.name}", _how_to_reach(config, model)
    if not lora.kinds & {"mlp", "experts"} and None not in lora.kinds:
        message = f"LoRA on {_listed(lora.names)} trains {experts}, which hold most of its parameters{right}"
        return Finding("experts", "warning", message, _MODULES, "certain that no expert is trained; " + _MEASURED)
    if config.format not in _PEFT or not model.fused_experts:
        return None
    converted = CONVERTED.get(model.family)
    convertible = converted is not None and config.format not in _WITHOUT_CONVERSION
    if converted is None and model.family not in NO_OTHER_MLP | _OTHERS:
        return None
    certain = "certain for transformers 5"
    if model.family not in ("gpt_oss", "llama4", "llama4_text", "granitemoe"):
        certain += ", which fuses experts; in transformers 4 they are modules"
    if lora.all_linear:
        if convertible and (config.format not in _OWN_NAMES or model.family not in NO_OTHER_MLP):
            return None
        rest = ", but attention alone" if model.family in NO_OTHER_MLP else ""
        message = f"LoRA on all linear layers trains {experts}, which are no linear layers{rest}{right}"
        return Finding("experts", "warning", message, _TRIED, certain)
    stated = sorted(name for name in lora.names if module_kind(name) == "mlp")
    if not stated:
        return None
    if convertible and converted and set(stated) & set(converted):
        if len({*converted[:2]} & lora.names) == 1:
            message = (
                f"PEFT stops with an error: of {converted[0]} and {converted[1]}, which are one fused parameter of the "
                f"experts of {model.name}, the targets have one alone"
            )
            return Finding("experts", "error", message, _TRIED, certain)
        return None
    if model.family in NO_OTHER_MLP:
        # In transformers 4, what PEFT would convert are modules.
        level: Level = "warning" if set(stated) & set(converted or ()) else "error"
        certain = certain if level == "warning" else "certain"
        message = f"{_listed(stated)} match nothing, and LoRA trains {experts}, which are fused parameters{right}"
    else:
        level = "warning"
        message = f"{_listed(stated)} are dense layers and shared experts alone, and LoRA trains {experts}{right}"
    return Finding("experts", level, message, _TRIED, certain)


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
    fused = [name for name in FUSED if name in model.linear and name not in lora.names]
    missed = sorted(part for name in fused for part in FUSED[name] & lora.names)
    if not missed:
        return []
    trained = lora.names & set(model.linear)
    # The name of a copy does not say whether the layers are apart in it, as in unsloth's.
    original = model.name.startswith("microsoft/") or model.source.startswith("its config.json")
    level: Level = "error" if original and not trained else "warning"
    happens = f"trains {_listed(trained)} alone" if trained else "stops with an error"
    right = " and ".join(name for name in fused if FUSED[name] & lora.names)
    message = f"{_listed(missed)} match nothing in {model.name}, where they are {right}, and PEFT {happens}"
    sure = "certain" if original else "certain unless the copy has them apart, as unsloth's have"
    return [Finding("no-effect", level, message, _MODULES, sure, line=config.line("targets"))]


def check_attention_only(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return whether a dense model has LoRA on attention alone."""
    model = _known(config, known)
    lora = adapted(config, model)
    if lora is None or not lora.attention_alone or (model is not None and model.mixture):
        return []
    if check_fused(config, known):
        return []
    which = "attention alone"
    if lora.names == {"q_proj", "v_proj"}:
        which = "queries and values alone" + (", PEFT's default where no targets are said" if lora.by_default else "")
    message = (
        f"LoRA is on {which} ({_listed(lora.names)}); on the MLP, or on all linear layers, it learns more, even at the "
        "same number of parameters"
    )
    line = config.line("targets", "rank", "method")
    return [Finding("attention-only", "warning", message, _PLACEMENT, _MEASURED, line=line)]


def check_unembedding(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return what is odd about training embedding and unembedding: ties, and whole matrices at LoRA's learning rate."""
    model = _known(config, known)
    if config.method != "lora":
        return []
    findings = []
    targets, saved = _EMBEDDINGS & {*(config.targets or ())}, _EMBEDDINGS & {*config.saved_modules}
    if model is not None and model.tied and targets | saved and config.format in _PEFT:
        happens = "merging LoRA changes both" if targets else "each that is saved becomes a copy of its own"
        message = (
            f"embedding and unembedding of {model.name} are one matrix, and with {_listed(targets | saved)} trained "
            f"{happens}; leave that out, or set ensure_weight_tying"
        )
        source, sure = "PEFT 0.21, tried on a tiny model; it warns of it", "certain unless ensure_weight_tying is set"
        findings.append(
            Finding("unembedding", "warning", message, source, sure, line=config.line("saved_modules", "targets"))
        )
    if saved:
        size = ""
        if model is not None and model.vocabulary:
            size = f" ({formats.parameters(len(saved) * model.vocabulary * model.width)} parameters)"
        at = f" {config.lr:g}" if config.lr is not None else ""
        message = (
            f"{_listed(saved)}{size} {'are' if len(saved) > 1 else 'is'} trained whole at LoRA's learning rate{at}; "
            "full matrices do best at about a tenth of it, and trainable_token_indices trains new tokens alone"
        )
        source = "optima of 6 sources, docs/other-runs.md; PEFT"
        sure = f"the ratio is {RATIO:g} [{RATIO_LOW:g}, {RATIO_HIGH:g}] for whole models, and not known for these"
        findings.append(Finding("unembedding", "note", message, source, sure, line=config.line("saved_modules")))
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
        converted = CONVERTED.get(model.family, ())
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
    return [Finding("parameters", "note", f"{what}{costs}", f"counted; {model.source}", sure, line=config.line("rank"))]


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
    message = (
        f"{what}, and LoRA of rank {config.rank} has {formats.parameters(parameters)} parameters; by the authors' rule "
        f"of a parameter for each scored token, rank {-(-round(tokens) * (config.rank or 1) // parameters)} has enough"
    )
    sure = "a rule of thumb; " + ("an upper bound of the tokens" if bound else "the tokens are yours")
    source = "the documentation of the authors' library; docs/your-model.md"
    return [Finding("capacity", "note" if bound else "warning", message, source, sure, line=config.line("rank"))]


def _listed(names: Sequence[str] | frozenset[str]) -> str:
    ordered = sorted(names)
    return ordered[0] if len(ordered) == 1 else f"{', '.join(ordered[:-1])} and {ordered[-1]}"

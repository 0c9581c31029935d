"""What LoRA would train of a model and what not, by kind of layer, from the model's configuration alone.

transformers builds the model without weights, so that the names are the real ones. Where it can't, as for a GGUF file,
the numbers follow from the model's dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from lorabench.audit.finding import Finding
from lorabench.config.fields import ROUTERS, Placement, placement_of
from lorabench.custom.model import UserModel, model_config
from lorabench.custom.preset import checked_gpu
from lorabench.custom.recommend import cost_plan
from lorabench.errors import UserError
from lorabench.models.base import model_errors
from lorabench.planning.costs import job_cost
from lorabench.planning.memory import TooLargeError
from lorabench.planning.plan import Plan
from lorabench.runs import Job
from lorabench.utils.gpus import GB

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["attention", "MLP", "experts", "router", "embedding", "unembedding", "norms", "biases", "others"]
_PLACED: dict[Placement, tuple[Kind, ...]] = {
    "attn": ("attention",),
    "mlp": ("MLP", "experts"),
    "all": ("attention", "MLP", "experts"),
}
_PARTS: dict[str, Kind] = {"attn": "attention", "mlp": "MLP"}
_UNKNOWN, _VECTOR = "no known name", "vectors have no low-rank update"
_MOST_LAYERS = 256
"""A model of more layers, which takes longer than 10 s to build with LoRA, is described by its dimensions."""
_TIED = "the same matrix as the embedding; LoRA here is lost or changes the embedding too when it is merged"


@dataclass(frozen=True)
class Weight:
    """A weight of the model, or a stack of the weights of all experts of a layer, and LoRA on it."""

    kind: Kind
    name: str
    """The name of its module, or of the parameter itself where it is a stack."""
    parameters: int
    lora: int = 0
    """The number of LoRA's parameters on it; 0 where there is none."""
    note: str = ""
    """Why it has no LoRA, or what is special about it."""
    number: int = 1
    """How many alike weights the model has."""


@dataclass(frozen=True)
class KindOfLayer:
    """The weights of a kind: how many there are, and how many carry LoRA."""

    kind: Kind
    weights: int
    parameters: int
    with_lora: int
    lora_parameters: int
    note: str
    """Why others have no LoRA, or what is special about them."""


@dataclass(frozen=True)
class Memory:
    """What a method needs in bf16 with activations of few tokens; null if it fits on no number of GPUs."""

    gpus: int | None
    gigabytes: float | None
    """On each GPU."""


@dataclass(frozen=True)
class Coverage:
    """What LoRA would train of a model; as a dict it is what `--json` prints."""

    model: str
    family: str
    parameters: int
    placement: Placement
    rank: int
    expert_rank: int | None
    """The rank of each expert's LoRA; null without experts."""
    names_from: str
    """Where names and counts come from: transformers, or the dimensions."""
    kinds: tuple[KindOfLayer, ...]
    target_modules: tuple[str, ...]
    """PEFT's setting for these layers, by the last part of their names; empty if the names are not known."""
    target_parameters: tuple[str, ...]
    """PEFT's setting for fused experts, by the last parts of their names."""
    gpu: str
    """The GPU that the memory is estimated for."""
    memory: dict[str, Memory]
    """By method, `lora` and `fullft`."""
    findings: tuple[Finding, ...]

    @property
    def lora_parameters(self) -> int:
        """The number of parameters that LoRA trains."""
        return sum(kind.lora_parameters for kind in self.kinds)


def coverage(model: UserModel, placement: Placement, rank: int, gpu: str) -> Coverage:
    """Return what LoRA would train of a model on the layers of a placement and the unembedding.

    Args:
        rank: the rank; in a mixture of experts the total rank of the active experts.
        gpu: the GPU to estimate the memory for, a name of lorabench/utils/gpus.py.

    Raises:
        UserError: the model's configuration can't be read, or the GPU is not known.
    """
    findings: list[Finding] = []
    built = _without_weights(model)
    modules: list[str] = []
    stacks: list[str] = []
    if isinstance(built, str):
        weights, expert_rank = _by_dimensions(model, placement, rank)
        names_from = f"the dimensions, since {built}"
    else:
        weights, modules, stacks, expert_rank, problem = _by_names(built, placement, rank)
        names_from = f"{type(built).__name__} of transformers"
        if problem:
            findings.append(_finding("placement", "error", problem))
    findings += _findings(model, weights, stacks)
    plan = cost_plan(model, checked_gpu(gpu), rank, placement, examples=1000, batch=32)
    memory = {method: _memory(plan, method) for method in ("fullft", "lora")}
    return Coverage(
        model.name,
        model.family,
        model.parameters,
        placement,
        rank,
        expert_rank,
        names_from,
        tuple(_kinds(weights)),
        tuple(sorted({name.rpartition(".")[2] for name in modules})),
        tuple(sorted({".".join(name.split(".")[-2:]) for name in stacks})),
        gpu,
        memory,
        tuple(findings),
    )


def _memory(plan: Plan, method: str) -> Memory:
    try:
        cost = job_cost(plan, Job(tuple(sweep for sweep in plan.sweeps if sweep.condition.method == method)))
    except TooLargeError:
        return Memory(None, None)
    return Memory(cost.gpus, round(cost.memory / GB, 2))


def _without_weights(model: UserModel) -> PreTrainedModel | str:
    """Return the model with weights on the meta device, or why it can't be built, as the end of a sentence."""
    config = model_config(model)
    if config is None:
        return "a GGUF file has names of its own"
    if (config.get("num_hidden_layers") or 0) > _MOST_LAYERS:
        return f"it has more than {_MOST_LAYERS} layers"
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with model_errors("transformers can't build it"), torch.device("meta"):
            built: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except UserError as error:
        return str(error)
    return built


def _by_names(
    model: PreTrainedModel, placement: Placement, rank: int
) -> tuple[list[Weight], list[str], list[str], int | None, str]:
    """Return the weights, the names of modules and stacks with LoRA, the rank of an expert, and what is wrong."""
    import torch

    from lorabench.models.lora import add_lora, expert_rank, in_expert, targets

    problem = ""
    try:
        modules, stacks = targets(model, placement, include_unembedding=True)
        with torch.device("meta"):
            # It refuses a model on which PEFT puts LoRA on other layers, as training does.
            add_lora(copy.deepcopy(model), rank, placement, 32.0, include_unembedding=True, seed=0)
    except UserError as error:
        modules, stacks, problem = [], [], str(error)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    per_expert = expert_rank(model, rank) if any(map(in_expert, (*modules, *stacks))) else None
    weights = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner, _, last = name.rpartition(".")
        module, stacked = model.get_submodule(owner), name in stacks
        kind = _kind(name, parameter.ndim)
        if isinstance(module, torch.nn.Embedding):
            kind = "embedding"
        elif module is head and last == "weight":
            kind = "unembedding"
        tied = kind == "unembedding" and parameter is embedding.weight
        shown = owner if last == "weight" else name
        lora = 0
        if stacked or (last == "weight" and owner in modules):
            own = per_expert if per_expert and in_expert(shown) else rank
            count = parameter.shape[0] if stacked else 1
            lora = count * own * sum(parameter.shape[-2:])
        why = "" if lora else _VECTOR if parameter.ndim < 2 else _why_not(kind, placement)
        why = _TIED if tied and lora else why
        weights.append(Weight(kind, shown, 0 if tied else parameter.numel(), lora, why))
    return weights, modules, stacks, per_expert, problem


def _kind(name: str, dimensions: int) -> Kind:
    """Return the kind of a parameter by its name; embedding and unembedding are known by the model itself."""
    *path, last = name.lower().split(".")
    owner = path[-1] if path else ""
    if "norm" in owner or "norm" in last or owner.startswith("ln_"):
        return "norms"
    if last == "bias" or last.endswith("_bias"):
        return "biases"
    if owner in ROUTERS:
        return "router"
    if "experts" in path:
        return "experts"
    if dimensions < 2:
        return "others"
    placement = placement_of(name)
    return "others" if placement is None else _PARTS[placement]


def _why_not(kind: Kind, placement: Placement) -> str:
    if kind in ("norms", "biases"):
        return _VECTOR
    if kind == "router":
        return "routers are left as they are, as in the paper"
    if kind == "embedding":
        return "LoRA is on linear layers; an embedding needs modules_to_save"
    if kind in ("attention", "MLP", "experts") and kind not in _PLACED[placement]:
        return f"the placement {placement} leaves it out"
    return _UNKNOWN


def _by_dimensions(model: UserModel, placement: Placement, rank: int) -> tuple[list[Weight], int | None]:
    sizes = model.sizes
    own = max(1, rank // sizes.active_experts) if sizes.experts else 0
    weights = []
    for matrix in sizes.matrices:
        kind: Kind = _PARTS.get(matrix.part, matrix.part)  # type: ignore[arg-type]
        placed = kind in _PLACED[placement] or kind == "unembedding"
        tied = kind == "unembedding" and sizes.tied
        lora = (own if kind == "experts" else rank) * (matrix.d_in + matrix.d_out) if placed else 0
        why = _TIED if tied else "" if lora else _why_not(kind, placement)
        parameters = 0 if tied else matrix.d_in * matrix.d_out
        weights.append(Weight(kind, matrix.part, parameters, lora, why, matrix.count))
    embedding = sizes.vocabulary * sizes.hidden
    weights.append(Weight("embedding", "embedding", embedding, 0, _why_not("embedding", placement)))
    norms = sizes.parameters - sum(weight.number * weight.parameters for weight in weights)
    weights.append(Weight("norms", "norms", norms, 0, _why_not("norms", placement)))
    return weights, own or None


def _kinds(weights: list[Weight]) -> Iterator[KindOfLayer]:
    for kind in get_args(Kind):
        own = [weight for weight in weights if weight.kind == kind]
        if own:
            notes = dict.fromkeys(weight.note for weight in own if weight.note)
            if _UNKNOWN in notes:
                notes[_UNKNOWN] = f": {_unknown_names(own)}"
            yield KindOfLayer(
                kind,
                sum(weight.number for weight in own),
                sum(weight.number * weight.parameters for weight in own),
                sum(weight.number for weight in own if weight.lora),
                sum(weight.number * weight.lora for weight in own),
                "; ".join(f"{note}{more or ''}" for note, more in notes.items()),
            )


def _unknown_names(weights: list[Weight]) -> str:
    """Return the last parts of the names that no placement knows."""
    return ", ".join(sorted({weight.name.rpartition(".")[2] for weight in weights if weight.note == _UNKNOWN}))


def _finding(code: str, level: Literal["error", "warning", "note"], message: str) -> Finding:
    return Finding(code, level, message, "the model's configuration", "certain")


def _findings(model: UserModel, weights: list[Weight], stacks: list[str]) -> Iterator[Finding]:
    if stacks:
        share = sum(weight.parameters for weight in weights if weight.kind == "experts") / model.parameters
        yield _finding(
            "fused-experts",
            "warning",
            f"the experts, {share:.0%} of all parameters, are fused in {len(stacks)} parameters with 3 dimensions, "
            "which PEFT's target_modules (also `all-linear`) passes over without a word: name them in "
            "target_parameters",
        )
    unknown = [weight for weight in weights if weight.note == _UNKNOWN]
    if unknown:
        share = sum(weight.parameters for weight in unknown) / model.parameters
        yield _finding(
            "unreached",
            "warning",
            f"{len(unknown)} weights with {share:.1%} of all parameters have names that this project's placements do "
            f"not know ({_unknown_names(unknown)}); name them in target_modules yourself if they should be trained",
        )
    if any(weight.note == _TIED for weight in weights):
        yield _finding(
            "tied",
            "warning",
            "embedding and unembedding are one matrix: LoRA on the unembedding can't be merged without changing the "
            "embedding too; serve the adapter unmerged, or leave the unembedding out",
        )

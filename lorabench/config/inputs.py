"""The sections `models`, `datasets` and `problems` of a preset: base models, examples for supervised fine-tuning (SFT),
and sets of verifiable problems for reinforcement learning (RL)."""

from __future__ import annotations

import math
import os
from functools import cache
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from lorabench.config.fields import (
    ChatTemplate,
    DataFile,
    Few,
    FileFormat,
    ModelFolder,
    NotNegative,
    Positive,
    Several,
    Strict,
)
from lorabench.utils.files import WORKFLOW
from lorabench.utils.yaml_files import read_yaml

MODELS = WORKFLOW / "models.yaml"
"""The catalogue of models that every preset may name."""

MaxChars = Annotated[int, Field(ge=32, le=10**9)]

NumberTask = Literal["chain_sum", "products", "gcd", "lcm", "count_bits", "leg_counting", "letter_counting"]
"""The tasks of reasoning-gym whose answer is a number."""


class TinyModel(Strict):
    """A tiny base model that is shipped with the package (see workflow/scripts/tiny_bases.py)."""

    kind: Literal["tiny"]
    name: Literal[
        "llama-128", "llama-64", "llama-256", "qwen-128", "qwen-64", "moe-128", "llama-64-sums", "llama-64-long-sums",
        "llama-64-tenth", "llama-128-tenth",
    ] = "llama-128"  # fmt: skip
    """The base's family and width; those with `sums` are pretrained further on worked sums, and those with `tenth` have
    a tenth of the pretraining."""


class ForeignModel(Strict):
    """A model that is not shipped: what the estimates need to know, and its chat template."""

    chat_template: ChatTemplate | None = None
    """Chat template for a base without one: `plain`, or the path of a Jinja file; null for the model's own."""
    parameters: Positive
    """Number of parameters, for the cost estimate."""
    hidden_size: Positive
    """Width of the model, for the cost estimate."""


class HubRepository(Strict):
    """A repository on the Hugging Face hub."""

    kind: Literal["hub"]
    id: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """Hub id, `owner/name`."""
    revision: str = "main"
    """Commit, tag or branch. A tag or branch is fixed to its commit when it is first fetched (`results/<preset>/pins`);
    give a commit for runs that others can repeat."""


class HubModel(HubRepository, ForeignModel):
    """A causal language model on the Hugging Face hub, in safetensors files."""

    trust_remote_code: bool = False
    """Run the repository's own Python code. Off unless you have read that code."""


class PathModel(ForeignModel):
    """A causal language model in a local folder, in safetensors files."""

    kind: Literal["path"]
    path: ModelFolder
    """Folder with config.json, the tokenizer and *.safetensors."""
    trust_remote_code: bool = False
    """Run Python code from the folder. Off unless you have read that code."""


class GgufModel(ForeignModel):
    """A model in a GGUF file, which is dequantized once into safetensors."""

    kind: Literal["gguf"]
    path: str
    """The .gguf file; with `wheel`, its path inside the wheel."""
    wheel: str | None = None
    """A pinned PyPI requirement whose wheel holds the file, as `name==version`."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the .gguf file."""

    @model_validator(mode="after")
    def _exists(self) -> Self:
        if self.wheel is None and not os.path.isfile(self.path):
            raise ValueError(f"GGUF file {self.path!r} does not exist")
        return self


ModelSpec = Annotated[TinyModel | HubModel | PathModel | GgufModel, Field(discriminator="kind")]


@cache
def model_catalogue() -> dict[str, Any]:
    """Return the specifications, as plain data, of the models that every preset may name."""
    catalogue: dict[str, Any] = read_yaml(MODELS)
    return catalogue


class Splits(Strict):
    """The sizes of the splits that a dataset or a problem set is divided into."""

    train: Positive
    """Examples or problems that are trained on."""
    validation: Positive
    """Examples or problems on which the LR is picked."""
    test: Positive
    """Examples or problems on which losses or rewards are reported."""
    seed: NotNegative = 0
    """Seed of the choice of examples or problems, or of what is generated."""


class GeneratedSplits(Splits):
    """Splits of a dataset or problem set whose examples are generated, without end or nearly so."""

    test_seed: NotNegative | None = None
    """Seed of other test examples, none of which is among those without it, in whichever split; train and validation
    stay as they are. Null for the test examples of `seed`."""

    def has_other_tests(self) -> bool:
        """Return whether there are as many test examples again that are in no split."""
        return True


class ChatDataset(GeneratedSplits):
    """An SFT dataset of distinct chats from reasoning-gym, split into train, validation and test."""

    kind: Literal["instruct", "worked"]
    """`instruct`: a mixture of 12 tasks with short answers; `worked`: gsm_symbolic with its chain of thought."""
    max_chars: MaxChars = 400
    """Longer examples (question and response together) are left out."""


class ShippedDataset(Splits):
    """English text of Python packages that is shipped (see workflow/scripts/natural_text.py).

    The splits come from packages of different authors; validation and test have at most 10 examples of a package.
    """

    kind: Literal["docstrings", "documentation"]
    """`docstrings`: functions, described by the first paragraph of their docstrings; `documentation`: paragraphs of
    documentation after what stands before them."""
    edition: Literal[1, 2] = 1
    """The edition of the shipped text: 2 has test examples of 83 packages where 1 has those of 33 or 34; training and
    validation examples are the same."""
    max_chars: Annotated[int, Field(ge=32, le=800)] = 800
    """Longer examples (prompt and text together) are left out."""
    min_words: Annotated[int, Field(ge=14, le=800)] = 14
    """Shorter texts are left out."""


class FactsDataset(Strict):
    """Random facts to be memorized. The test facts are the training facts, since nothing generalizes to others."""

    kind: Literal["facts"]
    facts: Positive
    """Number of facts."""
    digits: Few = 8
    """Number of random digits of each answer, each of log2(10) bits."""
    seed: NotNegative = 0
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


class TextDataset(Splits):
    """Splits of texts that the project does not make itself."""

    curve_examples: Positive | None = None
    """Validation examples on which all points of a learning curve are measured; null for all. The loss by which the LR
    is picked is that of all validation examples. Measuring the curve on few saves time where examples are long."""
    max_chars: MaxChars
    """Longer examples (all turns together) are left out; all models are trained on the same examples."""
    group: str | None = None
    """Column of what examples share, such as a document: test examples with one value are one group (see
    docs/your-model.md). Null where each example is its own."""
    mean_tokens: Positive
    """Tokens of an average example, for the cost estimate."""

    @model_validator(mode="after")
    def _curve_within_validation(self) -> Self:
        if self.curve_examples is not None and self.curve_examples > self.validation:
            raise ValueError(f"curve_examples = {self.curve_examples}: at most validation, which is {self.validation}")
        return self


class HubDataset(HubRepository, TextDataset):
    """Chats of a dataset on the Hugging Face hub, in its column `messages` or `conversations`."""

    config: str | None = None
    """Name of the dataset's configuration, where it has several."""
    split: str = "train"
    """The hub dataset's split from which all examples are taken."""
    max_tokens: Positive | None = None
    """Chosen examples of more tokens are left out of a model's training and tests, and counted; none is cut. Null where
    every example fits every model."""


class FileDataset(TextDataset):
    """Chats, pairs of prompt and completion, or plain texts of your own in a file (see lorabench/data/files.py)."""

    kind: Literal["file"]
    path: DataFile
    """A .jsonl, .json, .csv or .parquet file in UTF-8."""
    format: FileFormat | None = None
    """The columns that hold an example; null where the file has the columns of one format only."""


DatasetSpec = Annotated[
    ChatDataset | ShippedDataset | FactsDataset | HubDataset | FileDataset, Field(discriminator="kind")
]


def curve_examples(spec: DatasetSpec | ProblemSpec) -> int | None:
    """Return the number of validation examples on which learning curves are measured; None for all."""
    return spec.curve_examples if isinstance(spec, TextDataset) else None


class KnownProblems(Splits):
    """A set of problems whose kind says how responses are graded."""

    kind: str

    @property
    def grader(self) -> str:
        """The name of the rule by which responses are graded."""
        return "number" if self.kind == "sums" else self.kind


class ReasoningProblems(KnownProblems, GeneratedSplits):
    """Problems whose answer is a number, generated by reasoning-gym; nothing is downloaded."""

    kind: Literal["arithmetic", "gsm_symbolic"]
    """`arithmetic`: the response must be the bare number; `gsm_symbolic`: grade-school problems, the last number of a
    response counts."""
    tasks: Annotated[list[NumberTask], Field(min_length=1)] = ["chain_sum"]
    """Tasks of `arithmetic`, drawn uniformly."""
    min_digits: Few = 1
    """Smallest number of digits of a term, in `chain_sum` and `products`."""
    max_digits: Few = 2
    """Largest number of digits of a term."""
    max_value: Annotated[int, Field(ge=10, le=10**14)] = 100
    """Largest number, in `gcd` and `lcm`."""
    min_terms: Several = 2
    """Smallest number of terms, in `chain_sum`, `products`, `gcd` and `lcm`."""
    max_terms: Several = 2
    """Largest number of terms. More digits and terms make a problem set harder."""
    max_chars: MaxChars = 400
    """Longer problems (question and worked solution together) are left out."""

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        for what in ("digits", "terms"):
            low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
            if low > high:
                raise ValueError(f"min_{what} = {low} is more than max_{what} = {high}")
        return self


class SumProblems(KnownProblems, GeneratedSplits):
    """Sums of two numbers, which the bases `sums` and `long-sums` answer with written working.

    The last number of a response counts.
    """

    kind: Literal["sums"]
    min_digits: Annotated[int, Field(ge=2, le=9)] = 2
    """Smallest number of digits of the terms; both have equally many."""
    max_digits: Annotated[int, Field(ge=2, le=9)] = 2
    """Largest number of digits. A response has 2 tokens and 8 for each digit: 18 with 2 digits, 34 with 4."""
    carries: NotNegative = 1
    """Least number of columns, other than the leftmost, from which something is carried."""

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.min_digits > self.max_digits:
            raise ValueError(f"min_digits = {self.min_digits} is more than max_digits = {self.max_digits}")
        if self.carries >= self.min_digits:
            raise ValueError(f"carries = {self.carries}: must be below min_digits = {self.min_digits}")
        return self

    def has_other_tests(self) -> bool:
        """Return whether as many test problems again leave a tenth of all such sums: there are 3,645 of two digits with
        a carry, and 8,100 in all."""
        return self.max_digits > 2 or (
            self.train + self.validation + 2 * self.test <= 0.9 * (3645 if self.carries else 8100)
        )


class HubProblems(KnownProblems):
    """A set of mathematical problems on the Hugging Face hub, whose prompts ask for the answer in a box."""

    kind: Literal["gsm8k", "math", "deepmath", "aime24", "aime25"]
    """`math` trains on Hendrycks' MATH without MATH-500 and tests on MATH-500; AIME is only evaluated on."""
    revisions: dict[str, str] = {}
    """Commit, tag or branch by hub id, `main` where none is given; branches are fixed as those of hub datasets are."""
    train: NotNegative
    """Problems that are trained on."""
    validation: NotNegative
    """Problems on which the LR is picked, held out of the training problems."""

    @model_validator(mode="after")
    def _check_splits(self) -> Self:
        is_only_tested = self.kind in ("aime24", "aime25")
        if bool(self.train) == is_only_tested or bool(self.validation) == is_only_tested:
            allowed = "0, since it is only tested on" if is_only_tested else "at least 1"
            raise ValueError(f"train = {self.train}, validation = {self.validation}: both must be {allowed}")
        return self


class FileProblems(Splits):
    """Problems of your own, in a file with the columns `question` and `answer`.

    In a worked solution the answer is the content of its last box, or the text after its last `####`.
    """

    kind: Literal["file"]
    path: DataFile
    """A .jsonl, .json, .csv or .parquet file in UTF-8."""
    grader: Literal["number", "boxed"]
    """`number`: the last number of a response counts; `boxed`: the prompt asks for a box, and the last one counts."""
    group: str | None = None
    """Column of what problems share, such as a template: test problems with one value are one group (see
    docs/your-model.md). Null where each problem is its own."""
    max_chars: MaxChars = 4000
    """Longer questions are left out."""


ProblemSpec = Annotated[ReasoningProblems | SumProblems | HubProblems | FileProblems, Field(discriminator="kind")]

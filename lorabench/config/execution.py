"""The sections `execution` and `evaluation` of a preset: how its jobs run, and what lm-eval measures."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from lorabench.config.fields import BatchSize, Few, NotNegative, Positive, PositiveFloat, SamplerName, Strict
from lorabench.utils.gpus import GPUS

EVAL_SOURCES = {
    "lorabench_worked": "worked",
    "lorabench_worked_bits": "worked",
    "lorabench_instruct": "instruct",
    "lorabench_instruct_bits": "instruct",
    "lorabench_arithmetic": "arithmetic",
    "lorabench_pretraining": None,
}
"""This project's evaluation tasks, and the kind of dataset or problem set that each reads, None if it reads none."""


class EvalTask(Strict):
    """A task of lm-eval, or one of this project's own (see lorabench/evaluation/tasks)."""

    name: str = Field(pattern=r"^[\w.-]{1,100}$")
    """Name of the task in lm-eval, or in this project."""
    about: Literal["learned", "forgotten"]
    """Whether the task measures what fine-tuning teaches or what it may lose."""
    source: str | None = None
    """For a task of this project: the dataset or problem set whose test split it reads."""
    num_fewshot: NotNegative | None = None
    """Number of worked examples in the prompt; null for the task's own number."""
    limit: Positive | None = None
    """Largest number of documents that are evaluated; null for all."""
    max_new_tokens: Positive | None = None
    """Largest number of tokens of an answer; null for the task's own limit, in lm-eval 256 where the task has none."""
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
    batch_size: BatchSize = 16
    """Sequences that go through the model at once."""
    pretraining_documents: Positive = 200
    """Documents of the tiny bases' held-out pretraining text that lorabench_pretraining reads."""


class Execution(Strict):
    """The machine that does the work, and how. No field here but `sampler` changes the identity of a run."""

    threads: Few = 1
    """CPU threads of one job."""
    max_batch_tokens: Positive = 16_384
    """Largest number of tokens, with padding, that go through the model at once; the gradients of larger batches are
    accumulated."""
    max_cache_tokens: Positive = 65_536
    """Largest number of tokens of prompts and responses whose keys and values are kept at once in sampling; the engine
    vLLM takes the memory for all of them throughout a job."""
    sampler: SamplerName = "own"
    """What draws the responses of RL runs, and of evaluations with lm-eval: `own` is this project's code, the
    reference; `vllm` is the engine vLLM, which is much faster on GPUs and is installed as docs/cluster.md says. Runs of
    two samplers are different runs."""
    checkpoint_minutes: Annotated[float, Field(ge=0, le=1e20)] = 5.0
    """Least minutes between a run's checkpoints, from which it resumes; more where saving would take over 2% of the
    time. 0 means a checkpoint after every step."""
    keep_weights: Literal["best", "all"] = "best"
    """The trained weights that are kept: of the runs at each condition's best LR, or of all runs."""
    activation_checkpointing: bool | NotNegative | Literal["auto"] = False
    """Compute the activations of each layer again in the backward pass instead of keeping them, which takes a third
    more work and far less memory; a number does so in that many layers, from the first. With `auto` the plan decides
    for each sweep: the fewest layers with which its job needs the fewest GPUs, so none on a CPU."""
    job_hours: PositiveFloat = 24.0
    """Most hours that a job is expected to take: where the runs of a sweep would take longer one after the other, each
    of them is a job of its own."""
    path_hours: PositiveFloat | None = None
    """Most hours that a run of each wave of such a sweep is expected to take, one after the other: jobs get more GPUs
    than it takes to hold them, up to `max_gpus`, until it is so; null for no limit."""
    gpu: str | None = None
    """Name of the GPU in lorabench/utils/gpus.py, for the estimates; null for a CPU."""
    max_gpus: Positive = 1
    """Largest number of GPUs of a job, which requests the smallest number among which the model fits (FSDP)."""
    gpu_time: PositiveFloat = 1.0
    """Seconds that a GPU takes for passes over those that the plan computes from its peak and bandwidth."""
    fused_kernels: bool = True
    """Compute norms, rotary embeddings, SwiGLU and log-probabilities on a GPU in one kernel each, for a Llama or a
    dense Qwen3; it changes results by rounding alone."""
    gflops: PositiveFloat | None = None
    """Useful GFLOP/s of a job on a CPU, for the time estimate; null with `gpu`."""

    def recomputed_layers(self, layers: int) -> int:
        """Return how many of a model's `layers` compute their activations again; 0 where `auto` is not decided yet."""
        again = self.activation_checkpointing
        if isinstance(again, bool):
            return layers if again else 0
        return 0 if again == "auto" else min(again, layers)

    @model_validator(mode="after")
    def _check_hardware(self) -> Self:
        if self.gpu is None:
            if self.gflops is None:
                raise ValueError("gflops: missing; without a gpu the speed of a job must be given")
            if self.max_gpus > 1:
                raise ValueError(f"max_gpus = {self.max_gpus}: without a gpu a job has none; name the gpu")
        elif self.gflops is not None:
            raise ValueError(
                f"gflops = {self.gflops}: with a gpu, leave it out; set gpu_time to that of its kernels over the plan's"
            )
        elif self.gpu not in GPUS:
            raise ValueError(f"gpu = {self.gpu!r}: not known; allowed: {', '.join(GPUS)}")
        return self

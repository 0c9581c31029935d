"""What a preset costs, before it is run.

FLOPs of linear layers, as the paper counts (its section on compute efficiency): per token 6 for each parameter that
is trained, forward and backward, and 4 for each that is frozen; LoRA saves the weight gradient of the base and pays
for A and B. On top come the two products of attention, which the paper leaves out: with contexts of thousands of
tokens they are no longer small. What a job takes is these FLOPs at the speed of `execution`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from lorabench.config import DatasetSpec, ModelSpec, Preset
from lorabench.gpus import GPUS
from lorabench.models.dimensions import Dimensions, dimensions

if TYPE_CHECKING:
    from lorabench.config import Execution
    from lorabench.plan import Condition, EvalJob, Plan, Sweep

# Measured on the offline datasets: mean characters of an example as a share of the limit, and at most; characters
# per token of the tiny base's tokenizer and, roughly, of large ones. Those of the hub's problems are guesses.
_SHARE_OF_MAX_CHARS = {"instruct": 0.65, "worked": 0.83}
_MEAN_CHARS = {"instruct": 216, "worked": 500}
_CHARS_OF_A_FACT = 40
_CHARS_OF_A_PROBLEM = {"arithmetic": 90, "gsm_symbolic": 300, "gsm8k": 300, "math": 300, "deepmath": 400, "file": 300}
CHARS_PER_TOKEN = {"tiny": 2.0, "hub": 3.0, "path": 3.0, "gguf": 3.0}
# Imports, loading, and writing of one job, in seconds on one core.
_START_SECONDS = 8.0
_EVALUATION_START_SECONDS = 12.0
# A token that is drawn takes so many times the seconds of a forward pass over a text: one position at a time leaves
# most of a machine idle. On one core the tiny base draws 11,000 a second, where 50 GFLOP/s would read 30,000. On a GPU
# it depends on the batch, and this is a guess.
_DECODING = 3.0
# Several GPUs wait for each other: their share of the speed of as many single ones. An assumption.
_SHARDED = 0.8


@dataclass(frozen=True)
class Estimate:
    """Planned work. `tokens` pass forward and backward; `minutes` is wall-clock on `cores` cores."""

    runs: int
    sweeps: int
    tokens: float
    flops: float
    minutes: float

    def plus(self, other: Estimate) -> Estimate:
        """One after the other."""
        return Estimate(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def speed(execution: Execution, gpus: int = 1) -> float:
    """Useful FLOP/s of a job: of a CPU, or of that many GPUs."""
    if execution.gflops is not None:
        one = execution.gflops * 1e9
    else:
        assert execution.gpu
        gpu = GPUS[execution.gpu]
        one = gpu.peak_flops * gpu.efficiency
    return one if gpus <= 1 else one * gpus * _SHARDED


def tokens_per_example(model: ModelSpec, dataset: DatasetSpec) -> float:
    """Estimated tokens of one example."""
    if dataset.kind in ("hub", "file"):
        return dataset.mean_tokens
    if dataset.kind == "facts":
        chars: float = _CHARS_OF_A_FACT
    else:
        chars = min(_SHARE_OF_MAX_CHARS[dataset.kind] * dataset.max_chars, _MEAN_CHARS[dataset.kind])
    return chars / CHARS_PER_TOKEN[model.kind]


def longest_sequence(preset: Preset, condition: Condition) -> int:
    """Tokens of the longest example, or of a prompt with the longest response."""
    model = preset.models[condition.model]
    if condition.rollouts is not None:
        prompt = _CHARS_OF_A_PROBLEM[preset.problems[condition.dataset].kind] / CHARS_PER_TOKEN[model.kind]
        return round(prompt) + condition.rollouts.max_new_tokens
    dataset = preset.datasets[condition.dataset]
    chars = _CHARS_OF_A_FACT if dataset.kind == "facts" else dataset.max_chars
    return round(chars / CHARS_PER_TOKEN[model.kind])


def trained_parameters(preset: Preset, condition: Condition) -> int:
    """Parameters that a run trains."""
    return _lora(preset, condition)[0] or dimensions(preset.models[condition.model]).parameters


def _lora(preset: Preset, condition: Condition) -> tuple[int, int]:
    """Parameters of a run's LoRA, and those that a token goes through; none in full fine-tuning."""
    if condition.rank is None or condition.placement is None:
        return 0, 0
    sizes = dimensions(preset.models[condition.model])
    return sizes.lora(condition.placement, condition.rank, preset.protocol.include_unembedding)


def linear_flops_per_token(sizes: Dimensions, lora: int | None) -> float:
    """FLOPs of a forward and backward pass for one token, linear layers only, as the paper counts.

    Args:
        lora: parameters of LoRA that a token goes through; None in full fine-tuning.
    """
    return 6.0 * sizes.active_linear if lora is None else 4.0 * sizes.active_linear + 6.0 * lora


@dataclass(frozen=True)
class _RunTokens:
    """Tokens of one run: trained on, evaluated without a gradient, and drawn."""

    trained: float
    evaluated: float
    drawn: float


def _run_tokens(preset: Preset, sweep: Sweep) -> _RunTokens:
    condition, rollouts = sweep.condition, sweep.condition.rollouts
    model = preset.models[condition.model]
    if rollouts is None:
        dataset = preset.datasets[condition.dataset]
        per_example = tokens_per_example(model, dataset)
        examples = preset.protocol.curve_points * dataset.validation + dataset.test
        return _RunTokens(condition.steps * condition.batch_size * per_example, examples * per_example, 0.0)
    problems = preset.problems[condition.dataset]
    prompt = _CHARS_OF_A_PROBLEM[problems.kind] / CHARS_PER_TOKEN[model.kind]
    episodes = condition.steps * condition.batch_size
    held_out = sum(preset.problems[name].test for name in rollouts.held_out) * rollouts.held_out_samples
    graded = problems.validation + problems.test + held_out
    answers = episodes + rollouts.evaluations * graded
    # A prompt goes through the model once for its group, in sampling and in learning.
    prompts = episodes / rollouts.group_size * prompt
    evaluated = prompts + rollouts.evaluations * graded * prompt
    response = rollouts.mean_response_tokens
    return _RunTokens(episodes * response + prompts, evaluated, answers * response)


def sweep_flops(preset: Preset, sweep: Sweep) -> float:
    """FLOPs of all runs of a sweep, evaluation and sampling included."""
    trained, forward, _ = _run_flops(preset, sweep)
    return sweep.n_runs * (trained + forward)


def _run_flops(preset: Preset, sweep: Sweep) -> tuple[float, float, float]:
    """FLOPs of one run: training; forward passes, drawn tokens among them; drawn tokens alone."""
    condition = sweep.condition
    sizes = dimensions(preset.models[condition.model])
    tokens = _run_tokens(preset, sweep)
    lora = _lora(preset, condition)[1] if condition.method == "lora" else None
    train = linear_flops_per_token(sizes, lora)
    forward = 2.0 * (sizes.active_linear + (lora or 0))
    return tokens.trained * train, (tokens.evaluated + tokens.drawn) * forward, tokens.drawn * forward


def sweep_seconds(preset: Preset, sweep: Sweep, gpus: int) -> float:
    """Wall-clock seconds of a sweep's job on so many GPUs; 0 is a CPU."""
    trained, forward, drawn = _run_flops(preset, sweep)
    work = trained + forward + (_DECODING - 1) * drawn
    return sweep.n_runs * work / speed(preset.execution, gpus) + _START_SECONDS


def estimate(plan: Plan, sweeps: list[Sweep], cores: int) -> Estimate:
    """What some sweeps of a plan cost on a machine with that many cores."""
    preset = plan.preset
    flops = sum(sweep_flops(preset, sweep) for sweep in sweeps)
    tokens = sum(sweep.n_runs * _run_tokens(preset, sweep).trained for sweep in sweeps)
    seconds = sum(sweep_seconds(preset, sweep, 1) for sweep in sweeps)
    at_once = max(1, min(jobs_at_once(plan, cores), len(sweeps)))
    return Estimate(sum(sweep.n_runs for sweep in sweeps), len(sweeps), tokens, flops, seconds / at_once / 60)


def evaluation_seconds(preset: Preset, job: EvalJob) -> float:
    """Wall-clock seconds of one evaluation with lm-eval, on a CPU or one GPU."""
    _, work = _evaluation_work(preset, job)
    return work / speed(preset.execution) + _EVALUATION_START_SECONDS


def _evaluation_work(preset: Preset, job: EvalJob) -> tuple[float, float]:
    """Tokens that an evaluation reads or draws, and FLOPs, drawn tokens counted by what they take."""
    assert preset.evaluation
    parameters = dimensions(preset.models[job.model]).active_linear
    tokens = work = 0.0
    for task in preset.evaluation.tasks:
        read = min(task.documents, task.limit or task.documents) * task.mean_tokens
        tokens += read
        # What was learned is mostly told by drawn answers, what was forgotten by the probability of texts.
        work += (_DECODING if task.about == "learned" else 1.0) * 2.0 * parameters * read
    return tokens, work


def evaluation(plan: Plan, cores: int) -> Estimate:
    """What the evaluation of a plan costs on a machine with that many cores; its `sweeps` are its jobs."""
    preset, jobs = plan.preset, plan.evaluations()
    tokens = flops = seconds = 0.0
    for job in jobs:
        read, _ = _evaluation_work(preset, job)
        tokens, flops = tokens + read, flops + 2.0 * dimensions(preset.models[job.model]).active_linear * read
        seconds += evaluation_seconds(preset, job)
    at_once = max(1, min(jobs_at_once(plan, cores), len(jobs)))
    return Estimate(0, len(jobs), tokens, flops, seconds / at_once / 60)


def jobs_at_once(plan: Plan, cores: int) -> int:
    """Sweep jobs that fit on that many cores."""
    return max(1, cores // plan.preset.execution.threads)

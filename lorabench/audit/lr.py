"""The findings `lr`, `rl-lr` and `lr-unknown`: a learning rate against the recommended one, and what it would cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

from lorabench.analysis.arms import ALPHA
from lorabench.analysis.pooled_lr import ALPHA_EXPONENT
from lorabench.audit.config import Knowledge, TrainingConfig
from lorabench.audit.finding import Finding, Level
from lorabench.audit.models import ModelFacts, facts
from lorabench.audit.regret import MARGINS, LrEvidence, Verdict, place_of, shipped_evidence
from lorabench.config.margins import DEFAULT_PREDICTIONS

SURE = 0.9
"""An LR outside of the optimum's 80% interval is a warning if it costs more than the margin with this probability."""

MOST_DEVICES = 8
"""A finding must hold from one to this number of devices where the file does not say how many there are."""

_METHODS = {"lora": "LoRA", "fullft": "full fine-tuning"}
_TASKS = {False: "supervised fine-tuning", True: "reinforcement learning"}
_UNITS = {False: "nats per token", True: "of accuracy"}
# Optimizers whose LR is that of Adam, by what their names hold, and those that only sound like it.
_ADAM, _NO_ADAM = "adam", ("mini", "schedule", "galore", "apollo", "muon", "adamax")


def check_lr(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return what a run's learning rate would cost by the shipped evidence."""
    return lr_findings(config, facts(config, Path(config.path).parent), shipped_evidence())


def lr_findings(config: TrainingConfig, model: ModelFacts | None, evidence: LrEvidence) -> list[Finding]:
    """Return what a run's learning rate would cost.

    Args:
        config: the run.
        model: what is known of its base model.
        evidence: the optima and curvatures to judge it by.
    """
    if config.lr is None or not config.lr > 0:
        return []
    line, rl = config.line("lr"), config.task == "rl"
    if why := _not_covered(config):
        return [_unknown(why, line)]
    assert config.method
    width = math.nan if model is None else float(model.width)
    verdicts: list[Verdict] = []
    for devices in (1, MOST_DEVICES) if _devices_matter(config) else (1,):
        batch, steps = _batch(config, devices), _steps(config, devices)
        if far := evidence.unmeasured(config.method, rl, width, batch, steps):
            return [_unknown(f"no source has measured {' or '.join(far)} in {_TASKS[rl]}", line)]
        verdicts.append(_verdict(config, model, evidence, rl, batch, steps))
        if level(verdicts[-1], rl) == "note":
            break
    verdict = max(verdicts, key=lambda verdict: (get_args(Level).index(level(verdict, rl)), -verdict.share.mean))
    code, message = "lr", _message(config, verdict, rl)
    if rl and _fits_sft(config, model, evidence) and verdict.outside_80 and verdict.log_factor > 0:
        code, message = "rl-lr", f"{message}; it would be usual in {_TASKS[False]}"
    assumed = []
    if model is None:
        assumed.append("the model is not known")
    elif model.width_error:
        assumed.append(f"the model's width is an estimate by {model.source}")
    if math.isnan(_batch(config, 1)):
        assumed.append("the batch size is not said")
    elif _devices_matter(config):
        assumed.append(f"the number of devices is not said, and 1 to {MOST_DEVICES} are allowed for")
    if math.isnan(_steps(config, 1)):
        assumed.append("the number of steps is not said")
    recommended = verdict.recommended
    sure = f"95% interval of the optimal learning rate {recommended.low:.2g} to {recommended.high:.2g}"
    source = f"optimal learning rates of {evidence.sources(config.method, rl)} sources (docs/other-runs.md)"
    return [Finding(code, level(verdict, rl), message, source, "; ".join([sure, *assumed]), line=line)]


def _not_covered(config: TrainingConfig) -> str:
    """Return why the evidence does not cover a run; an empty string if it does."""
    optimizer = (config.optimizer or _ADAM).lower()
    if config.task is None:
        return "the file does not say whether this is supervised fine-tuning or reinforcement learning"
    if config.task not in ("sft", "rl"):
        return f"no source has measured learning rates of {config.task} runs"
    if config.method is None:
        return "the file does not say whether this is LoRA or full fine-tuning"
    if _ADAM not in optimizer or any(word in optimizer for word in _NO_ADAM):
        return f"all sources are of Adam, and the optimizer is {config.optimizer}"
    if config.variant:
        return f"no source has measured learning rates of the variant {config.variant}"
    return ""


def _unknown(why: str, line: int | None) -> Finding:
    message = f"nothing is said about the learning rate, since {why}"
    return Finding("lr-unknown", "note", message, "the shipped optimal learning rates", "certain", line=line)


def _devices_matter(config: TrainingConfig) -> bool:
    return config.devices is None and config.global_batch is None and config.micro_batch is not None


def _batch(config: TrainingConfig, devices: int) -> float:
    """Return examples per step, in RL responses; NaN if the file does not say."""
    if config.batch_size is None or (config.task == "rl" and config.group_size is None):
        return math.nan
    return float(config.batch_size * (devices if _devices_matter(config) else 1))


def _steps(config: TrainingConfig, devices: int) -> float:
    if config.steps is not None and config.steps > 0:
        return float(config.steps)
    batch = _batch(config, devices) / (config.group_size or 1)
    if config.epochs is None or config.examples is None:
        return math.nan
    return max(1.0, config.epochs * config.examples / batch)


def _verdict(
    config: TrainingConfig, model: ModelFacts | None, evidence: LrEvidence, rl: bool, batch: float, steps: float
) -> Verdict:
    assert config.lr
    assert config.method
    family, width, error = (
        ("", math.nan, 0.0) if model is None else (model.family, float(model.width), model.width_error)
    )
    place = place_of(family, width, error, config.method, batch, steps)
    return evidence.verdict(math.log(config.lr), place, config.method, rl, *shift(config))


def shift(config: TrainingConfig) -> tuple[float, float]:
    """Return what states LoRA's log LR at the optima's alpha and a high rank, and the standard error of that.

    By the theory `movement`, alpha times 1 + k / rank takes the place of alpha. The scale of rsLoRA is alpha over the
    square root of the rank.
    """
    if config.method != "lora":
        return 0.0, 0.0
    movement = DEFAULT_PREDICTIONS.lr_ratio.movement
    assert movement
    if config.alpha is None or config.alpha <= 0 or (config.rslora and not config.rank):
        return 0.0, abs(ALPHA_EXPONENT) * math.log(2)
    scale = config.alpha / ALPHA * (math.sqrt(config.rank) if config.rslora and config.rank else 1.0)
    return -ALPHA_EXPONENT * math.log(scale * (1 + movement.k / config.rank if config.rank else 1.0)), 0.0


def level(verdict: Verdict, rl: bool) -> Level:
    """Return the level of a finding; docs/audit.md has how often each is right."""
    if verdict.outside_95 and verdict.share.low > MARGINS[rl]:
        return "error"
    costs = verdict.outside_80 and verdict.p_margin > SURE
    return "warning" if verdict.outside_95 or costs else "note"


def _fits_sft(config: TrainingConfig, model: ModelFacts | None, evidence: LrEvidence) -> bool:
    """Return whether a learning rate lies in the 80% interval of what is optimal in supervised fine-tuning."""
    return not _verdict(config, model, evidence, False, math.nan, math.nan).outside_80


def _message(config: TrainingConfig, verdict: Verdict, rl: bool) -> str:
    assert config.method
    factor = math.exp(abs(verdict.log_factor))
    size = f"{factor:.0f}" if factor >= 10 else f"{factor:.2g}"
    distance = f"{size} times {'higher' if verdict.log_factor > 0 else 'lower'} than" if factor > 1.05 else "about"
    share, loss, more = verdict.share, verdict.loss, " or more" if verdict.may_diverge else ""
    return (
        f"the learning rate {config.lr:g} of {_METHODS[config.method]} is {distance} the recommended "
        f"{verdict.recommended.mean:.2g}; it is expected to lose {share.mean:.0%} [{share.low:.0%}, {share.high:.0%}] "
        f"of what training gains, or {loss.mean:.2g} [{loss.low:.2g}, {loss.high:.2g}{more}] {_UNITS[rl]}"
    )

"""The findings `lr`, `rl-lr` and `lr-unknown`: a learning rate against the recommended one, and what it would cost."""

from __future__ import annotations

import math
from typing import get_args

from lora_advice.audit.config import METHODS, TrainingConfig
from lora_advice.audit.regret import LrEvidence, Place, Verdict
from lora_advice.finding import Finding, Level
from lora_advice.models import ModelFacts
from lora_advice.variants import VARIANT_NAMES, measured_factor

SURE = 0.9
"""An LR outside of the optimum's 80% interval is a warning if it costs more than the margin with this probability, and
one of LoRA outside of the 95% interval an error if runs may diverge there."""

MOST_DEVICES = 8
"""A finding must hold from one to this number of devices where the file does not say how many there are."""

_TASKS = {False: "supervised fine-tuning", True: "reinforcement learning"}


def lr_findings(config: TrainingConfig, model: ModelFacts | None, evidence: LrEvidence) -> list[Finding]:
    """Return what a run's learning rate would cost, by the optima and curvatures that are known."""
    if config.lr is None or not config.lr > 0:
        return []
    line, judged = config.line("lr"), judge(config, model, evidence)
    if isinstance(judged, str):
        message = f"nothing is said about the learning rate, since {judged}"
        return [Finding("lr-unknown", "note", message, "the shipped optimal learning rates", "certain", line=line)]
    verdict, place = judged
    variant_factor = math.exp(_variant_factor(config, evidence)[0])
    factor = math.exp(abs(verdict.log_factor))
    size = f"{factor:.0f}" if factor >= 10 else f"{factor:.2g}"
    distance, comparison = "about", ""
    if factor > 1.05:
        distance = f"{size} times {'higher' if verdict.log_factor > 0 else 'lower'} than"
        comparison = f" (the recommended one {verdict.recommended_share:.0%})"
    share, loss, more = verdict.share, verdict.loss, " or more" if verdict.may_diverge else ""
    unit = "of accuracy" if place.rl else "nats per token"
    method, best = METHODS[config.method or "lora"], f"{verdict.recommended.mean:.2g}"
    if config.variants:
        method = " and ".join(VARIANT_NAMES[variant] for variant in config.variants)
        best += ", as for LoRA" if variant_factor == 1 else f", which is {variant_factor:.2g} times LoRA's"
    message = (
        f"the learning rate {config.lr:g} of {method} is {distance} the recommended {best}; it is expected to "
        f"lose {share.mean:.0%} [{share.low:.0%}, {share.high:.0%}] of what training gains{comparison}, or "
        f"{loss.mean:.2g} [{loss.low:.2g}, {loss.high:.2g}{more}] {unit}"
    )
    code = "lr"
    if place.rl and verdict.outside_80 and verdict.log_factor > 0:
        sft = place._replace(rl=False, batch_size=math.nan, steps=math.nan)
        if not _verdict(config, sft, evidence).outside_80:
            code, message = "rl-lr", f"{message}; it would be usual in {_TASKS[False]}"
    recommended, assumed = verdict.recommended, list[str]()
    assumed.append(f"95% interval of the optimal learning rate {recommended.low:.2g} to {recommended.high:.2g}")
    if model is None:
        assumed.append("the model is not known")
    elif model.width_error:
        assumed.append(f"the model's width is an estimate by {model.source}")
    if math.isnan(place.batch_size):
        assumed.append("the batch size is not said")
    elif config.per_device:
        assumed.append(f"the number of devices is not said, and 1 to {MOST_DEVICES} are allowed for")
    if math.isnan(place.steps):
        assumed.append("the number of steps is not said")
    if far := evidence.unmeasured(place):
        names = " or ".join(far.values())
        assumed.append(f"no source has measured {names} in {_TASKS[place.rl]}, so the interval is an extrapolation")
    if config.task is None:
        assumed.append(
            f"the task is not said, so the more lenient one counts, {_TASKS[place.rl]}; --task says which it is"
        )
        if verdict.log_factor < 0:
            assumed.append("it may be preference training, of which nothing is known")
    # The others are LoRA with another alpha.
    measured = [variant for variant in config.variants if measured_factor(variant, config.rank).where]
    if place.rl and measured:
        names = " and ".join(VARIANT_NAMES[variant] for variant in measured)
        assumed.append(f"the learning rate of {names} over LoRA's was measured in {_TASKS[False]}")
    source = f"optimal learning rates of {evidence.sources(place)} sources (docs/other-runs.md)"
    return [Finding(code, _level(config, verdict, place, evidence), message, source, "; ".join(assumed), line=line)]


def judge(config: TrainingConfig, model: ModelFacts | None, evidence: LrEvidence) -> tuple[Verdict, Place] | str:
    """Return what a run's learning rate would cost and where, or why nothing is known of it, as the end of a sentence.

    Where the number of devices is not said, the verdict is the mildest of one device and of MOST_DEVICES, and where the
    task is not said, that of both tasks.
    """
    if config.task not in (None, "sft", "rl"):
        return f"no source has measured learning rates of {config.task} runs"
    if config.method is None:
        return "the file does not say whether this is LoRA or full fine-tuning"
    if not config.adam:
        return f"all sources are of Adam, and the optimizer is {config.optimizer}"
    if config.rslora and (config.rank or 0) < 1:
        return "the file does not say the rank, on which the learning rate of rsLoRA depends"
    if config.variant and not {"pissa", "olora"} & {*config.variants}:
        return f"no source has measured learning rates of the variant {config.variant}"
    verdicts: list[tuple[Level, Verdict, Place]] = []
    for rl in (False, True) if config.task is None else (config.task == "rl",):
        for devices in (1, MOST_DEVICES) if config.per_device else (1,):
            place = _place(config, model, rl, devices)
            # Optima move with the batch size and the length as was measured; for the width there is the law alone.
            if width := evidence.unmeasured(place).get("width"):
                return f"no source has measured {width} in {_TASKS[rl]}"
            verdict = _verdict(config, place, evidence)
            verdicts.append((_level(config, verdict, place, evidence), verdict, place))
            if verdicts[-1][0] == "note":
                break
    _, verdict, place = max(verdicts, key=lambda judged: (get_args(Level).index(judged[0]), -judged[1].share.mean))
    return verdict, place


def _place(config: TrainingConfig, model: ModelFacts | None, rl: bool, devices: int) -> Place:
    """Return where the learning rate is used, with a number of devices that counts where the file says none."""
    batch, steps = math.nan, math.nan
    # Of RL, a global batch counts prompts, and a batch per device responses.
    group = config.group_size if rl else 1
    if config.batch_size is not None and (group or config.global_batch is None):
        batch = float(config.batch_size * (devices if config.per_device else 1))
    if config.steps is not None and config.steps > 0:
        steps = float(config.steps)
    place = Place("", math.nan, str(config.method), rl, batch, steps)
    if model is None:
        return place
    return place._replace(family=model.family, width=float(model.width), width_error=model.width_error)


def _verdict(config: TrainingConfig, place: Place, evidence: LrEvidence) -> Verdict:
    shift, error = (0.0, 0.0) if place.method == "fullft" else evidence.shift(config.alpha, config.rank)
    log_factor, factor_error = _variant_factor(config, evidence)
    return evidence.verdict(math.log(config.lr or math.nan), place, shift - log_factor, math.hypot(error, factor_error))


def _variant_factor(config: TrainingConfig, evidence: LrEvidence) -> tuple[float, float]:
    """Return the natural logarithm of the optimal LR of a run's variants over that of LoRA, and its standard error."""
    log_factor, error = evidence.alpha_exponent * math.log(config.alpha_factor), 0.0
    for variant in config.variants:
        factor = measured_factor(variant, config.rank)
        log_factor, error = log_factor + math.log(factor.value), math.hypot(error, factor.log_error)
    return log_factor, error


def level(verdict: Verdict, place: Place) -> Level:
    """Return the level of a finding; advice/docs/audit-codes.md has how often each is right."""
    # In RL, optima of full fine-tuning differ by a factor of 100: of four low LRs within that, three lost nothing.
    costs = verdict.outside_80 and verdict.p_margin > SURE
    costs &= not (place.rl and verdict.log_factor < 0 and place.method == "fullft")
    # Where runs may diverge, the interval of the loss has no meaning.
    if verdict.outside_95 and (
        place.method == "fullft" or verdict.share.low > verdict.margin or (costs and verdict.may_diverge)
    ):
        return "error"
    return "warning" if verdict.outside_95 or costs else "note"


def _level(config: TrainingConfig, verdict: Verdict, place: Place, evidence: LrEvidence) -> Level:
    """Return the level of a finding about a run, which is lower for an LR that is too low, since it only wastes time.

    Where the task is not said it may be right for preference training, and beyond all that was measured it is not sure.
    """
    if config.task is None and verdict.log_factor < 0:
        return "note"
    said = level(verdict, place)
    return "warning" if said == "error" and verdict.log_factor < 0 and evidence.unmeasured(place) else said

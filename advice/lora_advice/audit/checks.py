"""All checks of `lora-advice audit`. They read records of runs and what is known, and start no run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lora_advice.audit.config import Knowledge, TrainingConfig
from lora_advice.audit.settings import (
    check_alpha_lr,
    check_batch,
    check_lr_differs,
    check_precision,
    check_same_lr,
    check_scale,
    check_short_run,
    check_variants,
)
from lora_advice.audit.structure import (
    check_attention_only,
    check_capacity,
    check_experts,
    check_fused,
    check_parameters,
    check_patterns,
    check_unembedding,
)
from lora_advice.finding import Finding


def _check_lr(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    from lora_advice.audit.lr import check_lr

    return check_lr(config, known)


RUN_CHECKS: tuple[Callable[[TrainingConfig, Knowledge], list[Finding]], ...] = (
    *(_check_lr, check_patterns, check_experts, check_fused, check_attention_only, check_unembedding, check_parameters),
    *(check_capacity, check_scale, check_variants, check_short_run, check_batch, check_precision),
)
"""Checks of one run. A finding without a path gets that of its run. What they need is imported when they are called."""
FOLDER_CHECKS: tuple[Callable[[Sequence[TrainingConfig], Knowledge], list[Finding]], ...] = (
    *(check_same_lr, check_alpha_lr, check_lr_differs),
)
"""Checks that compare the runs of all files with each other. Each finding names its path."""

_LEVELS = ("error", "warning", "note")


def audit(configs: Sequence[TrainingConfig], known: Knowledge | None = None) -> list[Finding]:
    """Return what the readers and all checks find: run by run in the order given, and errors first within a run."""
    known = known or Knowledge()
    return [finding for config in configs for finding in check_run(config, known)] + compare_runs(configs, known)


def check_run(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return what the reader and the checks find of a run alone, errors first."""
    found = [*config.findings, *(finding for check in RUN_CHECKS for finding in check(config, known))]
    found.sort(key=lambda finding: _LEVELS.index(finding.level))
    return [replace(finding, path=finding.path or config.path, run=config.name) for finding in found]


def compare_runs(configs: Sequence[TrainingConfig], known: Knowledge) -> list[Finding]:
    """Return what is found of runs beside each other."""
    return [finding for check in FOLDER_CHECKS for finding in check(configs, known)]

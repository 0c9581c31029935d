"""What the configurations and finished adapters that people have would cost, without a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from lora_advice.errors import UserError

if TYPE_CHECKING:
    from lora_advice.audit.config import Knowledge, TrainingConfig
    from lora_advice.audit.output import Report
    from lora_advice.finding import Finding


def audit(
    *paths: str | Path,
    file_format: str | None = None,
    completion_tokens: float | None = None,
    hub: bool = False,
    skip_unknown: bool = False,
) -> Report:
    """Say what is wrong in the configurations of other trainers and in adapters, from the files alone.

    Args:
        paths: files and folders.
        file_format: read the files as this format, such as `axolotl`, in place of recognizing it.
        completion_tokens: the mean number of scored tokens of an example, which no configuration says.
        hub: whether models that are not known here may be looked up on the hub.
        skip_unknown: whether to pass over named files that state no training run, as over those in folders.

    Returns:
        A record with the training runs that were read (`configs`), the `findings`, the files that could not be read
        (`not_read`), and the number of findings by level (`counts`); advice/docs/audit.schema.json describes it.

    Raises:
        UserError: no path is given, or a path or the format does not exist, or a number of tokens is not above 0.

    Examples:
        >>> path = Path("sft.yaml")
        >>> _ = path.write_text("base_model: Qwen/Qwen3-8B\\nadapter: lora\\nlora_r: 16\\nlora_alpha: 32\\n"
        ...                     "lora_target_modules: [q_proj, v_proj]\\nlearning_rate: 2e-5\\ndatasets: []\\n")
        >>> for finding in audit(path).findings:
        ...     print(finding.line, finding.level, finding.code)
        6 warning lr
        5 warning attention-only
        6 note lr-text
        3 note parameters
    """
    from lora_advice.audit.config import Knowledge
    from lora_advice.audit.files import read_paths
    from lora_advice.audit.limits import SECONDS
    from lora_advice.audit.output import Report

    if not paths or "" in paths:
        raise UserError("audit: no path is given; a file or a folder is needed, and an empty path is neither")
    if completion_tokens is not None and not 0 < completion_tokens < math.inf:
        raise UserError(f"completion_tokens {completion_tokens}: allowed: numbers above 0")
    known = Knowledge(completion_tokens, hub)
    # The hub may take its time.
    seconds = 60 if hub else SECONDS
    reading = read_paths([*map(Path, paths)], file_format, lambda run: check_run(run, known), skip_unknown, seconds)
    return Report.of(reading, compare_runs(reading.configs))


def check_run(config: TrainingConfig, known: Knowledge) -> list[Finding]:
    """Return what the reader and the checks find of a run alone, errors first."""
    from lora_advice.audit import lr, settings, structure
    from lora_advice.finding import Level

    checks = (lr.check_lr, *structure.CHECKS, *settings.CHECKS)
    findings = [*config.findings, *(finding for check in checks for finding in check(config, known))]
    findings.sort(key=lambda finding: get_args(Level).index(finding.level))
    return [replace(finding, path=finding.path or config.path, run=config.name) for finding in findings]


def compare_runs(configs: Sequence[TrainingConfig]) -> list[Finding]:
    """Return what is found of runs beside each other; each finding names its path."""
    from lora_advice.audit.settings import check_alpha_lr, check_lr_differs, check_same_lr

    return [*check_same_lr(configs), *check_alpha_lr(configs), *check_lr_differs(configs)]

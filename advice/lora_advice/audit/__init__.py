"""What the configurations and finished adapters that people have would cost, without a run."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

from lora_advice.audit.config import Task, TrainingConfig
from lora_advice.audit.files import read_paths
from lora_advice.audit.lr import lr_findings
from lora_advice.audit.output import Report
from lora_advice.audit.regret import shipped_evidence
from lora_advice.audit.settings import check_settings, compare_runs
from lora_advice.audit.structure import check_layers
from lora_advice.errors import UserError
from lora_advice.finding import Finding, Level
from lora_advice.models import ModelFacts, facts


def audit(
    *paths: str | Path,
    file_format: str | None = None,
    hub: bool = False,
    skip_unknown: bool = False,
    task: Task | None = None,
) -> Report:
    """Say what is wrong in the configurations of other trainers and in adapters, from the files alone.

    Files are recognized, or read as `file_format`, such as `axolotl`. With `hub`, models that are not known here may be
    looked up on the hub. With `skip_unknown`, named files that state no training run are passed over, as those in
    folders are. `task`, `sft` or `rl`, is that of runs whose file does not say it. A path or a format that does not
    exist raises UserError. docs/audit.schema.json describes the report.

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
    if not paths or "" in paths:
        raise UserError("audit: no path is given; a file or a folder is needed, and an empty path is neither")
    if task not in (None, "sft", "rl"):
        raise UserError(f"--task {task}: allowed: sft, rl")
    check = partial(check_run, hub=hub)
    configs, findings, not_read = read_paths([*map(Path, paths)], file_format, check, skip_unknown, hub, task)
    findings += compare_runs(configs)
    levels = [finding.level for finding in findings]
    return Report(configs, findings, not_read, {level: levels.count(level) for level in get_args(Level)})


def check_run(config: TrainingConfig, hub: bool = False, model: ModelFacts | None = None) -> list[Finding]:
    """Return what the reader and the checks find of a run alone, errors first; `model` is known of a loaded one."""
    model = model or facts(config.model, Path(config.path).parent, hub)
    findings = [*config.findings, *lr_findings(config, model, shipped_evidence())]
    findings += [*check_layers(config, model), *check_settings(config)]
    findings.sort(key=lambda finding: get_args(Level).index(finding.level))
    return [replace(finding, path=finding.path or config.path, run=config.name) for finding in findings]

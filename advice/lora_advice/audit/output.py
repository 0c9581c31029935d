"""What `lora-advice audit` prints: text, JSON, and SARIF for code hosts."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any
from urllib.parse import quote

from lora_advice.audit.config import METHODS, TrainingConfig
from lora_advice.audit.files import NotRead
from lora_advice.finding import Finding, Level
from lora_advice.formats import lr, printable

FEW = 10  # up to so many runs are shown in full
_TASKS = {"sft": "SFT", "rl": "RL", "preference": "preference training", "pretraining": "pretraining"}


@dataclass(frozen=True)
class Report:
    """All that was read and found, as `--json` prints it; docs/audit.schema.json is its schema."""

    configs: list[TrainingConfig]
    findings: list[Finding]
    not_read: list[NotRead]
    counts: dict[Level, int]  # number of findings by level
    version: int = 3  # it is raised when a field changes its meaning or goes

    def lines(self, show_all: bool) -> list[str]:
        """Return the text: runs with their findings, files that were not read, and counts; of many runs not all.

        What names of files and texts in them could tell a terminal, or GitHub's log, is written as an escape sequence.
        """
        full, lines = show_all or len(self.configs) <= FEW, list[str]()
        by_run = defaultdict[tuple[str, str], list[Finding]](list)
        for finding in self.findings:
            if full or finding.level != "note":
                by_run[finding.path, finding.run].append(finding)
        hidden = 0
        for config in self.configs:
            findings = by_run.pop((config.path, config.name), [])
            if not full and not findings:
                hidden += 1
                continue
            lines.append(heading(config))
            for finding in findings:
                line = f"line {finding.line}: " if finding.line is not None else ""
                said = f"{line}{finding.message} [{finding.source}; {finding.sure}]"
                lines.append(f"  {finding.level} {finding.code}: {said}")
        if hidden:
            lines.append(f"{_count(hidden, 'more run')} without an error or a warning (--all shows them)")
        lines += [f"{missing.path}: not read: {missing.reason}" for missing in self.not_read]
        found = ", ".join(_count(number, level) for level, number in self.counts.items())
        unread = f", {_count(len(self.not_read), 'file')} not read" if self.not_read else ""
        lines.append(f"{_count(len(self.configs), 'run')}{unread}: {found}")
        return [re.sub(r"^(\s*):(?=:)|#(?=#\[)", r"\1\\x3a", printable(line)) for line in lines]

    def sarif(self) -> dict[str, Any]:
        """Return it as SARIF 2.1.0, which code hosts show beside the lines."""
        results = []
        for finding in self.findings:
            location: dict[str, Any] = {"artifactLocation": {"uri": quote(os.fsencode(finding.path))}}
            if finding.line is not None:
                location["region"] = {"startLine": finding.line}
            text = f"{finding.message} (source: {finding.source}; {finding.sure})"
            result = {"ruleId": finding.code, "level": finding.level, "message": {"text": text}}
            results.append(result | {"locations": [{"physicalLocation": location}]})
        rules = [{"id": code} for code in sorted({finding.code for finding in self.findings})]
        driver = {"name": "lora-advice audit", "version": version("lora-advice"), "rules": rules}
        return {
            "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
            "version": "2.1.0",
            "runs": [{"tool": {"driver": driver}, "results": results}],
        }


def heading(config: TrainingConfig) -> str:
    """Return the line that says how a run was understood, and what the file does not say."""

    def default(name: str) -> str:
        return "" if name in config.lines else " (default)"

    kind = f"{config.format}: {_TASKS[config.task] if config.task else 'training'}"
    kind += f" of {config.model}" if config.model else ""
    parts = [kind + (f" by {METHODS[config.method]}" if config.method else "")]
    if config.lr is not None:
        schedule = f" ({config.schedule})" if config.schedule is not None else ""
        parts.append(f"LR {lr(config.lr)}{default('lr')}{schedule}")
    if config.batch_size is not None:
        parts.append(f"batch {config.batch_size}{' per device' if config.per_device else ''}")
    if config.steps is not None and config.steps > 0:
        parts.append(f"{config.steps:g} steps")
    elif config.epochs is not None:
        parts.append(_count(config.epochs, "epoch"))
    if config.method == "lora":
        for name, value in (("rank", config.rank), ("alpha", config.alpha)):
            parts.append(f"{name} not said" if value is None else f"{name} {value:g}{default(name)}")
        targets = [*(config.targets or ()), *config.target_parameters]
        where = "all linear layers" if targets == ["all-linear"] else " ".join(targets)
        parts.append(f"on {'the default modules' if config.targets is None and not targets else where}")
        parts += [word for word, on in (("rsLoRA", config.rslora), ("DoRA", config.dora)) if on]
        parts += [f"LoRA+ with ratio {config.lr_ratio:g}"] if "lora_plus" in config.variants else []
        parts += [config.variant] if config.variant else []
    if config.optimizer is not None and "adam" not in config.optimizer.lower():
        parts.append(config.optimizer)
    if config.bits is not None:
        parts.append(f"{config.bits}-bit base")
    values = (config.task, config.model, config.method, config.lr, config.batch_size, config.steps or config.epochs)
    nouns = ("task", "model", "method", "LR", "batch size", "steps or epochs")
    if missing := [noun for noun, value in zip(nouns, values, strict=True) if value is None]:
        parts.append(f"not known: {', '.join(missing)}")
    return f"{config.where}: {', '.join(parts)}"


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"

"""What the shipped examples of the frameworks would cost: `lorabench audit` over them, as a table and a page.

    python -m advice.benchmarks.framework_defaults [CLONES]

CLONES is a folder with a clone of each repository in `frameworks.csv`, bare or not, below OWNER/NAME. Only the pinned
commits are read. Without it the learning rates in the table are judged by the evidence of today, and the findings stay
those of the clones. It writes `framework_defaults.csv`, one row for each run that a file states, and
`framework_findings.csv`, one row for each finding above a note, into paper_figures/published/evidence, with a picture,
and the tables of advice/docs/defaults.md. The tables hold facts of the files, with repository, commit and path; no file
is copied.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from lora_advice.audit import check_run
from lora_advice.audit.config import TrainingConfig
from lora_advice.audit.files import read_paths
from lora_advice.audit.lr import judge
from lora_advice.audit.regret import shipped_evidence
from lora_advice.audit.settings import compare_runs
from lora_advice.finding import Finding
from lora_advice.models import facts
from matplotlib.figure import Figure

from advice.benchmarks.audit_regret import rounded
from lorabench.errors import UserError
from lorabench.figures import style
from lorabench.store.io import write_csv
from lorabench.store.published import PUBLISHED
from lorabench.utils.markdown import write_part


class Framework(NamedTuple):
    """Where a framework's examples are."""

    name: str
    repository: str
    commit: str
    date: str
    folder: str


with Path(__file__).with_name("frameworks.csv").open(newline="") as file:
    FRAMEWORKS = [Framework(**row) for row in csv.DictReader(file)]

SAID = (
    *("task", "method", "model", "bits", "lr", "schedule", "optimizer"),
    *("micro_batch", "accumulation", "devices", "global_batch", "group_size", "steps", "epochs"),
    *("rank", "alpha", "rslora", "dora", "lr_ratio", "variant"),
)
"""What a row has of the record of a run: all that the verdict on its learning rate rests on."""

PAGE = Path("advice/docs/defaults.md")
COSTLIEST = 5
_OF_LR = r"(?:^| )(?:rl-)?lr(?:$| )"
"""The codes of findings on the learning rate, in a list of codes."""


def extracted(framework: Framework, clones: Path, folder: Path) -> Path:
    """Write the examples of a framework's pinned commit into a folder, and return the folder."""
    command = ["git", "-C", str(clones / framework.repository), "archive", framework.commit, framework.folder]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise UserError(f"{clones}: there is no clone of {framework.repository} with the commit {framework.commit}")
    target = folder / framework.name
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(target, filter="data")
    return target


def runs_of(framework: Framework, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the runs that a framework's examples state, and the findings above a note, one row each."""
    configs, _, _ = read_paths([folder])
    alone = [finding for config in configs for finding in check_run(config)]
    findings = alone + compare_runs(configs)
    about = {"framework": framework.name, "repository": framework.repository, "commit": framework.commit}
    runs = pd.DataFrame([about | _run(config, folder, findings) for config in configs])
    rows = []
    for finding in findings:
        if finding.level != "note":
            row = about | {
                "path": Path(finding.path).relative_to(folder).as_posix(),
                "run": finding.run,
                "line": finding.line,
            }
            row |= {"level": finding.level, "code": finding.code}
            rows.append(row | {"message": finding.message.replace(f"{folder.as_posix()}/", "")})
    return runs, pd.DataFrame(rows)


def _run(config: TrainingConfig, folder: Path, findings: Sequence[Finding]) -> dict[str, Any]:
    own = [finding for finding in findings if (finding.path, finding.run) == (config.path, config.name)]
    row: dict[str, Any] = {
        "path": Path(config.path).relative_to(folder).as_posix(),
        "run": config.name,
        "format": config.format,
    }
    row |= {name: getattr(config, name) for name in SAID}
    row |= _judged(config)
    for level in ("error", "warning"):
        row[f"{level}s"] = " ".join(sorted({finding.code for finding in own if finding.level == level}))
    return row


def _judged(config: TrainingConfig) -> dict[str, float]:
    """Return the columns that say how far a run's learning rate is from the recommended one; NaN where that is open."""
    judged = None
    if config.lr is not None and config.lr > 0:
        judged = judge(config, facts(config.model, Path(config.path).parent), shipped_evidence())
    if judged is None or isinstance(judged, str):
        return dict.fromkeys(("factor", "recommended", "low", "high", "share", "share_low", "share_high"), math.nan)
    verdict, _ = judged
    columns = {"factor": math.exp(verdict.log_factor), "recommended": verdict.recommended.mean}
    columns |= {"low": verdict.recommended.low, "high": verdict.recommended.high, "share": verdict.share.mean}
    return columns | {"share_low": verdict.share.low, "share_high": verdict.share.high}


def judged_again(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `framework_defaults.csv`, each learning rate judged by the evidence of today."""
    whole = ["bits", "micro_batch", "accumulation", "devices", "global_batch", "group_size", "rank"]
    table = runs.astype(dict.fromkeys(whole, "Int64"))
    verdicts = []
    for row in table.to_dict("records"):
        said = {name: row[name] for name in SAID if pd.notna(row[name])}
        known = pd.notna(row["factor"])
        verdicts.append(_judged(TrainingConfig(row["path"], row["format"], **said)) if known else {})
    return table.assign(**pd.DataFrame(verdicts))


def page_parts(runs: pd.DataFrame, findings: pd.DataFrame) -> Iterator[str]:
    """Yield the lines of the page's tables."""
    columns = ["framework, at its commit of", "runs", "LoRA, full", "learning rate judged"]
    columns += ["over the recommended one: median (range)", "with an error", "with a warning"]
    yield f"| {' | '.join(columns)} |"
    yield "|---|---|---|---|---|---|---|"
    for framework in FRAMEWORKS:
        own = runs[runs["framework"] == framework.name]
        factors = own["factor"].dropna()
        spread = f"{factors.median():.2g} ({factors.min():.2g} to {factors.max():.2g})" if len(factors) else ""
        methods = ", ".join(str((own["method"] == method).sum()) for method in ("lora", "fullft"))
        link = f"[{framework.name}](https://github.com/{framework.repository}/tree/{framework.commit})"
        numbers = [len(own), methods, len(factors), spread, (own["errors"] != "").sum(), (own["warnings"] != "").sum()]
        yield f"| {link}, {framework.date} | {' | '.join(map(str, numbers))} |"
    yield ""
    yield "| finding | " + " | ".join(framework.name for framework in FRAMEWORKS) + " |"
    yield "|---|" + "---|" * len(FRAMEWORKS)
    for (level, code), rows in sorted(findings.groupby(["level", "code"])):
        counts = [str((rows["framework"] == framework.name).sum() or "") for framework in FRAMEWORKS]
        yield f"| [{code}](audit-codes.md#{code}), {level} | {' | '.join(counts)} |"
    yield ""
    yield f"The {COSTLIEST} runs that are expected to lose most, one of each model, method and learning rate:"
    yield ""
    columns = ["framework, file", "model, method", "learning rate", "recommended, 95% interval"]
    yield f"| {' | '.join(columns)} | share of the gain lost |"
    yield "|---|---|---|---|---|"
    flagged = runs[runs["errors"].str.contains(_OF_LR) | runs["warnings"].str.contains(_OF_LR)]
    costly = flagged.sort_values("share_low", ascending=False, kind="stable")
    for row in costly.drop_duplicates(["framework", "model", "method", "lr"]).head(COSTLIEST).itertuples(index=False):
        link = f"https://github.com/{row.repository}/blob/{row.commit}/{row.path}"
        method = "LoRA" if row.method == "lora" else "full fine-tuning"
        kind = " in RL" if row.task == "rl" else ""
        yield (
            f"| {row.framework}, [{Path(str(row.path)).name}]({link}) | {row.model}, {method}{kind} | {row.lr:.2g} | "
            f"{row.recommended:.2g} [{row.low:.2g}, {row.high:.2g}] | "
            f"{row.share:.0%} [{row.share_low:.0%}, {row.share_high:.0%}] |"
        )


_LOOKS = {"lora": ("LoRA", "tab:blue", 0.17), "fullft": ("full fine-tuning", "black", -0.17)}
# Marks of the level of the finding on the learning rate.
_MARKS = {"": ("o", "no warning"), "warning": ("^", "warning"), "error": ("X", "error")}


@style.applied()
def draw(runs: pd.DataFrame) -> Figure:
    """Draw the factor of each judged learning rate over the recommended one, by framework, SFT and RL apart."""
    judged = runs[runs["factor"].notna()]
    flags = {level: judged[f"{level}s"].str.contains(_OF_LR) for level in ("error", "warning")}
    judged = judged.assign(level=np.select([flags["error"], flags["warning"]], ["error", "warning"], ""))
    figure = Figure(figsize=(style.WIDTH, 1 + 0.43 * len(FRAMEWORKS)), layout="constrained")
    panels: Any = figure.subplots(1, 2, sharey=True)
    for axes, (task, title) in zip(panels, (("sft", "supervised"), ("rl", "reinforcement learning")), strict=True):
        axes.axvline(1.0, color=style.MUTED, linewidth=0.8)
        for (place, framework), method in product(enumerate(FRAMEWORKS), _LOOKS):
            _, colour, shift = _LOOKS[method]
            of = [judged["framework"] == framework.name, judged["method"] == method, judged["task"] == task]
            own = judged[of[0] & of[1] & of[2]]
            for level, (mark, _) in _MARKS.items():
                flagged = own[own["level"] == level]
                # Equal factors are spread a little, so that their number can be seen.
                spread = flagged.groupby(flagged["factor"].round(3)).cumcount() % 12 * 0.022 - 0.12
                look: dict[str, Any] = {"color": colour, "s": 14 if level else 9, "alpha": 0.7, "linewidth": 0}
                axes.scatter(flagged["factor"], -place + shift + spread, marker=mark, **look)
        axes.set(
            xscale="log",
            title=title,
            xlabel="learning rate over the recommended one",
            ylim=(0.4 - len(FRAMEWORKS), 0.6),
        )
        style.log_ticks(axes.xaxis, subs=(1.0,))
    panels[0].set_yticks([-place for place in range(len(FRAMEWORKS))], [framework.name for framework in FRAMEWORKS])
    handles = [style.line(name, linestyle="", marker="o", color=colour) for name, colour, _ in _LOOKS.values()]
    handles += [style.line(name, linestyle="", marker=mark, color=style.MUTED) for mark, name in _MARKS.values()]
    figure.legend(handles=handles, loc="outside upper center", ncols=5)
    return figure


def main() -> None:
    """Write the tables, the picture and the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("clones", type=Path, nargs="?", help="folder with a clone of each repository")
    clones, out = parser.parse_args().clones, PUBLISHED / "evidence"
    if clones is None:
        runs, findings = (pd.read_csv(out / f"framework_{name}.csv") for name in ("defaults", "findings"))
        runs = judged_again(runs).fillna({"errors": "", "warnings": ""})
    else:
        with tempfile.TemporaryDirectory() as temporary:
            parts = [runs_of(framework, extracted(framework, clones, Path(temporary))) for framework in FRAMEWORKS]
        runs, findings = (pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True))
        write_csv(findings, out / "framework_findings.csv")
    runs = rounded(runs)
    write_csv(runs, out / "framework_defaults.csv")
    style.write_figure(draw(runs), out / "framework_defaults.svg")
    write_part(
        PAGE, "tables", "`python -m advice.benchmarks.framework_defaults`", "\n".join(page_parts(runs, findings))
    )


if __name__ == "__main__":
    main()

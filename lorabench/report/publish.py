"""Publishing: copies of a finished preset or of the evidence of all sources, and the pages that show them.

The generated parts of the README and of the pages in `docs/` are written from the committed tables alone. A part stands
between two marker lines that name it; the text around it is written by hand. Everything that is longer (all claims of
all presets, all sources, criteria, columns, optimal learning rates) is made when the documentation is built, by
`docs/hooks.py`.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from lorabench.analysis.rules import DECIDED
from lorabench.claims.judge import CLAIMS, CORE
from lorabench.config.loading import preset_path
from lorabench.errors import UserError
from lorabench.figures.evidence import draw_forest, draw_matrix
from lorabench.figures.style import write_figure
from lorabench.report import claim_text, summary
from lorabench.report.freeze import came_out_again, check_kept, preset_sha256, read_frozen, summary_of
from lorabench.runs import PROTOCOL_VERSION
from lorabench.sources.answers import QUESTIONS, answer, count_of_core
from lorabench.sources.lr_optima import known_optima, optima_table
from lorabench.sources.measurements import (
    HELD_OUT,
    MEASURES,
    holds_again,
    matrix,
    measurement_table,
    range_text,
    read_held_out,
    read_provenance,
    share_text,
    summary_table,
)
from lorabench.sources.studies import judge, read_studies, source_folders
from lorabench.store.io import read_claims, read_table, write_csv
from lorabench.store.layout import Layout
from lorabench.utils import formats
from lorabench.utils.files import atomic_path, write_json
from lorabench.utils.studies import studies
from lorabench.utils.yaml_files import read_yaml

DEFAULT_PRESET = "laptop"
"""The preset that Snakemake runs where none is named."""

PUBLISHED = Path("paper_figures/published")
"""The folder of published results, from the root of the repository."""

SOURCES = Path("paper_figures/reference")
"""The folder of the shipped sources, from the root of the repository."""


CONTROLS = tuple(name for study in studies() for name in study.texts.get("controls", ()))
"""The presets that test a theory alone, on schedules, bases and arms that are not the paper's or with others' runs."""

NOT_PUBLISHED = ("run_ids",)
"""The columns of the table `claims` that are not published."""

_FIGURE_KINDS = (".svg", ".png", ".csv")
"""The suffixes of a figure's files: two pictures, and the table of what they show."""

_RESULTS, _OTHER_RUNS = Path("docs/results.md"), Path("docs/other-runs.md")


def published_folders(root: Path) -> list[Path]:
    """Return the folders of the presets whose verdicts a repository has published."""
    return sorted(path.parent for path in (root / PUBLISHED).glob("*/provenance.json"))


def evidence_folders(root: Path) -> list[Path]:
    """Return the published folders of the presets that are evidence on the claims and on learning rates."""
    return [folder for folder in published_folders(root) if folder.name not in CONTROLS]


def publish(layout: Layout, root: Path) -> None:
    """Copy the figures, claims and provenance of a finished preset to where the repository shows them; write its pages.

    Raises:
        UserError: the preset has held-out seeds, a page has no place for its part, the figure of the verdicts has not
            been drawn, or the table claims is from another version; then nothing is changed.
    """
    if layout.preset.first_seed:
        raise UserError(
            f"preset {layout.name} has other seeds than the explored ones; publish it with --held-out and the file "
            "that `lorabench freeze` wrote"
        )
    runs, claims = read_table(layout.tables(), "runs"), read_claims(layout.tables())
    drawn = _drawn(layout)
    # Nothing is written before every part is known to have its place.
    _filled(root, dict.fromkeys(_parts(root, layout.name), ""))
    _copy(drawn, claims, provenance(layout, runs), layout.published)
    _write_pages(root)


def _drawn(layout: Layout) -> list[Path]:
    """Return the files of a finished preset's figures."""
    drawn = sorted(path for path in layout.figures.glob("*.*") if path.suffix in _FIGURE_KINDS)
    if layout.figures / "verdicts.svg" not in drawn:
        raise UserError(f"figure {layout.figures}/verdicts.svg does not exist; run the preset {layout.name} first")
    return drawn


def _copy(figures: Iterable[Path], claims: pd.DataFrame, made: Mapping[str, Any], folder: Path) -> None:
    """Make a folder's files those of a preset: its figures, claims and provenance."""
    kept = {folder / path.name for path in figures}
    for path in figures:
        with atomic_path(folder / path.name) as unfinished:
            shutil.copyfile(path, unfinished)
    for path in set(folder.glob("*.*")) - kept:
        path.unlink()
    write_csv(claims.drop(columns=list(NOT_PUBLISHED)), folder / "claims.csv")
    write_json(made, folder / "provenance.json")


def publish_held_out(path: Path, root: Path) -> str:
    """Copy the claims, provenance and figures' tables of runs on held-out seeds to where the repository shows them.

    They lie in the folder `held_out` of the published preset, with the table `came_out_again`. A preset that was never
    explored is published itself, with its pictures. The pages are written.

    Args:
        path: the file that `lorabench freeze` wrote before the runs.
        root: the repository's root.

    Returns:
        A sentence that counts the verdicts that came out again.

    Raises:
        UserError: the runs did not keep to the frozen rules (see `check_kept`), a table is missing, or a page has no
            place for its part; then nothing is changed.
    """
    frozen = read_frozen(path)
    layout = Layout.of(frozen.preset)
    runs, claims = read_table(layout.tables(), "runs"), read_claims(layout.tables())
    commit = check_kept(frozen, path, layout, runs, claims)
    again, folder = came_out_again(frozen, claims), root / PUBLISHED / preset_path(frozen.preset).stem
    frozen_in = {"file": str(path), "commit": commit, "date": frozen.date, "rules_sha256": frozen.rules_sha256}
    made = provenance(layout, runs) | {"frozen": frozen_in}
    if frozen.expected:
        _filled(root, dict.fromkeys(_parts(root), ""))
        _copy(sorted(layout.figures.glob("*.csv")), claims, made, folder / HELD_OUT)
        write_csv(again, folder / HELD_OUT / "came_out_again.csv")
    else:
        drawn = _drawn(layout)
        _filled(root, dict.fromkeys(_parts(root, folder.name), ""))
        _copy(drawn, claims, made, folder)
    _write_pages(root)
    return summary_of(again)


def provenance(layout: Layout, runs: pd.DataFrame) -> dict[str, Any]:
    """Return what the results of a preset were computed from: the preset, the runs, the machines and the code."""
    environment = summary.environment(runs)
    return {
        "preset": layout.name,
        "preset_sha256": preset_sha256(layout.preset),
        "protocol_version": PROTOCOL_VERSION,
        "runs": len(runs),
        "runs_by_status": {str(status): int(count) for status, count in runs["status"].value_counts().items()},
        "run_seconds": round(float(runs["wall_s"].sum())),
        "devices": environment["devices"],
        "threads_per_job": [int(threads) for threads in environment["threads"]],
        "first_started": environment["started"][0],
        "last_started": environment["started"][1],
        "commits": environment["commits"],
        "runs_of_changed_code": environment["dirty"],
        "versions": environment["versions"],
        "inputs": summary.inputs(runs),
    }


def evidence_tables(
    more: Sequence[Path] = (), own: Sequence[pd.DataFrame] = (), presets: Sequence[Path] = ()
) -> dict[str, pd.DataFrame]:
    """Judge the shipped sources and those in more folders, and set own presets next to them.

    Args:
        own: presets of one's own, each as from `read_own`.
        presets: folders of published presets, whose optimal learning rates are pooled with those of the sources.

    Returns:
        By the names of their files: all verdicts (`claims`), their `matrix`, `measurements` with their `summary`, and
        the known optimal learning rates (`lr_optima`).

    Raises:
        UserError: a source is refused; then nothing is judged.
    """
    studies = read_studies(source_folders(*more))
    claims = pd.concat([judge(study) for study in studies], ignore_index=True)
    measurements = measurement_table(studies, claims, own)
    return {
        "claims": claims.drop(columns=list(NOT_PUBLISHED)),
        "matrix": matrix(claims, own),
        "measurements": measurements,
        "summary": summary_table(measurements),
        "lr_optima": optima_table(known_optima(studies, presets)),
    }


def write_evidence(tables: Mapping[str, pd.DataFrame], out: Path) -> None:
    """Write the tables of the evidence, as from `evidence_tables`, and its figures into a folder."""
    for name, rows in tables.items():
        write_csv(rows, out / f"{name}.csv")
    figures = {
        "matrix": draw_matrix(tables["matrix"]),
        "forest": draw_forest(tables["measurements"], tables["summary"]),
    }
    for name, figure in figures.items():
        for kind in ("svg", "png"):
            write_figure(figure, out / f"{name}.{kind}")


def publish_evidence(tables: Mapping[str, pd.DataFrame], root: Path) -> None:
    """Write the evidence to where a repository shows it, and the generated parts of its pages.

    Raises:
        UserError: a page has no place for its part; then nothing is changed.
    """
    _filled(root, dict.fromkeys(_parts(root), ""))
    write_evidence(tables, root / PUBLISHED / "evidence")
    _write_pages(root)


def _write_pages(root: Path) -> None:
    for page, text in pages(root).items():
        with atomic_path(root / page) as unfinished:
            unfinished.write_text(text, encoding="utf-8")


def pages(root: Path) -> dict[Path, str]:
    """Return the pages with generated parts, as paths from the root, with the text that they should have.

    Raises:
        UserError: a page has no place for its part.
    """
    return _filled(root, {place: make(root) for place, make in _parts(root).items()})


def _parts(root: Path, *presets: str) -> dict[tuple[Path, str], Callable[[Path], str]]:
    """Return what makes each part, by its page and name; presets may be named that were not published before."""
    names = {*presets, *(folder.name for folder in published_folders(root))}
    return {
        **{(page, "answers"): partial(answers_part, page=page) for page in (Path("README.md"), Path("docs/index.md"))},
        (_RESULTS, "matrix"): matrix_part,
        (_OTHER_RUNS, "evidence"): evidence_part,
        **{(_RESULTS, name): partial(results_part, preset=name) for name in sorted(names)},
    }


def _filled(root: Path, parts: Mapping[tuple[Path, str], str]) -> dict[Path, str]:
    """Return the text of each page with the given texts between the markers of its parts."""
    texts: dict[Path, str] = {}
    for (page, name), part in parts.items():
        text = texts.get(page) or ((root / page).read_text(encoding="utf-8") if (root / page).is_file() else "")
        writer = "`lorabench publish` and `lorabench evidence`, never by hand"
        texts[page] = _with_part(text, page, name, writer, part)
    return texts


def write_part(page: Path, name: str, writer: str, part: str) -> None:
    """Write a text between the markers of a part of a page; `writer` is what writes it, as the first marker says.

    Raises:
        UserError: the page has no place for the part.
    """
    text = _with_part(page.read_text(encoding="utf-8"), page, name, writer, part)
    with atomic_path(page) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _with_part(text: str, page: Path, name: str, writer: str, part: str) -> str:
    start, end = f"<!-- {name}: written by {writer} -->", f"<!-- end of {name} -->"
    before, start_in_text, rest = text.partition(start)
    _, end_in_text, after = rest.partition(end)
    if not (start_in_text and end_in_text):
        raise UserError(f"{page} has no place for its generated part: it needs the two lines {start} and {end}")
    return f"{before}{start}\n{part}\n{end}{after}"


def answers_part(root: Path, page: Path) -> str:
    """Return what was found in plain sentences, with the picture that shows it; links are those of a page."""
    folder = root / PUBLISHED / "evidence"
    cells, summarized = pd.read_csv(folder / "matrix.csv"), pd.read_csv(folder / "summary.csv")
    lines = [f"{count_of_core(cells)} The questions that matter most in use:", ""]
    for question in QUESTIONS:
        text = answer(question, cells)
        if question.claim_id == "B1":
            text += (
                f"{_mean_ratio(summarized)} [What the ratio depends on]({_link('studies/lr_ratio/README.md', page)}); "
                "`lorabench recommend` estimates a learning rate for your model."
            )
        lines.append(f"- {text}")
    picture = _link(PUBLISHED / "evidence/matrix.svg", page)
    return "\n".join([*lines, "", f"![The answers by the size of the model]({picture})", "", reproduced(root, page)])


def _mean_ratio(summarized: pd.DataFrame) -> str:
    """Return a sentence with the mean ratio of optimal learning rates; empty if fewer than two sources measured it."""
    [*rows] = summarized[summarized["measure"].eq("lr_ratio") & summarized["attribute"].isna()].to_dict("records")
    if not rows or not rows[0]["k"] > 1:
        return ""
    mean, low, high = (f"{math.exp(rows[0][name]):.1f}" for name in ("mean", "low", "high"))
    return f" Over {rows[0]['k']} sources the mean is {mean} times [{low}, {high}]."


def _link(file: Path | str, page: Path) -> str:
    """Return the path to a file from the folder of a page; both are paths from the root."""
    return os.path.relpath(file, page.parent)


def matrix_part(root: Path) -> str:
    """Return the claims of the matrix by the size of the model, as a table whose cells link to the runs."""
    cells = pd.read_csv(root / PUBLISHED / "evidence/matrix.csv")
    texts = []
    for cell in cells.to_dict("records"):
        page = _RESULTS if pd.isna(cell["source"]) else _OTHER_RUNS
        linked = f"[{claim_text.verdict(cell)}]({page.name}#{cell['origin']})"
        again = "" if pd.isna(cell["p_again"]) else f" {cell['p_again']:.0%}"
        marks = []
        if number := range_text(cell):
            seeds = f"{cell['n_seeds']:.0f} seed{'' if cell['n_seeds'] == 1 else 's'}" if cell["n_seeds"] > 0 else ""
            chosen = "‡" if cell["lr_chosen_on"] == "test" and "RL" in str(cell["scope"]) else ""
            marks = [share_text(cell), number, seeds + chosen]
        if cell["verdict"] in DECIDED and not pd.isna(cell["held_out"]):
            again_text = "holds on held-out seeds" if cell["explored"] else "all seeds held out"
            marks.append(again_text if holds_again(cell) else f"{cell['held_out']} on held-out seeds")
        text = "; ".join(filter(None, [f"{linked}{again}", *marks]))
        texts.append(formats.DASH if cell["verdict"] == "not tested" else text)
    scales = cells.sort_values("parameters", kind="stable")["scale"].unique()
    by_scale = cells.assign(text=texts).pivot(index="claim_id", columns="scale", values="text")[scales]
    statements = _as_stated_now(cells.drop_duplicates("claim_id"))[["claim_id", "statement"]]
    rows = statements.join(by_scale, on="claim_id").fillna(formats.DASH).to_numpy()
    return "\n".join(table(["", "claim", *scales], rows))


def reproduced(root: Path, page: Path) -> str:
    """Return a sentence on how many decided verdicts came out again on held-out seeds, of all presets and of each."""
    yes = every = 0
    each = []
    for folder in published_folders(root):
        if (again := read_held_out(folder)) is None:
            continue
        decided = _as_stated_now(again.dropna(subset="again"))
        failed = decided.loc[decided["again"] != "yes", "statement"]
        yes, every = yes + len(decided) - len(failed), every + len(decided)
        without = f" (not: {'; '.join(failed)})" if len(failed) else ""
        link = f"[{folder.name}]({_link(_RESULTS, page)}#{folder.name})"
        each.append(f"{link} {len(decided) - len(failed)} of {len(decided)}{without}")
    sentence = f"**Of {every} answers of yes or no, on these and other claims, {yes} came out again on held-out seeds**"
    return f"{sentence}: {', '.join(each)}." if each else f"{sentence}."


def _as_stated_now(claims: pd.DataFrame) -> pd.DataFrame:
    """Return claims in the words that they have now; a published table keeps those of its time."""
    words = {claim.id: claim.statement for claim in CLAIMS}
    return claims.assign(statement=claims["claim_id"].map(words).fillna(claims["statement"]))


def results_part(root: Path, preset: str) -> str:
    """Return what a preset says in short: the count of its verdicts, its core claims, this project's own predictions,
    and the claims that it decides."""
    folder = root / PUBLISHED / preset
    judged = _as_stated_now(claim_text.in_order(read_claims(folder, without=NOT_PUBLISHED)))
    made, again = read_provenance(folder), read_held_out(folder)
    decided = judged["verdict"].isin(DECIDED) & judged["kind"].ne("count")
    always = judged["claim_id"].isin(CORE) | judged["kind"].eq("own prediction")
    shown = judged[judged["verdict"].ne("not tested") & (decided | always)]
    picture = f"../{PUBLISHED}/{preset}/verdicts.svg"
    rows = []
    for claim in shown.to_dict("records"):
        verdict = "; ".join(filter(None, [claim_text.verdict(claim), claim_text.remark(claim)]))
        numbers = [claim_text.margin(claim), claim_text.measured(claim)]
        rows.append([claim["claim_id"], claim["statement"], verdict, *held_out(claim, again), *numbers])
    lines = [
        f"![Verdicts of the preset {preset}]({picture})",
        "",
        f"{claim_text.headline(judged)}. {made['runs']} runs, "
        f"{formats.duration(made['run_seconds'])} of one core on {' and '.join(made['devices'])}, "
        f"from {made['first_started'][:10]}. "
        f"[All claims](../{PUBLISHED}/{preset}/claims.csv).",
        *held_out_lines(made, again),
        "",
        *table(["", "claim", *verdict_columns(made, again), "margin", "measured, 95% interval"], rows),
    ]
    return "\n".join(lines)


def held_out_lines(made: Mapping[str, Any], again: pd.DataFrame | None) -> list[str]:
    """Return lines that say what of a published preset is held out; the arguments are those of `verdict_columns`."""
    if again is not None:
        return ["", f"{summary_of(again)}."]
    if frozen := made.get("frozen"):
        return [
            "",
            f"All seeds are held out: margins, rules and data were frozen in {frozen['commit'][:7]}, before any run.",
        ]
    return []


def verdict_columns(made: Mapping[str, Any], again: pd.DataFrame | None) -> list[str]:
    """Return the names of the columns of verdicts.

    Args:
        made: the published preset's provenance.
        again: its table `came_out_again`, as from `read_held_out`.
    """
    if again is not None:
        return ["explored", "held out"]
    return ["held out"] if "frozen" in made else ["verdict"]


def held_out(claim: Mapping[Any, Any], again: pd.DataFrame | None) -> list[str]:
    """Return the cell with a claim's verdict on held-out seeds, if the preset was run on them."""
    if again is None:
        return []
    verdicts = again.loc[again["claim_id"] == claim["claim_id"], "held_out"]
    return [str(verdicts.iloc[0]) if len(verdicts) else formats.DASH]


def evidence_part(root: Path) -> str:
    """Return the numbers that several sources measured, and each source with its doubts and a count of its verdicts."""
    folder = root / PUBLISHED / "evidence"
    summarized, judged = pd.read_csv(folder / "summary.csv"), pd.read_csv(folder / "claims.csv")
    rows = []
    for row in summarized[summarized["attribute"].isna()].to_dict("records"):
        is_log = row["measure"] == "lr_ratio"
        mean, low, high = (
            f"{math.exp(row[name]):.3g}" if is_log else f"{row[name]:+.4f}" for name in ("mean", "low", "high")
        )
        rows.append([MEASURES[row["measure"]], row["k"], f"{mean} [{low}, {high}]" if row["k"] > 1 else mean])
    lines = table(["measured", "sources", "mean, 95% interval"], rows)
    for path in sorted((root / SOURCES).glob("*/source.yaml")):
        source, name = read_yaml(path), path.parent.name
        verdicts = judged.loc[judged["source"].eq(name) & judged["verdict"].ne("not tested"), "verdict"]
        counted = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.value_counts().items())
        lines += [
            "",
            f"#### {name}",
            "",
            f"{source['about']}. From {source['origin']['repository']}, {source['origin']['date']}. "
            f"Doubts: {'; '.join(source['doubts'])}. Verdicts: {counted or 'none'}.",
        ]
    return "\n".join(lines)


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> list[str]:
    """Return the lines of a Markdown table; what would be markup in the cells is escaped."""
    header = list(header)
    return [
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
        *(f"| {' | '.join(escaped(str(cell)) for cell in row)} |" for row in rows),
    ]


def escaped(text: str) -> str:
    """Return text for Markdown, also for the cell of a table: markup of HTML is shown as it is, code is set as code."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|").replace("\n", " ")

"""Make what a preset's results show again, from the run folders to the page, and name what differs from what is there.

The steps of the workflow are repeated in a temporary folder, with links to what they read: run folders, scores, data.
Numbers must be equal exactly, where both are missing too. What is equal by value is taken over as it is there, so that
its hash, which what is made of it names, does not depend on the version of the library that wrote the file.

Training, scores of lm-eval and the measured table `compute` are not repeated: their checksums are checked.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir, suppress
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.config.inputs import FileDataset, FileProblems
from lorabench.config.loading import is_shipped, load_preset, split_name
from lorabench.errors import UserError
from lorabench.figures.catalog import FIGURES, figures_of_preset, save_figure
from lorabench.models.counts import counts_table
from lorabench.planning.plan import Plan, make_plan
from lorabench.report.judged import write_claims, write_verdicts_by_margin
from lorabench.report.page import build
from lorabench.store.collect import collect, collect_evals, sweep_table
from lorabench.store.io import table_path, write_csv, write_frame, write_table
from lorabench.store.layout import Layout
from lorabench.store.made_from import SOURCE, named_in
from lorabench.store.run_folder import RunFolder
from lorabench.store.schemas import JOB
from lorabench.store.tables import KEYS
from lorabench.store.waves import finished
from lorabench.utils.files import check_parquet, read_parquet
from lorabench.utils.formats import missing

_KEYS = KEYS | {"claims": ["claim_id"], "verdicts_by_margin": ["claim_id", "factor"]}
_COLLECTED = ("runs", "curves", "test_losses")
_EXCERPT = 60


class Compared(NamedTuple):
    """A file that was compared with what was made again, or the runs: what was seen of it, or how it differs."""

    name: str
    seen: str
    differences: list[str]


Results = Iterator[Compared]


def verify(folder: Path, preset: str | None, say: Callable[[str], None]) -> Results:
    """Make everything again that a folder of results or of tables holds, and compare it with what is there.

    Of a preset's results (`results/<preset>`) that is all from the run folders to the page, or from the tables on if
    there are no run folders; of a folder that has tables alone, its claims and figures. `preset` is the preset by which
    they are made again: without it, that of the folder's name, and for tables alone none. `say` is told of each step.

    Raises:
        UserError: the folder has no tables of runs, or is not that of the preset.
    """
    folder = Path(os.path.abspath(folder))
    with TemporaryDirectory() as made:
        # Paths of the user's data may lead up from the folder that the preset is run in.
        work = Path(made, "a/b/c/d")
        work.mkdir(parents=True)
        if (folder / "tables").is_dir():
            name, seed = split_name(folder.name)
            own = f"{name}.yaml" + ("" if seed is None else f"@{seed}")
            yield from _preset(folder, preset or (folder.name if is_shipped(name) else own), work, say)
        elif table_path(folder, "runs"):
            yield from _tables_alone(folder, preset, work, say)
        else:
            raise UserError(f"folder {folder} has no table runs, from which claims and figures could be made again")


def _preset(folder: Path, source: str, work: Path, say: Callable[[str], None]) -> Results:
    layout, base = Layout.of(source), folder.parents[1]
    plan, tables = make_plan(layout.preset), layout.tables()
    if base / layout.root != folder:
        raise UserError(f"folder {folder} is not {layout.root}, that of preset {source!r}; give its preset by --preset")
    _link(base, layout, work)

    with chdir(work):
        experiments = layout.preset.experiments.trained()
        if (base / layout.runs).is_dir():
            yield _runs(plan, layout, base, say)
            yield from (_compare(base, layout.job(job), ["run_id"]) for job in plan.jobs if layout.job(job).is_file())
            say("collecting the tables again")
            for name in (None, *experiments):
                where, own_jobs = layout.tables(name), plan.jobs_of(name) if name else plan.jobs
                jobs = [layout.job(job) for job in own_jobs]
                # A preset has tables of those experiments that have a figure.
                names = _COLLECTED if (base / where).is_dir() else ()
                yield from _again(base, where, names, collect, jobs, where, plan, layout)
        else:
            yield Compared(str(layout.runs), "it is not there, so all is verified from the collected tables on", [])
            for where in (tables, *map(layout.tables, experiments)):
                yield from (compared for name in _COLLECTED for compared in _taken(base, where, name))
        if evaluations := plan.evaluations():
            scores = [layout.evals(job) for job in evaluations]
            yield from _again(base, tables, ["evals"], collect_evals, scores, tables)
        yield from _taken(base, tables, "compute")
        yield from _again(base, tables, ["counts"], write_frame, counts_table(), "counts", tables)
        say("judging the claims again")
        margins, predictions = layout.preset.margins, layout.preset.predictions or {}
        yield from _again(base, tables, ["claims", "optima"], write_claims, [tables], tables, margins, predictions)
        say("judging them by other margins again")
        yield from _again(base, tables, ["verdicts_by_margin"], write_verdicts_by_margin, tables, margins, predictions)
        say("drawing the figures again")
        where = layout.figures
        for figure in figures_of_preset(layout.preset):
            yield from _again(base, where, [figure.name], save_figure, figure.name, figure.folders(layout), where)
        pages = {layout.report: True} | ({layout.report_without_evaluation: False} if evaluations else {})
        for page, evaluated in pages.items():
            say(f"building {page} again")
            yield from _again(base, page.parent, [page.stem], build, plan, layout, source, page, evaluated)
        for where in (tables, *map(layout.tables, experiments), layout.figures, layout.report.parent):
            made = {path.name for path in where.glob("*.*")}
            for name in sorted({path.name for path in (base / where).glob("*.*")} - made):
                yield Compared(str(where / name), "it is not checked", [])


def _tables_alone(folder: Path, preset: str | None, work: Path, say: Callable[[str], None]) -> Results:
    yield Compared(str(folder), "it has no run folders, so all is verified from the collected tables on", [])
    stated = None if preset is None else load_preset(preset)
    with chdir(work):
        for name in KEYS:
            yield from _taken(folder, Path(), name)
        if table_path(folder, "claims"):
            say("judging the claims again")
            margins, predictions = (None, None) if stated is None else (stated.margins, stated.predictions or {})
            judged = ["claims", "optima"]
            yield from _again(folder, Path(), judged, write_claims, [folder], Path(), margins, predictions)
        say("drawing the figures again")
        for figure in FIGURES.values():
            if (folder / f"{figure.name}.svg").is_file():
                shown = [Path() if figure.table == "claims" else folder]
                yield from _again(folder, Path(), [figure.name], save_figure, figure.name, shown, Path())


def _link(base: Path, layout: Layout, work: Path) -> None:
    """Fill a folder with links to what the steps of a preset read, and with folders for what they write."""
    made = [layout.jobs, layout.tables(), layout.report.parent, layout.figures]
    for path in made:
        (work / path).mkdir(parents=True)
    links = {layout.root / path.name: path for path in (base / layout.root).iterdir()}
    links[layout.root.with_name("doctor")] = base / layout.root.with_name("doctor")
    own_data = [
        Path(spec.path) for spec in layout.preset.sources.values() if isinstance(spec, FileDataset | FileProblems)
    ]
    links |= dict(zip(own_data, own_data, strict=True))
    for path, target in links.items():
        link = Path(os.path.normpath(work / path))
        if not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target.resolve())


def _runs(plan: Plan, layout: Layout, base: Path, say: Callable[[str], None]) -> Compared:
    """Check the run folders, and write the file of each job again; it is taken as it is if a run can't be read."""
    checked, problems = 0, []
    for number, job in enumerate(plan.jobs, 1):
        say(f"checking the runs of job {number} of {len(plan.jobs)}")
        path, rows, own = layout.job(job), [], []
        # A damaged file of a job is named when it is compared.
        with suppress(UserError, OSError):
            shutil.copyfile(base / path, path)
            rows = read_parquet(path, pa.schema([JOB.field("run_id")]))["run_id"].to_pylist()
        for run in (RunFolder(layout.runs, run_id) for run_id in rows):
            try:
                if not run.done():
                    raise UserError(f"run {run.run_id} of {path} is not in {run.final}")
                run.read_nested()
                run.check_files(*([run.weights] if run.weights.exists() else []))
            except UserError as error:
                own.append(str(error))
        checked += len(rows)
        try:
            if not own:
                sweeps = [sweep_table(finished(sweep, layout)[1], sweep) for sweep in job.sweeps]
                write_table(pa.concat_tables(sweeps), path)
        except UserError as error:
            own.append(str(error))
        problems += own
    return Compared(str(layout.runs), f"{checked} run folders are whole", problems)


def _taken(base: Path, where: Path, name: str) -> Results:
    """Take a table as it is: the checksum of its parquet file is checked, and its CSV file made of that again."""
    path, csv = where / f"{name}.parquet", where / f"{name}.csv"
    where.mkdir(exist_ok=True)
    for file in (csv, path):
        if (base / file).is_file():
            shutil.copyfile(base / file, file)
    if not path.is_file():
        return
    try:
        check_parquet(path)
        table = pq.read_table(path)
    except (UserError, pa.ArrowException) as error:
        yield Compared(str(path), "", [str(error)])
        return
    yield Compared(str(path), f"{len(table)} rows are taken as they are", [])
    if csv.is_file():
        write_csv(table.to_pandas(ignore_metadata=True), csv)
        yield _compare(base, csv, _KEYS.get(name, ()))


def _again(base: Path, where: Path, names: Sequence[str], step: Callable[..., object], *arguments: object) -> Results:
    """Make files of some names in a folder again by a step, and compare them; if it fails, take tables as they are."""
    try:
        step(*arguments)
    except (UserError, OSError) as error:
        yield Compared(str(where), "", [f"{' and '.join(names)} can't be made again: {error}"])
        for name in names:
            yield from _taken(base, where, name)
        return
    for path in (path for name in names for path in sorted(where.glob(f"{name}.*"), reverse=True)):
        if path.suffix != ".png":
            yield _compare(base, path, _KEYS.get(path.stem, ()) if step is not save_figure else ())


def _compare(base: Path, again: Path, key: Sequence[str]) -> Compared:
    """Compare the file in `base` with the one that was made again, and take it over in its place if they are equal."""
    there, seen = base / again, ""
    if not there.is_file():
        return Compared(str(again), seen, ["it is missing"])
    origin: list[str] = []
    differences: list[str] = []
    try:
        if again.suffix == ".html":
            parts = [_Page(path).parts for path in (there, again)]
            seen, differences = f"{len(parts[0])} tags and texts agree", _different_texts(*parts)
        elif again.suffix == ".svg":
            one, other = (SOURCE.sub("", path.read_text(encoding="utf-8")) for path in (there, again))
            seen = "the picture agrees"
            if one != other:
                differences = [f"it is not the picture that Matplotlib {version('matplotlib')} draws of its tables"]
        else:
            rows = _rows(there)
            seen = f"{len(rows)} rows agree"
            if not filecmp.cmp(there, again, shallow=False):
                differences = _different_cells(rows, _rows(again), key)
        # What an older version has made does not say what it was made from.
        if again.suffix in (".parquet", ".svg") and (named := named_in(there)) and named != named_in(again):
            origin = [f"it was made from {named[:12]}, recomputed {(named_in(again) or 'nothing')[:12]}"]
        if again.suffix == ".parquet":
            check_parquet(there)
    except UserError as error:
        differences.append(str(error))
    except (pa.ArrowException, ValueError, OSError) as error:
        differences.append(f"it can't be read: {error}")
    if not differences:
        shutil.copyfile(there, again)
    return Compared(str(again), seen, origin + differences)


def _rows(path: Path) -> pa.Table:
    """Return a table with its values as they stand in the file: those of CSV as text."""
    if path.suffix == ".parquet":
        return pq.read_table(path)
    return pa.Table.from_pandas(pd.read_csv(path, dtype=str, keep_default_na=False), preserve_index=False)


def _different_cells(there: pa.Table, again: pa.Table, key: Sequence[str]) -> list[str]:
    """Return sentences on the columns, rows and values of a table that differ from those made again."""
    names = [name for name in again.column_names if name in there.column_names]
    differences = [f"column {name} is missing" for name in again.column_names if name not in names]
    differences += [f"column {name} is not made again" for name in there.column_names if name not in names]
    where, made = (_numbered(table, [name for name in key if name in names]) for table in (there, again))
    differences += [f"{row} is missing" for row in made if row not in where]
    differences += [f"{row} is not made again" for row in where if row not in made]
    shared = [row for row in made if row in where]
    for name in names:
        columns = there[name].take([where[row] for row in shared]), again[name].take([made[row] for row in shared])
        if columns[0].equals(columns[1]):
            continue
        cells = zip(shared, *(column.to_pylist() for column in columns), strict=True)
        unequal = [(row, *_excerpts(a, b)) for row, a, b in cells if not _same(a, b)]
        if len(unequal) == len(shared) > 1 and len({cell[1:] for cell in unequal}) == 1:
            unequal = [("every row", *unequal[0][1:])]
        differences += [f"{row}: {name} is {a}, recomputed {b}" for row, a, b in unequal]
    return differences


def _numbered(table: pa.Table, key: Sequence[str]) -> dict[str, int]:
    """Return the number of each row of a table by its values of the key, or from 1 without a key."""
    if not key:
        return {f"row {number + 1}": number for number in range(len(table))}
    rows: dict[str, int] = {}
    for number, values in enumerate(zip(*(table[name].to_pylist() for name in key), strict=True)):
        # A whole number is one, too, where a table was written again with a column of them as decimal numbers.
        texts = [str(value).removesuffix(".0") for value in values]
        row = ", ".join(f"{name} {text}" for name, text in zip(key, texts, strict=True))
        while row in rows:
            row += " (again)"
        rows[row] = number
    return rows


def _same(there: Any, again: Any) -> bool:
    """Return whether two values are equal, also as text and number, or are both missing."""
    if there == again or (missing(there) and missing(again)):
        return True
    try:
        return float(there) == float(again)
    except (TypeError, ValueError):
        return False


def _excerpts(there: Any, again: Any) -> tuple[str, str]:
    """Return two values that differ as text; of long ones what is around the first difference."""
    one, other = str(there), str(again)
    if max(len(one), len(other)) > 2 * _EXCERPT:
        first = next(
            (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
        )
        start = max(first - _EXCERPT, 0)
        one, other = (f"…{text[start : first + _EXCERPT]}…" for text in (one, other))
    return one, other


class _Page(HTMLParser):
    """The texts and tags of a page, and the values of these, each with the last id before it.

    The checks of the machine are left out, since they may have been made later.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.parts: list[tuple[str, str]] = []
        self._id = "top"
        text = path.read_text(encoding="utf-8")
        self.feed(re.sub(r'<section aria-labelledby="machine">.*?</section>', "", text, flags=re.DOTALL))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag and its values; of embedded files their hash."""
        values = {name: value or "" for name, value in attrs}
        self._id = values.get("id", self._id)
        self.parts.append((self._id, f"<{tag}>"))
        for name, value in values.items():
            if value.startswith("data:"):
                name += f" of {values.get('download', 'the picture')}"
                value = f"a file with SHA-256 {hashlib.sha256(value.encode()).hexdigest()[:12]}"
            self.parts.append((f"{self._id}, {name}", value))

    def handle_data(self, data: str) -> None:
        """Note a text."""
        if text := " ".join(data.split()):
            self.parts.append((self._id, text))


def _different_texts(there: list[tuple[str, str]], again: list[tuple[str, str]]) -> list[str]:
    """Return sentences on the tags and texts of a page that differ, each with the id before it."""
    pairs = [pair for pair in zip(there, again, strict=False) if pair[0] != pair[1]]
    if len(there) != len(again):
        pairs = pairs[:1]
    differences = []
    for (place, text), (_, other) in pairs:
        one, another = _excerpts(text, other)
        differences.append(f"at #{place}: {one!r}, recomputed {another!r}")
    if len(there) != len(again):
        differences.append(f"from there on it has {len(there)} tags and texts, recomputed {len(again)}")
    return differences

"""Frozen rules: what is fixed before runs on held-out seeds, and whether those runs kept to it.

`freeze` writes down the rules, the seeds, the data and the verdicts that are expected of a preset, in a file that is
committed before the runs. `check_kept` refuses runs that were made before, with changed code, or by other rules than
the frozen ones. `came_out_again` sets the expected verdicts beside those of the runs.

Each batch of seeds of a design is frozen in a file of its own before it is run, and `batches_of` says which batches of
runs count as registered by these files.
"""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from pydantic import Field, ValidationError

from lorabench.analysis.rules import DECIDED
from lorabench.claims.batches import SEEDS, Batch, Status
from lorabench.claims.rules_hash import rules_sha256
from lorabench.config.fields import Strict
from lorabench.config.inputs import FactsDataset, GeneratedSplits
from lorabench.config.loading import split_name
from lorabench.config.preset import Preset
from lorabench.data.identity import dataset_id
from lorabench.errors import UserError
from lorabench.planning.plan import make_plan
from lorabench.runs import PROTOCOL_VERSION, next_runs, validation_loss
from lorabench.store.io import read_claims, table_path
from lorabench.store.layout import Layout
from lorabench.utils import formats
from lorabench.utils.files import atomic_path, digest
from lorabench.utils.yaml_files import read_yaml


class FrozenData(Strict):
    """A dataset or problem set of the runs: the hash of its examples, and whether those of its test are other ones."""

    id: str
    test: str


class Expected(Strict):
    """What is expected of a claim: its verdict on the explored runs, by the frozen rules."""

    verdict: str
    p_again: float | None
    """The probability that a run on other seeds and other test examples decides the same; null if it was not known."""
    power: float | None
    """The share of simulated sweeps of this design with the right verdict, at the effect where it is smallest; null if
    it was not computed."""
    estimate: float | None
    ci_low: float | None
    ci_high: float | None


class Frozen(Strict):
    """What was fixed before the runs of a preset, which is named with its first seed, such as `long_runs@100`."""

    preset: str
    date: str
    protocol_version: int
    preset_sha256: str
    rules_sha256: str
    by: str = ""
    """Who froze it, by the name that git knows; empty in older files."""
    seeds: list[int]
    data: dict[str, FrozenData]
    expected: dict[str, Expected]
    """By claim; claims that the explored runs are not about, derivations and counts are left out. Empty where nothing
    was explored."""
    notes: list[str] = Field(default_factory=list)
    """Remarks of a person."""


FROZEN = Path("workflow/frozen")
"""The folder of the files, from the root of the repository or from a folder of one's own."""


def frozen_path(preset: str) -> Path:
    """Return the file of what is fixed of a preset with its first seed; that of the first batch has the bare name."""
    name, first_seed = Layout.of(preset).name, split_name(preset)[1]
    return FROZEN / f"{split_name(name)[0] if first_seed == SEEDS else name}.yaml"


# Fields that presets did not have when the first were frozen, with what they are where they are not set.
_ADDED = (
    ("execution", "gpu_time", 1.0),
    ("execution", "fused_kernels", True),
    ("experiments", "variants", None),
    ("experiments", "variants_rl", None),
)


def preset_sha256(preset: Preset) -> str:
    """Return the SHA-256, in hexadecimal, of all fields of a preset."""
    # Presets keep the hashes that they had before there were editions.
    stated = preset.model_dump(
        mode="json",
        exclude={
            "datasets": {
                name: {"edition"} for name, spec in preset.datasets.items() if getattr(spec, "edition", 1) == 1
            }
        },
    )
    for part, name, default in _ADDED:
        if stated[part][name] == default:
            del stated[part][name]
    lists = (blocks for blocks in stated["experiments"].values() if isinstance(blocks, list))
    for block in (block for blocks in lists for block in blocks if block["variants"] == ["lora"]):
        del block["variants"]
    return digest(stated, 64)


def freeze(
    preset: str, claims: pd.DataFrame | None, power: pd.DataFrame | None = None, earlier: Frozen | None = None
) -> Frozen:
    """Return what is fixed of a preset, named with a first seed above those that were explored.

    `claims` is the table of the explored runs, judged by the rules of today (else UserError), or None if the preset
    never ran; `power` is that of `python -m benchmarks.calibration --preset`, or None. What is expected of a further
    batch is what was expected of an `earlier` one.

    Raises:
        UserError: the first seed is 0; the batch before was neither frozen nor run; or the batch has too many seeds.
    """
    stated = Layout.of(preset).preset
    if not stated.first_seed:
        raise UserError(f"preset {preset!r} has the first seed 0, which was explored; give another, such as 100")
    seeds = sorted({row["seed"] for row in make_plan(stated).rows()})
    if seeds[-1] // SEEDS > stated.first_seed // SEEDS:
        raise UserError(f"preset {preset!r} has the seeds up to {seeds[-1]}; a batch has at most {SEEDS} seeds")
    number, name = stated.first_seed // SEEDS, split_name(preset)[0]
    if number > 1 and not _is_used(before := f"{name}@{(number - 1) * SEEDS}"):
        raise UserError(f"batch {number} of {name} waits for batch {number - 1}: freeze {before} first")
    rules = rules_sha256(stated.margins, stated.predictions or {})
    explored = pd.DataFrame(columns=["claim_id", "verdict", "kind", "rules"]) if claims is None else claims
    if judged_by := _other_rules(explored, rules):
        again = f"and the rules of today are {rules[:12]}: judge them again with `lorabench claims`"
        raise UserError(f"the explored claims were judged by {judged_by} {again}")
    powers: dict[Any, float] = {}
    if power is not None:
        powers = power.filter(like="power_at_").min(axis="columns").groupby(power["claim_id"]).min().to_dict()
    expected = {}
    # Runs cannot refute a derivation or a count, so it tells nothing when they come out again.
    testable = explored["verdict"].ne("not tested") & ~explored["kind"].isin(["derivation", "count"])
    for claim in explored[testable].to_dict("records"):
        numbers = {name: _number(claim.get(name)) for name in ("p_again", "estimate", "ci_low", "ci_high")}
        share = _number(powers.get(claim["claim_id"]))
        expected[claim["claim_id"]] = Expected(verdict=claim["verdict"], power=share, **numbers)
    data = {}
    for name, spec in stated.sources.items():
        test = "other examples than the explored"
        if earlier is not None and name in earlier.data:
            test = earlier.data[name].test
        elif claims is None:
            test = "no examples were explored"
        elif not (isinstance(spec, FactsDataset) or (isinstance(spec, GeneratedSplits) and spec.test_seed is not None)):
            test = "the explored examples"
        data[name] = FrozenData(id=dataset_id(spec), test=test)
    notes = [] if earlier is None else [f"What is expected is what was expected of {earlier.preset}."]
    if earlier is not None:
        expected = earlier.expected
    return Frozen(
        preset=preset,
        date=datetime.now(UTC).date().isoformat(),
        protocol_version=PROTOCOL_VERSION,
        preset_sha256=preset_sha256(stated),
        rules_sha256=rules,
        by=(_git(Path(), "config", "user.name") or "").strip(),
        seeds=seeds,
        data=data,
        expected=expected,
        notes=notes,
    )


def _other_rules(claims: pd.DataFrame, rules: str) -> str:
    """Return the rules that claims were judged by other than some, as text; empty if there are none."""
    others = set(claims["rules"]) - {rules}
    return ", ".join("unknown rules" if formats.missing(name) else name[:12] for name in others)


def _number(value: Any) -> float | None:
    return None if formats.missing(value) else float(f"{float(value):.6g}")


def write_frozen(frozen: Frozen, path: Path) -> None:
    """Write what was fixed as YAML, whole or not at all."""
    about = "# What was fixed before the runs on held-out seeds; `lorabench freeze` wrote it. Commit it before them."
    stated = yaml.safe_dump(frozen.model_dump(), sort_keys=False, default_flow_style=None, width=120)
    with atomic_path(path) as partial:
        partial.write_text(f"{about}\n{stated}", encoding="utf-8")


def read_frozen(path: Path) -> Frozen:
    """Read what was fixed before the runs; UserError if `lorabench freeze` wrote no such file."""
    if not path.is_file():
        raise UserError(f"frozen rules {str(path)!r}: there is no such file; `lorabench freeze` writes it")
    try:
        return Frozen.model_validate(read_yaml(path))
    except ValidationError as error:
        raise UserError(f"{path} is not as `lorabench freeze` writes it: {error.errors()[0]}") from error


def _is_used(preset: str) -> bool:
    """Return whether a batch was frozen or run."""
    return frozen_path(preset).is_file() or Layout.of(preset).root.is_dir()


def is_registered(preset: str) -> bool:
    """Return whether a preset with its first seed was frozen with its data as it is, by the rules of today."""
    path, stated = frozen_path(preset), Layout.of(preset).preset
    if not path.is_file():
        return False
    frozen = read_frozen(path)
    fixed = frozen.protocol_version, frozen.preset_sha256, frozen.rules_sha256
    today = PROTOCOL_VERSION, preset_sha256(stated), rules_sha256(stated.margins, stated.predictions or {})
    data = {name: about.id for name, about in frozen.data.items()}
    return fixed == today and data == {name: dataset_id(spec) for name, spec in stated.sources.items()}


def registered(name: str, n: int) -> list[str]:
    """Return the first batches of a preset that are registered, or that are to be, each with its first seed."""
    batches: list[str] = []
    number = 1
    while len(batches) < n:
        batch = f"{name}@{number * SEEDS}"
        # Batches that were run unregistered, or by other rules, are left out, as long as none counts.
        if batches or is_registered(batch) or not _is_used(batch):
            batches.append(batch)
        number += 1
    return batches


def register(name: str, batch: str) -> Path | None:
    """Freeze a batch of a preset before its runs if it is not registered; return the file that is new, if any.

    What is expected of it is what was expected of the batch before, or else the verdicts of the explored runs here by
    the rules of today. UserError says that the batch was run or frozen by other rules.
    """
    if is_registered(batch):
        return None
    if _is_used(batch):
        raise UserError(f"{batch} was run before it was registered, or registered by other rules or for another design")
    explored, stated = Layout.of(name), Layout.of(batch).preset
    number, claims = _batch_number(batch), None
    before = f"{name}@{(number - 1) * SEEDS}"
    earlier = read_frozen(frozen_path(before)) if number > 1 and is_registered(before) else None
    if any(table_path(folder, "claims") for folder in (explored.tables(), explored.published)):
        claims = pd.DataFrame(columns=["claim_id", "verdict", "kind", "rules"])
        if table_path(explored.tables(), "claims"):
            judged = read_claims(explored.tables())
            by_today = not _other_rules(judged, rules_sha256(stated.margins, stated.predictions or {}))
            claims = judged if by_today else claims
    path = frozen_path(batch)
    write_frozen(freeze(batch, claims, earlier=earlier), path)
    return path


def _batch_number(preset: str) -> int:
    return (split_name(preset)[1] or 0) // SEEDS


def batches_of(name: str, runs: pd.DataFrame) -> list[Batch]:
    """Return the batches of a preset that have runs in a table, or were frozen or run here, in ascending order."""
    batches: list[Batch] = []
    counted, number_of = 0, runs["seed"].astype(int) // SEEDS
    numbers = {*number_of, *([0] if Layout.of(name).tables().is_dir() else [])}
    numbers |= set(takewhile(lambda number: _is_used(f"{name}@{number * SEEDS}"), count(1)))
    for number in sorted(numbers):
        preset, own = f"{name}@{number * SEEDS}", runs[number_of == number]
        path, about = frozen_path(preset), ""
        status: Status = "unregistered"
        if not number:
            status, about = "explored", "explored"
        elif not path.is_file():
            about = "unregistered"
        elif not is_registered(preset):
            status, about = "explored", f"registered by other rules or for another design in {path}"
        elif own.empty:
            status, about = "waiting", "without runs"
        elif "started" in own and (own["started"].dropna().str[:10] < read_frozen(path).date).any():
            about = "run before it was registered"
        elif number > (due := counted + 1 if counted else _batch_number(registered(name, 1)[0])):
            status, about = "waiting", f"waits for batch {due}"
        else:
            counted, frozen = number, read_frozen(path)
            status, about = "registered", f"registered on {frozen.date}" + f" by {frozen.by}" * bool(frozen.by)
        batches.append(Batch(number, status, about))
    return batches


def check_kept(frozen: Frozen, path: Path, layout: Layout, runs: pd.DataFrame, claims: pd.DataFrame) -> str:
    """Check that the tables `runs` and `claims` kept to what was frozen in a file; return the commit of this file.

    The file is in a git repository that has the commits of the runs. UserError says that it is not committed; a run was
    made before its commit, with changed code or another seed, or is missing; or preset, rules or data are others.
    """
    if frozen.protocol_version != PROTOCOL_VERSION:
        raise UserError(f"{path} is of protocol version {frozen.protocol_version} and the runs of {PROTOCOL_VERSION}")
    if preset_sha256(layout.preset) != frozen.preset_sha256:
        raise UserError(f"preset {frozen.preset} was changed after it was frozen in {path}")
    ids = {name: dataset_id(spec) for name, spec in layout.preset.sources.items()}
    if changed := [name for name, about in frozen.data.items() if ids.get(name) != about.id]:
        raise UserError(f"the data {', '.join(changed)} were changed after they were frozen in {path}")
    if judged_by := _other_rules(claims, frozen.rules_sha256):
        raise UserError(f"the claims were judged by {judged_by}, and {frozen.rules_sha256[:12]} is frozen in {path}")
    if wrong := sorted(set(runs["seed"]) - set(frozen.seeds)):
        raise UserError(f"runs have the seeds {_some(wrong)}, which are not among those frozen in {path}")
    names = ["final_valid_nll", "final_valid_reward"]
    final = runs.set_index("run_id").reindex(columns=names).astype(object)
    outcomes = final.where(final.notna(), None).to_dict("index")
    others = set(outcomes)
    for sweep in make_plan(layout.preset).sweeps:
        mine = [run for run in set(sweep.possible_runs()) if run.run_id in outcomes]
        losses = {(run.lr, run.seed): validation_loss({"outcome": outcomes[run.run_id]}) for run in mine}
        if missing := next_runs(sweep, losses):
            raise UserError(f"preset {frozen.preset} lacks runs of its plan: {_some([run.run_id for run in missing])}")
        others -= {run.run_id for run in mine}
    if others:
        raise UserError(f"runs are not of the preset {frozen.preset}: {_some(sorted(others))}")
    if dirty := runs.loc[runs["git_dirty_patch"].notna(), "run_id"].tolist():
        raise UserError(f"runs were made with uncommitted changes to the code: {_some(dirty)}")
    # The file must be as it is in the commit that last changed it.
    changes = _git(path.parent, "status", "--porcelain", "--", path.name)
    commit = (_git(path.parent, "log", "-1", "--format=%H", "--", path.name) or "").strip()
    if changes is None or changes.strip() or not commit:
        raise UserError(f"{path} is not committed as it is; it has to be, before the runs")
    for sha in map(str, runs["git_sha"].unique()):
        if _git(path.parent, "merge-base", "--is-ancestor", commit, sha) is None:
            raise UserError(f"runs of the commit {sha[:12]}, which does not contain {path} (commit {commit[:12]})")
    return commit


def _some(values: list[Any]) -> str:
    """Return the first values as text."""
    return ", ".join(map(str, values[:3])) + (f" and {len(values) - 3} more" if len(values) > 3 else "")


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what git prints in a folder; None if it fails."""
    try:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def came_out_again(frozen: Frozen, claims: pd.DataFrame) -> pd.DataFrame:
    """Set the verdicts of the explored runs beside those of the held-out ones, whose table `claims` is given.

    A row per expected claim has `claim_id`, `statement`, the verdicts `explored` and `held_out`, `again` (yes or no,
    null where the explored verdict decides nothing), `p_again`, `power`, the explored `estimate`, `ci_low` and
    `ci_high`, the `held_out_estimate` with `held_out_low` and `held_out_high`, and whether it is `within` the explored
    interval (null without one). Where nothing was explored, the rows are those of the held-out claims.
    """
    judged = {claim["claim_id"]: claim for claim in claims.to_dict("records")}
    unexplored = Expected(verdict="not tested", p_again=None, power=None, estimate=None, ci_low=None, ci_high=None)
    tested = (claim_id for claim_id, claim in judged.items() if claim["verdict"] != "not tested")
    words = {True: "yes", False: "no", None: None}
    rows = []
    for claim_id, expected in (frozen.expected or dict.fromkeys(tested, unexplored)).items():
        held_out = judged.get(claim_id, {"verdict": "not tested"})
        estimate, low, high = (_number(held_out.get(name)) for name in ("estimate", "ci_low", "ci_high"))
        again = held_out["verdict"] == expected.verdict if expected.verdict in DECIDED else None
        within = None
        if expected.ci_low is not None and expected.ci_high is not None and estimate is not None:
            within = expected.ci_low <= estimate <= expected.ci_high
        rows.append(
            {"claim_id": claim_id, "statement": held_out.get("statement"), "explored": expected.verdict}
            | {"held_out": held_out["verdict"], "again": words[again]}
            | expected.model_dump(include={"p_again", "power", "estimate", "ci_low", "ci_high"})
            | {"held_out_estimate": estimate, "held_out_low": low, "held_out_high": high, "within": words[within]}
        )
    return pd.DataFrame(rows)


def summary_of(again: pd.DataFrame) -> str:
    """Return a sentence that counts the verdicts that came out again; `again` is as from `came_out_again`."""
    if again["explored"].eq("not tested").all():
        number = again["held_out"].isin(DECIDED).sum()
        return f"{number} of {len(again)} verdicts are decided, by rules fixed before any run"
    decided, within = again["again"].dropna(), again["within"].dropna()
    return (
        f"{(decided == 'yes').sum()} of {len(decided)} decided verdicts came out again on held-out seeds, and "
        f"{(within == 'yes').sum()} of {len(within)} estimates lie in the earlier 95% interval"
    )

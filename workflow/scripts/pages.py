"""The generated parts of the README and of the pages in `docs/`, written from the committed tables alone.

A part stands between two marker lines that name it; the text around it is written by hand. Everything that is longer
(all claims of all presets, all sources, criteria, columns, optimal learning rates) is made when the documentation is
built, by `docs/hooks.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from answers import QUESTIONS, answer, count_of_core
from lorabench.analysis.finding import BORDERLINE
from lorabench.analysis.rules import DECIDED
from lorabench.claims.judge import CLAIMS, CORE
from lorabench.report import claim_text
from lorabench.report.freeze import summary_of
from lorabench.sources.measurements import MEASURES, PROJECT, holds_again
from lorabench.store.io import read_claims
from lorabench.store.published import (
    HELD_OUT,
    NOT_PUBLISHED,
    PUBLISHED,
    published_folders,
    read_batches,
    read_held_out,
    read_provenance,
)
from lorabench.utils import formats
from lorabench.utils.markdown import table, with_part
from lorabench.utils.yaml_files import read_yaml

SOURCES = Path("paper_figures/reference")
"""The folder of the shipped sources, from the root of the repository."""

_README, _TRAINERS = Path("README.md"), Path("advice/docs/trainers.md")
_RESULTS, _OTHER_RUNS, _RATES = Path("docs/results.md"), Path("docs/other-runs.md"), Path("docs/learning-rate.html")


def make_smaller(picture: Path) -> None:
    """Take from an SVG file what does not change the picture, since the repository keeps every version."""
    # The documentation is built with this module, and without scour.
    from scour import scour

    options = scour.sanitizeOptions()
    options.strip_ids, options.shorten_ids, options.digits = True, True, 5
    options.indent_type, options.newlines, options.strip_comments = "none", False, True
    picture.write_text(scour.scourString(picture.read_text(encoding="utf-8"), options), encoding="utf-8")


def write_pages(root: Path) -> None:
    """Write the generated parts of all pages; if a page has no place for its part (UserError), nothing is changed."""
    for page, text in pages(root).items():
        (root / page).write_text(text, encoding="utf-8")


def check_places(root: Path, *presets: str) -> None:
    """Raise UserError if a page has no place for a part; presets may be named that were not published before."""
    _filled(root, dict.fromkeys(_parts(root, *presets), ""))


def pages(root: Path) -> dict[Path, str]:
    """Return the pages with generated parts, as paths from the root, with the text that they should have."""
    return _filled(root, {place: make(root) for place, make in _parts(root).items()})


def _parts(root: Path, *presets: str) -> dict[tuple[Path, str], Callable[[Path], str]]:
    """Return what makes each part, by its page and name."""
    names = {*presets, *(folder.name for folder in published_folders(root))}
    return {
        (_README, "answers"): answers_part,
        (_TRAINERS, "trainers"): trainers_part,
        (_RESULTS, "matrix"): matrix_part,
        (_OTHER_RUNS, "evidence"): evidence_part,
        (_RATES, "facts"): learning_rate_part,
        **{(_RESULTS, name): partial(results_part, preset=name) for name in sorted(names)},
    }


def _filled(root: Path, parts: Mapping[tuple[Path, str], str]) -> dict[Path, str]:
    """Return the text of each page with the given texts between the markers of its parts."""
    texts: dict[Path, str] = {}
    for (page, name), part in parts.items():
        text = texts.get(page) or ((root / page).read_text(encoding="utf-8") if (root / page).is_file() else "")
        texts[page] = with_part(text, page, name, "`workflow/scripts/`, never by hand", part)
    return texts


def answers_part(root: Path) -> str:
    """Return what was found in plain sentences, with the picture that shows it."""
    folder = root / PUBLISHED / "evidence"
    cells, measured = pd.read_csv(folder / "matrix.csv"), pd.read_csv(folder / "measurements.csv")
    ratios = measured[measured["measure"].eq("lr_ratio") & measured["counts"] & measured["source"].ne(PROJECT)]
    # The ratios lie so far apart that a mean would be none of them.
    of_others = ratios.groupby("source")["value"].mean().map(math.exp)
    more = (
        f" In {len(of_others)} sources of others it is {of_others.min():.2g} to {of_others.max():.2g} times. "
        "[What the ratio depends on](studies/lr_ratio/README.md); `lorabench recommend` estimates a learning rate for "
        "your model."
    )
    lines = [f"{count_of_core(cells)} The questions that matter most in use:", ""]
    lines += [f"- {answer(question, cells)}{more if question.claim_id == 'B1' else ''}" for question in QUESTIONS]
    picture = f"![The answers by the size of the model]({PUBLISHED}/evidence/matrix.svg)"
    return "\n".join([*lines, "", picture, "", reproduced(root)])


def matrix_part(root: Path) -> str:
    """Return the claims of the matrix by the size of the model, as a table whose cells link to the runs."""
    cells = pd.read_csv(root / PUBLISHED / "evidence/matrix.csv")
    texts = []
    for cell in cells.to_dict("records"):
        page = _RESULTS if pd.isna(cell["source"]) else _OTHER_RUNS
        linked = f"[{claim_text.verdict(cell)}]({page.name}#{cell['origin']})"
        again = "" if pd.isna(cell["p_again"]) else f" {cell['p_again']:.0%}"
        marks = []
        # Runs that lack the setting of a claim measure something else, so they have no number.
        if cell["verdict"] not in ("setting not met", "not tested") and not pd.isna(cell["estimate"]):
            several = cell["n_parts"] >= 2
            share = f"{cell['n_hold']:.0f} of {cell['n_parts']:.0f} hold" if several else ""
            ends = [formats.number(cell[name]) for name in ("part_low", "part_high")]
            is_range = several and ends[0] != ends[1] and formats.DASH not in ends
            number = " to ".join(ends) if is_range else formats.number(cell["estimate"])
            seeds = f"{cell['n_seeds']:.0f} seed{'' if cell['n_seeds'] == 1 else 's'}" if cell["n_seeds"] > 0 else ""
            chosen = "‡" if cell["lr_chosen_on"] == "test" and "RL" in str(cell["scope"]) else ""
            marks = [share, number, seeds + chosen]
        if cell["verdict"] in DECIDED and not pd.isna(cell["batches_alike"]):
            marks.append(f"{cell['batches_alike']:.0f} of {cell['batches']:.0f} batches")
        elif cell["verdict"] in DECIDED and not pd.isna(cell["held_out"]):
            again_text = "holds on held-out seeds" if cell["explored"] else "all seeds held out"
            marks.append(again_text if holds_again(cell) else f"{cell['held_out']} on held-out seeds")
        text = "; ".join(filter(None, [f"{linked}{again}", *marks]))
        texts.append(formats.DASH if cell["verdict"] == "not tested" else text)
    scales = cells.sort_values("parameters", kind="stable")["scale"].unique()
    by_scale = cells.assign(text=texts).pivot(index="claim_id", columns="scale", values="text")[scales]
    statements = _as_stated_now(cells.drop_duplicates("claim_id"))[["claim_id", "statement"]]
    rows = statements.join(by_scale, on="claim_id").fillna(formats.DASH).to_numpy()
    return "\n".join(table(["", "claim", *scales], rows))


def reproduced(root: Path) -> str:
    """Return a sentence on how many decided verdicts came out again on held-out seeds, of all presets and of each."""
    tables = {folder.name: again for folder in published_folders(root) if (again := read_held_out(folder)) is not None}
    decided = {name: _as_stated_now(again.dropna(subset="again")) for name, again in tables.items()}
    each = []
    for name, claims in decided.items():
        failed = claims.loc[claims["again"] != "yes", "statement"]
        without = f" (not: {'; '.join(failed.unique())})" if len(failed) else ""
        link = f"[{name}]({_RESULTS}#{name})"
        batches = f" in {claims['batch'].nunique()} batches" if "batch" in claims else ""
        each.append(f"{link} {len(claims) - len(failed)} of {len(claims)}{batches}{without}")
    every = pd.concat([pd.DataFrame(columns=["again", "p_again"]), *decided.values()])
    firm = every[every["p_again"] >= BORDERLINE]
    return (
        f"**Of {len(every)} answers of yes or no, on these and other claims, {every['again'].eq('yes').sum()} came out "
        f"again on held-out seeds** (of {len(firm)} that were not borderline, {firm['again'].eq('yes').sum()}), by the "
        f"rules that were frozen before them: {', '.join(each)}."
    )


def _as_stated_now(claims: pd.DataFrame) -> pd.DataFrame:
    """Return claims in the words that they have now; a published table keeps those of its time."""
    words = {claim.id: claim.statement for claim in CLAIMS}
    return claims.assign(statement=claims["claim_id"].map(words).fillna(claims["statement"]))


def results_part(root: Path, preset: str) -> str:
    """Return what a preset says in short: counts, its core claims, own predictions, and the claims that it decides."""
    folder = root / PUBLISHED / preset
    made, again, together = read_provenance(folder), read_held_out(folder), read_batches(folder)
    place, by_all = f"../{PUBLISHED}/{preset}", ""
    judged, picture = read_claims(folder, without=NOT_PUBLISHED), f"{place}/verdicts.svg"
    if together is not None:
        judged, made, picture = together, read_provenance(folder / HELD_OUT), f"{place}/{HELD_OUT}/verdicts.svg"
        by_all = f", [by all batches]({place}/{HELD_OUT}/claims.csv)"
    judged = _as_stated_now(claim_text.in_order(judged))
    decided = judged["verdict"].isin(DECIDED) & judged["kind"].ne("count")
    always = judged["claim_id"].isin(CORE) | judged["kind"].eq("own prediction")
    rows = []
    for claim in judged[judged["verdict"].ne("not tested") & (decided | always)].to_dict("records"):
        verdict = "; ".join(filter(None, [claim_text.verdict(claim), claim_text.remark(claim)]))
        numbers = [claim_text.margin(claim), claim_text.measured(claim)]
        rows.append([claim["claim_id"], claim["statement"], verdict, *held_out(claim, again), *numbers])
    about = (
        f"{claim_text.headline(judged)}. {made['runs']} runs, {formats.duration(made['run_seconds'])} of one core "
        f"on {' and '.join(made['devices'])}, from {made['first_started'][:10]}. "
        f"[All claims]({place}/claims.csv){by_all}."
    )
    head = ["", "claim", *verdict_columns(made, again), "margin", "measured, 95% interval"]
    return "\n".join(
        [
            f"![Verdicts of the preset {preset}]({picture})",
            "",
            about,
            *held_out_lines(made, again),
            "",
            *table(head, rows),
        ]
    )


def held_out_lines(made: Mapping[str, Any], again: pd.DataFrame | None) -> list[str]:
    """Return lines that say what of a published preset is held out; the arguments are those of `verdict_columns`."""
    if again is not None and "batch" in again:
        about = f"{again['batch'].nunique()} batches of held-out seeds, frozen before their runs, are judged together."
        return ["", f"{about} Alone: {summary_of(again)}."]
    if again is not None:
        return ["", f"{summary_of(again)}."]
    if "frozen_before" in made:
        commit = made["frozen_before"]["commit"][:7]
        return [
            "",
            f"All seeds were held out for earlier rules, frozen in {commit}; verdicts are by the rules of today.",
        ]
    if "frozen" not in made:
        return []
    commit = made["frozen"]["commit"][:7]
    return ["", f"All seeds are held out: margins, rules and data were frozen in {commit}, before any run."]


def verdict_columns(made: Mapping[str, Any], again: pd.DataFrame | None) -> list[str]:
    """Return the names of the columns of verdicts, by a preset's provenance and its table `came_out_again`."""
    if again is not None and "batch" in again:
        return ["all batches", "explored", "alike alone"]
    if again is not None:
        return ["explored", "held out"]
    return ["held out"] if "frozen" in made else ["verdict"]


def held_out(claim: Mapping[Any, Any], again: pd.DataFrame | None) -> list[str]:
    """Return the cell with a claim's verdict on held-out seeds, if the preset was run on them.

    Where it was run on several batches, and `claim` is of all together, return the explored verdict, and of how many
    batches alone the verdict is that of the claim.
    """
    if again is None:
        return []
    own = again[again["claim_id"] == claim["claim_id"]]
    if "batch" not in again:
        return [*own["held_out"], formats.DASH][:1]
    alike = f"{claim['batches_alike']:.0f} of {claim['batches']}"
    return [own["explored"].iloc[0], alike] if len(own) else [formats.DASH] * 2


def evidence_part(root: Path) -> str:
    """Return the numbers that several sources measured, and each source with its doubts and a count of its verdicts."""
    folder = root / PUBLISHED / "evidence"
    summarized, judged = pd.read_csv(folder / "summary.csv"), pd.read_csv(folder / "claims.csv")
    rows = []
    for row in summarized[summarized["attribute"].isna()].to_dict("records"):
        numbers = [row[name] for name in ("mean", "low", "high")]
        is_log = row["measure"] == "lr_ratio"
        mean, low, high = (f"{math.exp(value):.3g}" if is_log else f"{value:+.4f}" for value in numbers)
        rows.append([MEASURES[row["measure"]], row["k"], f"{mean} [{low}, {high}]" if row["k"] > 1 else mean])
    lines = table(["measured", "sources", "mean, 95% interval"], rows)
    for path in sorted((root / SOURCES).glob("*/source.yaml")):
        source, name = read_yaml(path), path.parent.name
        verdicts = judged.loc[judged["source"].eq(name) & judged["verdict"].ne("not tested"), "verdict"]
        counted = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.value_counts().items())
        about = (
            f"{source['about']}. From {source['origin']['repository']}, {source['origin']['date']}. "
            f"Doubts: {'; '.join(source['doubts'])}. Verdicts: {counted or 'none'}."
        )
        lines += ["", f"#### {name}", "", about]
    return "\n".join(lines)


def learning_rate_part(root: Path) -> str:
    """Return what the page of learning rates computes with: all that lora-advice recommends by, as a script of JSON."""
    # The documentation is built with this module, and without lora-advice.
    from lora_advice import models, optima, pooled_lr, recommend, theory

    def rounded(*numbers: float) -> list[float | None]:
        return [None if math.isnan(number) else float(f"{number:.12g}") for number in numbers]

    facts = {
        "law": {"pivot": theory.PIVOT, "exponents": theory.EXPONENTS, "lrs": theory.BASE_LRS},
        "theory": {**theory.MOVEMENT, "alpha": theory.ALPHA},
        "short": {"steps": recommend.SHORT_STEPS, "ratio": theory.SHORT_RATIO},
        "rlBatch": recommend.GROUP_SIZE * recommend.PROBLEMS_PER_STEP,
        "terms": [[pooled_lr.REFERENCE[name], *prior] for name, prior in pooled_lr.PRIORS.items()],
        "offset": pooled_lr.OFFSET,
        "between": rounded(*pooled_lr.BETWEEN),
        "within": rounded(*pooled_lr.WITHIN),
        "probability": optima.PROBABILITY,
        "near": optima.NEAR,
        "project": optima.PROJECT,
        "size": models.SIZE.pattern.replace("?P<", "?<"),
        "sizeFactor": models.SIZE_FACTOR,
        # An optimum as `PooledLr` takes it: its place, how far it is above the law, and the variance of that.
        "optima": [
            [
                *(each.source, each.model, each.method, each.rl, *rounded(each.width, each.batch_size, each.steps)),
                *rounded(own.log_lr - own.place.log_law, own.error**2 + own.place.unknown_variance),
            ]
            for each in optima.read_optima(root / PUBLISHED / "evidence/lr_optima.csv")
            if each.counts
            for own in [each.pooled]
        ],
        # Of LoRA's parameters those that grow with the rank, and those that grow with the rank per active expert.
        "models": [
            [
                *(model.name, pattern and pattern.pattern, names, model.family, model.width, model.parameters),
                *(two - one, 2 * one - two, model.active_experts or 0),
            ]
            for pattern, model, names in [
                *((None, models.find_model(name), base["names"]) for name, base in models.shipped_bases().items()),
                *((pattern, model, []) for pattern, model in models.public_models()),
            ]
            for one, two in [[models.lora_parameters(model, rank) for rank in (1, 2)]]
        ],
    }
    # A row for each line, and no end of the script in a name.
    text = json.dumps(facts).replace("], [", "],\n[").replace("<", "\\u003c")
    return f'<script type="application/json" id="facts">\n{text}\n</script>'


def trainers_part(_: Path) -> str:
    """Return what each trainer takes for LoRA where a configuration says nothing, as the audit's readers know it."""
    # The documentation is built with this module, and without lora-advice.
    from lora_advice.audit.files import READERS
    from lora_advice.audit.readers.options import frameworks
    from lora_advice.audit.settings import ALPHA_EXPONENTS
    from lora_advice.theory import ALPHA, MOVEMENT

    rows = []
    for asked in read_yaml(Path(__file__).with_name("trainers.yaml")):
        if asked["reader"] not in READERS:
            continue
        framework = frameworks()[asked["reader"]]
        [run] = READERS[asked["reader"]](Path(asked["file"]), asked["says"])
        known = {name: getattr(run, name) for name in ("lr", "rank", "alpha") if name not in asked.get("unset", ())}
        known |= {name: value for name, value in asked.get("without", {}).items() if known.get(name) is None}
        lr, rank, alpha = known["lr"], known["rank"], known["alpha"]
        factor = at_32 = formats.DASH
        if not {str, type(None)} & {type(rank), type(alpha)}:
            factor = f"{alpha / rank:g}"
            if isinstance(lr, float):
                at_32 = f"{lr * (alpha * (1 + MOVEMENT['k'] / rank) / ALPHA) ** ALPHA_EXPONENTS[1]:.1e}"
        names = framework.get("names", {}) | framework.get("lora_names", {})
        option = f"`{names['rslora']}`" if "rslora" in names else "none"
        numbers = [value if isinstance(value, str) else f"{value:g}" for value in (lr, rank, alpha)]
        rows.append([asked["name"], framework["version"], *numbers, factor, at_32, option])
    head = ["trainer", "version", "LR", "rank r", "alpha", "alpha/r", "LR as at alpha 32", "option for alpha/sqrt(r)"]
    return "\n".join(table(head, rows))

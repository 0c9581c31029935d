"""The command `check`: what an adapter's files say, and whether merging and serving keep what it computes."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from lora_advice import formats
from lora_advice.errors import UserError

if TYPE_CHECKING:
    from lora_advice.check.adapter import Adapter
    from lora_advice.check.merging import Difference, Merging
    from lora_advice.check.served import ServedModels


def check(
    adapter: Annotated[Path, Argument(metavar="ADAPTER", help="The folder of an adapter that PEFT has saved.")],
    model: Annotated[
        str | None, Option(help="The folder or hub id of its base model: to compare base, adapter and merged.")
    ] = None,
    text: Annotated[Path | None, Option(help="A text to compare on, in place of a shipped one.")] = None,
    dtypes: Annotated[str, Option(help="The types to merge in.")] = "fp32,bf16,fp16",
    merged: Annotated[Path | None, Option(help="The folder of a model that was merged elsewhere.")] = None,
    served: Annotated[str | None, Option(metavar="URL", help="An OpenAI-compatible server to compare with.")] = None,
    served_model: Annotated[str | None, Option(help="The server's model; by default each that it names.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what an adapter's files say, and whether merging and serving keep what it computes.

    Exits with status 1 if something is found that is an error.
    """
    from lora_advice.check.adapter import read_adapter

    if model is None and (served is not None or merged is not None):
        raise UserError(f"{'--served' if served else '--merged'} needs --model, the model the adapter was trained on")
    described = read_adapter(adapter)
    shown: Adapter | Merging | ServedModels = described
    # What the files say is said first, since it takes no weights; with broken ones nothing can be computed.
    findings = list(described.findings)
    if model is None or any(finding.code in ("not-finite", "shape") for finding in findings):
        table = _adapter_table(described)
    else:
        from lora_advice.check.probe import probe
        from lora_advice.user_model import find_model

        computed = probe(find_model(model), adapter, text)
        if served is not None:
            from lora_advice.check.served import check_served

            shown = answers = check_served(computed, served, served_model)
            table = _served_table(answers)
        else:
            from lora_advice.check.merging import check_merging

            chosen = [dtype.strip() for dtype in dtypes.split(",") if dtype.strip()]
            shown = merging = check_merging(computed, chosen, merged)
            table = _merging_table(merging)
        findings += shown.findings
    if as_json:
        print(json.dumps(asdict(shown) | {"findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        title, columns, rows, notes = table
        formats.print_table(columns, rows, columns[2:], title, notes)
        for finding in findings:
            print(f"{finding.level} {finding.code}: {finding.message}")
        if not findings:
            print("nothing was found that is wrong")
    errors = sum(finding.level == "error" for finding in findings)
    if errors:
        print(f"{errors} of {len(findings)} findings are errors", file=sys.stderr)
        raise typer.Exit(1)


_Table = tuple[str, tuple[str, ...], list[tuple[str, ...]], list[str]]
"""A title, columns, rows and sentences."""


def _adapter_table(adapter: Adapter) -> _Table:
    from lora_advice.check.adapter import plain

    by_kind = defaultdict(list)
    for module in adapter.modules:
        by_kind[plain(module.module).rpartition(".")[2]].append(module)
    rows = []
    for kind, modules in sorted(by_kind.items()):
        initial = [module.a_scale for module in modules if module.a_scale is not None]
        names = ("rank", "effective_rank", "first_share", "b_norm", "norm")
        medians = [median(getattr(module, name) for module in modules) for name in names]
        cells = map(formats.number, [*medians, median(initial) if initial else None])
        rows.append((kind, str(len(modules)), *cells))
    title = f"{adapter.folder}: {'rsLoRA' if adapter.rslora else 'DoRA' if adapter.dora else 'LoRA'} of "
    title += f"{adapter.base_model}, rank {adapter.rank}, alpha {adapter.alpha:g}, scale {adapter.scale:g}, "
    title += f"{len(adapter.modules)} modules with {adapter.parameters:,} parameters in {', '.join(adapter.dtypes)}"
    columns = ("modules", "number", "rank", "effective rank", "first direction", "norm of B", "norm of the update", "A")
    return title, columns, rows, ["medians; the update is scale B A, and A is its size over PEFT's initialization"]


def _merging_table(merging: Merging) -> _Table:
    rows = [
        ("base", "fp32", _nll(merging.base_nll), *_differences(None), ""),
        ("adapter", "fp32", _nll(merging.adapter_nll), *_differences(merging.effect), "the base"),
    ]
    for row in merging.merged:
        rows.append((row.name, row.dtype, _nll(row.nll), *_differences(row.difference), "the adapter"))
        if row.dtype != "fp32":
            rows.append(("adapter", row.dtype, _nll(None), *_differences(row.rounding), "the adapter in fp32"))
    columns = ("model", "type", "NLL", "largest", "mean", "KL", "difference from")
    title = f"{merging.adapter} on {merging.model}: logits on a text of {merging.tokens} tokens"
    return title, columns, rows, [row.verdict for row in merging.merged]


def _served_table(served: ServedModels) -> _Table:
    rows = [
        (row.name, row.serves, formats.number(row.strength), *map(_nll, (row.nll, row.base_nll, row.adapter_nll)))
        for row in served.models
    ]
    columns = ("model", "serves", "strength", "NLL", "NLL of the base", "NLL of the adapter")
    title = f"{served.url} on a text of {served.tokens} tokens, against {served.adapter}"
    return title, columns, rows, [row.verdict for row in served.models]


def _differences(difference: Difference | None) -> tuple[str, ...]:
    values = (None,) * 3 if difference is None else (difference.largest, difference.mean, difference.kl)
    return tuple(formats.number(value, 2) for value in values)


def _nll(value: float | None) -> str:
    return formats.DASH if value is None else f"{value:.4f}"

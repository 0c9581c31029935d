"""The command `check`: what an adapter's files say, and whether merging and serving keep what it computes."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from lora_advice import formats
from lora_advice.errors import UserError

if TYPE_CHECKING:
    from lora_advice.check.adapter import Adapter, ModuleUpdate
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
    shown: Adapter | Merging | ServedModels = read_adapter(adapter)
    # What the files say is said first, since it takes no weights; with broken ones nothing can be computed.
    findings = list(shown.findings)
    if model is not None and not any(finding.code in ("not-finite", "shape") for finding in findings):
        from lora_advice.check.probe import probe
        from lora_advice.user_model import find_model

        computed = probe(find_model(model), adapter, text)
        if served is not None:
            from lora_advice.check.served import check_served

            shown = check_served(computed, served, served_model)
        else:
            from lora_advice.check.merging import check_merging

            shown = check_merging(computed, [dtype.strip() for dtype in dtypes.split(",") if dtype.strip()], merged)
        findings += shown.findings
    if as_json:
        print(json.dumps(asdict(shown) | {"findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print(shown)
        for finding in findings:
            print(f"{finding.level} {finding.code}: {finding.message}")
        if not findings:
            print("nothing was found that is wrong")
    errors = sum(finding.level == "error" for finding in findings)
    if errors:
        print(f"{errors} of {len(findings)} findings are errors", file=sys.stderr)
        raise typer.Exit(1)


def _print(shown: Adapter | Merging | ServedModels) -> None:
    if hasattr(shown, "modules"):
        _print_adapter(shown)
    elif hasattr(shown, "merged"):
        _print_merging(shown)
    else:
        rows = [
            (row.name, row.serves, formats.number(row.strength), *map(_nll, (row.nll, row.base_nll, row.adapter_nll)))
            for row in shown.models
        ]
        columns = ("model", "serves", "strength", "NLL", "NLL of the base", "NLL of the adapter")
        title = f"{shown.url} on a text of {shown.tokens} tokens, against {shown.adapter}"
        formats.print_table(columns, rows, columns[2:], title, [row.verdict for row in shown.models])


def _print_adapter(adapter: Adapter) -> None:
    kind = "rsLoRA" if adapter.rslora else "DoRA" if adapter.dora else "LoRA"
    types = ", ".join(f"{count} tensors in {dtype}" for dtype, count in sorted(adapter.dtypes.items()))
    print(f"{adapter.folder}: {kind} of {adapter.base_model}")
    print(f"rank {adapter.rank}, alpha {adapter.alpha:g}, scale {adapter.scale:g}")
    print(f"{len(adapter.modules)} modules with {adapter.parameters:,} parameters, {types}")
    by_kind: dict[str, list[ModuleUpdate]] = defaultdict(list)
    for module in adapter.modules:
        by_kind[module.kind].append(module)
    columns = ("modules", "number", "rank", "effective rank", "first direction", "norm of B", "norm of the update", "A")
    rows = [(kind, str(len(modules)), *_medians(modules)) for kind, modules in sorted(by_kind.items())]
    notes = ["medians; the update is scale B A, and A is its size over that of PEFT's initialization"]
    formats.print_table(columns, rows, columns[1:], notes=notes)


def _medians(modules: Sequence[ModuleUpdate]) -> tuple[str, ...]:
    """Return the medians over some modules, as the columns of a row."""
    initial = [module.a_scale for module in modules if module.a_scale is not None]
    return (
        formats.number(median(module.rank for module in modules)),
        formats.number(median(module.effective_rank for module in modules)),
        f"{median(module.first_share for module in modules):.0%}",
        formats.number(median(module.b_norm for module in modules)),
        formats.number(median(module.norm for module in modules)),
        formats.number(median(initial) if initial else None),
    )


def _print_merging(merging: Merging) -> None:
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
    formats.print_table(columns, rows, columns[2:6], title, [row.verdict for row in merging.merged])


def _differences(difference: Difference | None) -> tuple[str, ...]:
    values = (None,) * 3 if difference is None else (difference.largest, difference.mean, difference.kl)
    return tuple(formats.number(value, 2) for value in values)


def _nll(value: float | None) -> str:
    return formats.DASH if value is None else f"{value:.4f}"

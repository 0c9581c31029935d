"""The command `check`: what an adapter's files say, and whether merging keeps what it computes."""

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


def check(
    adapter: Annotated[Path, Argument(metavar="ADAPTER", help="The folder of an adapter that PEFT has saved.")],
    model: Annotated[
        str | None, Option(help="The folder or hub id of its base model: to compare base, adapter and merged.")
    ] = None,
    text: Annotated[Path | None, Option(help="A text to compare on, in place of a shipped one.")] = None,
    dtypes: Annotated[str, Option(help="The types to merge in.")] = "fp32,bf16,fp16",
    merged: Annotated[Path | None, Option(help="The folder of a model that was merged elsewhere.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what an adapter's files say, and whether merging keeps what it computes.

    Exits with status 1 if something is found that is an error.
    """
    from lora_advice.check.adapter import Adapter, read_adapter

    if model is None and merged is not None:
        raise UserError("--merged needs --model, the model the adapter was trained on")
    described = read_adapter(adapter)
    shown: Adapter | Merging = described
    # What the files say is said first, since it takes no weights; with broken ones nothing can be computed.
    findings = list(described.findings)
    if model is not None and not any(finding.code in ("not-finite", "shape") for finding in findings):
        from lora_advice.check.merging import check_merging, probe
        from lora_advice.user_model import find_model

        chosen = [dtype.strip() for dtype in dtypes.split(",") if dtype.strip()]
        shown = check_merging(probe(find_model(model), adapter, text), chosen, merged)
        findings += shown.findings
    if as_json:
        print(json.dumps(asdict(shown) | {"findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        if isinstance(shown, Adapter):
            _print_adapter(shown)
        else:
            _print_merging(shown)
        for finding in findings:
            print(f"{finding.level} {finding.code}: {finding.message}")
        if not findings:
            print("nothing was found that is wrong")
    errors = sum(finding.level == "error" for finding in findings)
    if errors:
        print(f"{errors} of {len(findings)} findings are errors", file=sys.stderr)
        raise typer.Exit(1)


def _print_adapter(adapter: Adapter) -> None:
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
    note = "medians; the update is scale B A, and A is its size over PEFT's initialization"
    formats.print_table(columns, rows, columns[2:], title, [note])


def _print_merging(merging: Merging) -> None:
    def row(name: str, dtype: str, nll: float | None, difference: Difference | None, other: str) -> tuple[str, ...]:
        values = (None,) * 3 if difference is None else (difference.largest, difference.mean, difference.kl)
        shown = formats.DASH if nll is None else f"{nll:.4f}"
        return name, dtype, shown, *(formats.number(value, 2) for value in values), other

    rows = [row("base", "fp32", merging.base_nll, None, "")]
    rows.append(row("adapter", "fp32", merging.adapter_nll, merging.effect, "the base"))
    for merged in merging.merged:
        rows.append(row(merged.name, merged.dtype, merged.nll, merged.difference, "the adapter"))
        if merged.dtype != "fp32":
            rows.append(row("adapter", merged.dtype, None, merged.rounding, "the adapter in fp32"))
    columns = ("model", "type", "NLL", "largest", "mean", "KL", "difference from")
    title = f"{merging.adapter} on {merging.model}: logits on a text of {merging.tokens} tokens"
    formats.print_table(columns, rows, columns[2:], title, [merged.verdict for merged in merging.merged])

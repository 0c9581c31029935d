"""The command `lorabench check`, and how it prints what was found."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from typer import Argument, Option

from lorabench.errors import UserError
from lorabench.utils import formats

if TYPE_CHECKING:
    from lorabench.audit.finding import Finding
    from lorabench.check.adapter import Adapter, ModuleUpdate
    from lorabench.check.merging import Difference, Merging
    from lorabench.check.placement import Coverage
    from lorabench.check.served import ServedModels

_SHOWN = 3


def check(
    model: Annotated[
        str | None,
        Argument(metavar="MODEL", help="A folder, a .gguf file, a model's id on the hub, or a shipped base: tiny."),
    ] = None,
    placement: Annotated[str, Option(help="The layers with LoRA: all, attn or mlp.")] = "all",
    rank: Annotated[int, Option(min=1, help="The rank; of a mixture of experts that of the active experts.")] = 32,
    gpu: Annotated[str, Option(help="The GPU to estimate the memory for.")] = "H100-80GB",
    adapter: Annotated[Path | None, Option(help="The folder of an adapter that PEFT has saved.")] = None,
    base: Annotated[
        str | None, Option("--model", help="The adapter's base model, as MODEL: to compare base, adapter and merged.")
    ] = None,
    text: Annotated[Path | None, Option(help="A text to compare on, in place of a shipped one.")] = None,
    dtypes: Annotated[str, Option(help="The types to merge in.")] = "fp32,bf16,fp16",
    merged: Annotated[Path | None, Option(help="The folder of a model that was merged elsewhere.")] = None,
    served: Annotated[str | None, Option(metavar="URL", help="An OpenAI-compatible server to compare with.")] = None,
    served_model: Annotated[str | None, Option(help="The server's model; by default each that it names.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what LoRA trains of a model, what an adapter's files say, and whether merging and serving keep it.

    Exits with status 1 if something is found that is an error.
    """
    if model is not None and base is not None:
        raise UserError(f"MODEL {model!r} and --model {base!r}: give one of them")
    name = model or base
    if adapter is None:
        given = {"--text": text, "--merged": merged, "--served": served, "--served-model": served_model}
        if unused := [option for option, value in given.items() if value is not None]:
            raise UserError(f"{unused[0]} needs --adapter, and the model that it was trained on")
        if name is None:
            raise UserError("nothing to check: name a MODEL, or an --adapter")
        _check_model(name, placement, rank, gpu, as_json)
    elif name is None:
        if served is not None or merged is not None:
            raise UserError(
                f"{'--served' if served else '--merged'} needs --model, the model the adapter was trained on"
            )
        from lorabench.check.adapter import read_adapter

        read = read_adapter(adapter)
        if not as_json:
            _print_adapter(read)
        _finish(asdict(read), read.findings, as_json)
    else:
        _check_computed(adapter, name, text, dtypes, merged, served, served_model, as_json)


def _check_model(name: str, placement: str, rank: int, gpu: str, as_json: bool) -> None:
    from lorabench.config.fields import Placement

    if placement not in get_args(Placement):
        raise UserError(f"--placement {placement!r}: allowed: {', '.join(get_args(Placement))}")
    from lorabench.check.placement import coverage
    from lorabench.custom.model import find_model

    covered = coverage(find_model(name), placement, rank, gpu)  # type: ignore[arg-type]
    if not as_json:
        _print_coverage(covered)
    _finish(asdict(covered), covered.findings, as_json)


def _check_computed(
    adapter: Path,
    name: str,
    text: Path | None,
    dtypes: str,
    merged: Path | None,
    served: str | None,
    served_model: str | None,
    as_json: bool,
) -> None:
    """Compare a base with an adapter, and with merged models or a server."""
    from lorabench.check.adapter import read_adapter
    from lorabench.custom.model import find_model

    # What the files say is said first, since it takes no weights.
    of_files = read_adapter(adapter).findings
    described = find_model(name)
    if any(finding.code in ("not-finite", "shape") for finding in of_files):
        # Nothing can be computed with it.
        _finish({"findings": [asdict(finding) for finding in of_files]}, of_files, as_json)
    from lorabench.check.merging import DTYPES, check_merging
    from lorabench.check.probe import probe

    chosen = [dtype.strip() for dtype in dtypes.split(",") if dtype.strip()]
    if unknown := [dtype for dtype in chosen if dtype not in DTYPES]:
        raise UserError(f"--dtypes {dtypes}: {unknown[0]!r} is not known; allowed: {', '.join(DTYPES)}")
    computed = probe(described, adapter, text)
    if served is not None:
        from lorabench.check.served import check_served

        answers = check_served(computed, served, served_model)
        if not as_json:
            _print_served(answers)
        findings = (*of_files, *answers.findings)
        _finish(asdict(answers) | {"findings": [asdict(finding) for finding in findings]}, findings, as_json)
        return
    merging = check_merging(computed, chosen, merged)
    if not as_json:
        _print_merging(merging)
    findings = (*of_files, *merging.findings)
    _finish(asdict(merging) | {"findings": [asdict(finding) for finding in findings]}, findings, as_json)


def _finish(about: dict[str, Any], findings: Sequence[Finding], as_json: bool) -> None:
    """Print JSON or the findings, and exit with status 1 if one of them is an error."""
    if as_json:
        print(json.dumps(about, indent=2))
    else:
        for finding in findings:
            print(f"{finding.level} {finding.code}: {finding.message}")
        if not findings:
            print("nothing was found that is wrong")
    errors = sum(finding.level == "error" for finding in findings)
    if errors:
        print(f"lorabench: {errors} of {len(findings)} findings are errors", file=sys.stderr)
        raise typer.Exit(1)


def _print_coverage(covered: Coverage) -> None:
    rows = []
    for kind in covered.kinds:
        counts = (f"{kind.weights:,}", formats.parameters(kind.parameters), f"{kind.with_lora:,}")
        rows.append((kind.kind, *counts, f"{kind.lora_parameters:,}", kind.note))
    share = covered.lora_parameters / covered.parameters
    notes = [f"LoRA trains {covered.lora_parameters:,} parameters, {share:.2%} of the model's; as PEFT names them:"]
    for name, names in (("modules", covered.target_modules), ("parameters", covered.target_parameters)):
        notes += [f"  target_{name}: {', '.join(names)}"] if names else []
    for method, title in (("lora", "LoRA"), ("fullft", "full fine-tuning")):
        need = covered.memory[method]
        size = (
            f"{need.gigabytes:g} GB on each of {need.gpus} x {covered.gpu}"
            if need.gpus
            else f"no number of {covered.gpu} is enough"
        )
        notes.append(f"memory of {title} in bf16, estimated: {size}")
    title = f"{covered.model}: {covered.family}, {formats.parameters(covered.parameters)} parameters, "
    title += f"LoRA of rank {covered.rank} on {covered.placement} and the unembedding"
    title += f", {covered.expert_rank} on each expert" if covered.expert_rank else ""
    columns = ("kind", "weights", "parameters", "with LoRA", "LoRA's parameters", "")
    formats.print_table(columns, rows, columns[1:5], f"{title}; names from {covered.names_from}", notes)


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
    rows = [(kind, str(len(modules)), *_cells(modules)) for kind, modules in sorted(by_kind.items())]
    notes = ["medians; the update is scale B A, and A is its size over that of PEFT's initialization"]
    formats.print_table(columns, rows, columns[1:], notes=notes)
    by_norm = sorted(adapter.modules, key=lambda module: -module.norm)
    if len(by_norm) > 2 * _SHOWN:
        rows = [
            (name, module.module, *_cells([module]))
            for name, some in (("strongest", by_norm[:_SHOWN]), ("weakest", by_norm[-_SHOWN:]))
            for module in some
        ]
        formats.print_table(("", "module", *columns[2:]), rows, columns[2:])


def _cells(modules: Sequence[ModuleUpdate]) -> tuple[str, ...]:
    """Return the columns of some modules, as medians."""
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
        ("base", "fp32", formats.nll(merging.base_nll), *_differences(None), ""),
        ("adapter", "fp32", formats.nll(merging.adapter_nll), *_differences(merging.effect), "the base"),
    ]
    for row in merging.merged:
        if row.dtype != "fp32":
            rows.append(("base", row.dtype, formats.nll(None), *_differences(row.rounding), "the base in fp32"))
        rows.append((row.name, row.dtype, formats.nll(row.nll), *_differences(row.difference), "the adapter"))
    columns = ("model", "type", "NLL", "largest", "mean", "KL", "difference from")
    title = f"{merging.adapter} on {merging.model}: logits on a text of {merging.tokens} tokens"
    sentences = [row.verdict for row in merging.merged]
    formats.print_table(columns, rows, columns[2:6], title, [*sentences, merging.four_bit])


def _differences(difference: Difference | None) -> tuple[str, ...]:
    values = (None,) * 3 if difference is None else (difference.largest, difference.mean, difference.kl)
    return tuple(formats.number(value, 2) for value in values)


def _print_served(served: ServedModels) -> None:
    rows = []
    for row in served.models:
        nlls = map(formats.nll, (row.nll, row.base_nll, row.adapter_nll))
        rows.append((row.name, row.serves, formats.number(row.strength), *nlls))
    columns = ("model", "serves", "strength", "NLL", "NLL of the base", "NLL of the adapter")
    title = f"{served.url} on a text of {served.tokens} tokens, against {served.adapter}"
    formats.print_table(columns, rows, columns[2:], title, [row.verdict for row in served.models])

"""Full fine-tuning whose weights are held in bf16: by how much what rounding loses raises its optimal learning rate.

    python -m studies.bf16.weights rl_smollm2 sums 1e-5 1e-4 --seeds 2    # a preset that is finished in results/

Published sweeps in which LoRA's learning rate (LR) is a small multiple of that of full fine-tuning often hold the
weights of full fine-tuning in bf16 and those of the adapter in fp32. A number in bf16 has 8 significant bits, so that a
step of Adam that is smaller than about 1/500 of a weight is rounded away. `kept` is the share of steps of size LR that
is left, and depends on the base's weights alone. The prediction has no constant: an LR in bf16 does what the LR times
`kept` does in fp32, so that the optimum in bf16 is the LR at which this product is the optimum in fp32.

The command trains full fine-tuning on one of a preset's datasets at the given LRs, and rounds all weights to bf16 after
each step and nothing else. The losses of these runs, in RL accuracies, are added to studies/bf16/weights.csv beside
those of the preset's own runs, which hold weights in fp32 and have the same data and order.

Written down before the first result of these runs, with steps of a whole LR, where Adam's are smaller and more is lost:

- SmolLM2-135M, RL on sums (the base solves 26% of the problems; fp32 is best at 1.25e-5, with 87%): the optimum in bf16
  is at least 6e-5. At 1e-5, where 2% is kept, bf16 ends below 50%, where fp32 has 87%; at 1e-4 above 50%, where fp32
  has 1%. If bf16 has more than 80% at 1e-5, or less than 26% at 1e-4, rounding is not the reason.
- SmolLM2-135M, docstrings (fp32 is best at about 8e-5): the optimum in bf16 is 2.4e-4, within a factor of 1.6.
- A model of width 64, RL on sums (fp32 is best at 2.1e-4): 2.4e-4, so that nothing is to be seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from lorabench.models.base import load_model
from lorabench.planning.plan import Plan, make_plan
from lorabench.runs import Condition, Run, Seeds, Sweep
from lorabench.store.io import write_csv
from lorabench.store.layout import Layout
from lorabench.store.run_folder import RunFolder
from lorabench.training.job import train_sweep
from lorabench.training.rl.trainer import RlTrainer
from lorabench.training.sft import SftTrainer
from lorabench.utils.markdown import table as markdown_table
from lorabench.utils.markdown import write_part

TABLE, PAGE = Path("studies/bf16/weights.csv"), Path("studies/bf16/README.md")


def kept(weights: Sequence[torch.Tensor], lr: float) -> float:
    """Return the share of steps of size `lr`, up or down, that is left if weights are rounded to bf16 after each."""
    moved = 0.0
    for weight in weights:
        held = weight.bfloat16().float()
        for step in (lr, -lr):
            moved += ((held + step).bfloat16().float() - held).abs().sum(dtype=torch.float64).item()
    return moved / 2 / lr / sum(weight.numel() for weight in weights)


def round_weights(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Round all weights that an optimizer trains to bf16, in place."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.data.copy_(weight.data.bfloat16())


def train_at(lrs: Sequence[float], seeds: int, plan: Plan, sweep: Sweep, layout: Layout) -> None:
    """Train a sweep's condition at each of some LRs, with the preset's first seeds."""
    given = tuple((lr, seeds) for lr in lrs)
    seeds_of = Seeds(seeds, given=given, first=layout.preset.first_seed)
    with RlTrainer() if sweep.condition.task == "rl" else nullcontext(SftTrainer()) as train:
        changed = replace(sweep, lrs=tuple(lrs), seeds=seeds_of, lattice=None)
        train_sweep(plan, changed, layout, train, print)


def results(layout: Layout, runs: Path, condition: Condition, weights: str) -> list[dict[str, Any]]:
    """Return a row for each finished run of a condition in a folder of runs."""
    rows, rl = [], condition.task == "rl"
    for path in sorted(runs.iterdir()):
        folder = RunFolder(runs, path.name)
        if not folder.done():
            continue
        record = folder.read_record()
        lr, seed, outcome = record["spec"]["lr"], record["spec"]["seed"], record["outcome"]
        if Run(condition, lr, seed).run_id == path.name:
            row = {"preset": layout.name, "model": condition.model, "dataset": condition.dataset, "weights": weights}
            row |= {"lr": lr, "seed": seed, "status": outcome["status"]}
            rows.append(row | {"accuracy" if rl else "nll": outcome["final_reward" if rl else "final_test_nll"]})
    return rows


def add_rows(path: Path, rows: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """Add rows to a table, in which they replace those of the same names, sort it by these, and return it."""
    earlier = [pd.read_csv(path)] if path.is_file() else []
    table = pd.concat([*earlier, rows]).drop_duplicates(names, keep="last").sort_values(names)
    write_csv(table, path)
    return table


def page_part(table: pd.DataFrame) -> str:
    """Return the table for the page: a row for each LR with runs in bf16, with the mean over seeds."""
    lines = []
    for (model, dataset, _), rows in table.groupby(["model", "dataset", "lr"]):
        rounded, exact = rows[rows["weights"] == "bf16"], rows[rows["weights"] == "fp32"]
        if len(rounded):
            share, lr = float(rounded["kept"].iloc[0]), float(rounded["lr"].iloc[0])
            measure = "accuracy" if rounded["accuracy"].notna().any() else "nll"
            means = [
                f"{float(runs[measure].mean()):.3f} ({len(runs)})" if len(runs) else "" for runs in (rounded, exact)
            ]
            lines.append([model, dataset, measure, f"{lr:.3g}", f"{share:.1%}", f"{share * lr:.2g}", *means])
    header = ["model", "dataset", "measure", "LR", "kept", "LR times kept", "in bf16 (seeds)", "in fp32 (seeds)"]
    return "\n".join(["", *markdown_table(header, lines), ""])


def main() -> None:
    """Train the runs, add them to the table, and show it on the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("preset", help="a preset whose full fine-tuning is finished in results/")
    parser.add_argument("dataset", help="one of its datasets or problem sets")
    parser.add_argument("lrs", type=float, nargs="*", help="learning rates; without any, nothing is trained")
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds, from the preset's first on")
    given = parser.parse_args()
    layout = Layout.of(given.preset)
    plan = make_plan(layout.preset)
    own = [s for s in plan.sweeps if s.condition.method == "fullft" and s.condition.dataset == given.dataset]
    if not own:
        parser.error(f"preset {given.preset} has no full fine-tuning on {given.dataset!r}")
    condition = own[0].condition
    weights = [weight.detach() for weight in load_model(layout.model(condition.model)).parameters()]
    for lr in given.lrs:
        print(f"{condition.model}: at {lr:g}, {kept(weights, lr):.3f} of a step is kept in bf16")
    fp32, layout.runs = layout.runs, layout.root / "bf16_weights"
    if given.lrs:
        register_optimizer_step_post_hook(round_weights)
        train_at(given.lrs, given.seeds, plan, own[0], layout)
    rounded = pd.DataFrame(results(layout, layout.runs, condition, "bf16"))
    shares = {lr: kept(weights, lr) for lr in rounded["lr"].unique()}
    exact = pd.DataFrame(results(layout, fp32, condition, "fp32"))
    table = pd.concat([rounded.assign(kept=rounded["lr"].map(shares)), exact.assign(kept=1.0)])
    names = ["preset", "model", "dataset", "weights", "lr", "seed"]
    table = add_rows(TABLE, table.reindex(columns=[*names, "status", "kept", "accuracy", "nll"]), names)
    write_part(PAGE, "bf16", "`python -m studies.bf16.weights`", page_part(table))
    print(page_part(table))


if __name__ == "__main__":
    main()

"""LoRA with a frozen A that does not see the mean input of its layer: whether this raises its best learning rate (LR).

    python -m studies.lr_ratio.scripts.a_without_mean lr_smollm2@100 docstrings 1e-6 2.15e-6 --seeds 2

With a frozen A the ratio of LoRA's to full fine-tuning's best LR is about twice the width over alpha in tiny models,
and half of that in SmolLM2-135M. The inputs of a layer of SmolLM2 have much in common: their mean over tokens has 36%
of their mean square, in tiny models 14% to 20%. A random A passes it on, so that every step of B moves the outputs of
all tokens alike, and the LR must be low for this direction alone. If this is the reason, then the ratio rises once the
rows of A are made orthogonal to the mean input of their layer (of 32 training examples, by the base), and nothing else
is changed. `python -m studies.lr_ratio.scripts.first_step` says by how much.

The command trains these runs at the given LRs of A, which is frozen since B's LR is 1000 times as high, and writes
their losses by the LR of B into `a_without_mean.csv`, beside those of the preset's own runs on the same examples in the
same order; that preset is finished in results/. It also writes the table of the preset's ratios into the page.

Written down before the first of these runs, for SmolLM2-135M on docstrings, where A as it is has the ratio 14 by
parabolas, 18.1 by the line search of the first step, and 33 by `movement`:

- Without the mean the line search says 33.0. So the best LR is 1.82 times as high, within 1.4: B's from 0.9e-3 to
  1.8e-3, where A as it is has 0.69e-3. If it is less than 1.25 times as high, the mean input is not the reason.
- On documentation, with A as it is, whose runs are not there yet either, the line search says 16.8: nearer to the
  measured ratio than what `movement` says (31 to 33).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd

from lorabench.analysis.arms import ALPHA
from lorabench.data.tokens import cache_key, read_tokens
from lorabench.models.base import load_model, load_tokenizer
from lorabench.models.lora import lora_layers
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout
from lorabench.store.published import PUBLISHED
from lorabench.training import context
from lorabench.training.run import machine_of
from lorabench.utils.markdown import table as markdown_table
from lorabench.utils.markdown import write_part
from studies.bf16.weights import add_rows, results, train_at
from studies.lr_ratio.scripts.first_step import layer_inputs, lowest, without

TABLE = Path("studies/lr_ratio/scripts/a_without_mean.csv")
PUBLISHED_RATIOS, PAGE = PUBLISHED / "lr_smollm2/lr_ratio.csv", Path("studies/lr_ratio/README.md")
RANK = 16
LABELS = {1.0: "trained A", 1000.0: "frozen A"}
"""The arms of LoRA, by the ratio of B's to A's LR."""
SHOWN = ("movement", "mu_a", "scale", "still", "constant")
"""The theories that the page shows."""


def page_part(ratios: pd.DataFrame) -> str:
    """Return the table of the page: the ratios that a published preset measured, and what theories say of them."""
    own = ratios[ratios["element"].eq("condition") & ratios["runs"].eq("own")]
    names, lines = ["frozen", "dataset", "rank", "alpha"], []
    for (frozen, dataset, rank, alpha), rows in own.sort_values(names, ascending=[True, True, False, True]).groupby(
        names, sort=False
    ):
        said, first = rows.set_index("theory")["predicted"], rows.iloc[0]
        measured = f"{first['ratio']:.1f} [{first['ratio_low']:.1f}, {first['ratio_high']:.1f}]"
        arm = f"rank {rank:.0f}, alpha {alpha:.0f}{', A frozen' if frozen else ''}"
        lines.append([dataset, arm, measured, *(f"{said[name]:.1f}" if name in said else "" for name in SHOWN)])
    header = ["dataset", "LoRA", "measured", *(f"`{name}`" for name in SHOWN)]
    return "\n".join(["", *markdown_table(header, lines), ""])


def main() -> None:
    """Train the runs, write the table, and print the best LRs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("preset", help="a preset that is finished in results/, with a frozen A")
    parser.add_argument("dataset", help="one of its datasets")
    parser.add_argument("lrs", type=float, nargs="*", help="learning rates of A; without any, nothing is trained")
    parser.add_argument("--arm", choices=LABELS.values(), default=LABELS[1000.0])
    parser.add_argument("--seeds", type=int, default=2, help="number of seeds, from the preset's first on")
    given = parser.parse_args()
    layout = Layout.of(given.preset)
    plan = make_plan(layout.preset)
    sweeps = [sweep for sweep in plan.sweeps if sweep.condition.dataset == given.dataset]
    fullft = [sweep for sweep in sweeps if sweep.condition.method == "fullft"]
    lora = [sweep for sweep in sweeps if (sweep.condition.rank, sweep.condition.alpha) == (RANK, ALPHA)]
    arms = {LABELS[ratio]: sweep for sweep in lora if (ratio := sweep.condition.lr_ratio) in LABELS}
    if not (fullft and len(arms) == len(LABELS)):
        parser.error(f"preset {given.preset} lacks full fine-tuning, LoRA or a frozen A on {given.dataset!r}")
    condition = arms[given.arm].condition
    spec = layout.model(condition.model)
    key = cache_key(load_tokenizer(spec), layout.dataset(given.dataset))
    train = read_tokens(layout.tokens(condition.model, given.dataset), key)["train"].chosen(np.arange(32))
    inputs = layer_inputs(load_model(spec), train, machine_of(plan))
    with_adapter = context.with_adapter

    def changed(*arguments: Any) -> Any:
        model = with_adapter(*arguments)
        for name, layer in lora_layers(model):
            a = layer.lora_A["default"].weight
            a.data.copy_(without(a.data, inputs[name].mean))
        return model

    own, layout.runs = layout.runs, layout.root / "a_without_mean"
    if given.lrs:
        with mock.patch.object(context, "with_adapter", changed):
            train_at(given.lrs, given.seeds, plan, arms[given.arm], layout)
    rows = results(layout, own, fullft[0].condition, "full fine-tuning")
    for name, sweep in arms.items():
        rows += results(layout, own, sweep.condition, name)
        rows += results(layout, layout.runs, sweep.condition, f"{name} without the mean")
    table = pd.DataFrame(rows).rename(columns={"weights": "trained"})
    table["lr"] *= np.where(table["trained"].str.startswith(LABELS[1000.0]), 1000.0, 1.0)
    names = ["preset", "model", "dataset", "trained", "lr", "seed"]
    add_rows(TABLE, table.round({"lr": 9}), names)
    write_part(
        PAGE, "smollm2", "`python -m studies.lr_ratio.scripts.a_without_mean`", page_part(pd.read_csv(PUBLISHED_RATIOS))
    )
    best = {str(name): lowest(dict(arm.groupby("lr")["nll"].mean())) for name, arm in table.groupby("trained")}
    for name, lr in best.items():
        times = f"{lr:.3g}, {lr / best['full fine-tuning']:.3g} times that of full fine-tuning"
        print(f"{name}: the best LR is {'at an edge' if math.isnan(lr) else times}")


if __name__ == "__main__":
    main()

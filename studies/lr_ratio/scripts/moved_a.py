"""What the movement of LoRA's A says of the LR ratio: the line search of the first step with A as it is after a run.

    python -m studies.lr_ratio.scripts.moved_a lr_ratio@100 tiny instruct 2.15e-3
    python -m studies.lr_ratio.scripts.moved_a lr_smollm2@100 smollm2-135m docstrings 6.81e-4

The theory `movement` says that a trained A lowers the ratio as the size of A x grows in all directions. On
SmolLM2-135M it should lower it by 2.2, and does by 1.05, where the inputs x of a layer have much in common. The command
trains LoRA of rank 16 in a condition of a preset that is finished in results/, at about its best LR, and prints the
ratio that the line search of `first_step` finds with A before (`random`) and after this run (`moved`), each also with
rows that are orthogonal to the layer's mean input. `size` is the root mean square of A x over that of the random A, and
`mean share` that of the mean of A x in its mean square, both by the inputs in the base, as means over layers. The rows
are added to moved_a.csv.

Written down before the first of these runs:

- Tiny models on `instruct`, where the theory holds, at their best LRs of 2.2e-3 (width 128) and 1.66e-3 (width 256):
  the moved A lowers the line search by what the theory says of A's size, 1.64 and 2.2, within a factor of 1.4.
- SmolLM2-135M on docstrings and documentation, at 6.81e-4, where the theory says 2.1. If what it lacks is the mean
  input, then the moved A lowers the line search by less than 1.25 as it is, and by at least 1.5 where both A's are
  without the mean; A turns away from the mean, so that `mean share` falls to less than 0.7 of its value. If it lowers
  both by at least 1.5, the line search does not see what the theory lacks. If it lowers both by less than 1.25, A's
  movement does not matter on this model, and `movement` is a rule that fits it.
- A trained A without the mean has a best LR within 1.25 of that of a trained A as it is (docstrings, two seeds,
  `a_without_mean --arm "trained A"`), where a frozen one has 1.83 times: A's movement is then what limits the LR. From
  1.5 on, it does not. Two of the six runs had been seen: seed 100 at 1e-3 and 2.15e-3, which differ by +0.002 and
  -0.011 nats from those with the mean.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
from torch import Tensor

from lorabench.analysis.arms import ALPHA
from lorabench.data.tokens import cache_key, read_tokens
from lorabench.models.base import load_model, load_tokenizer
from lorabench.models.lora import lora_layers
from lorabench.planning.plan import make_plan
from lorabench.store.layout import Layout
from lorabench.training import context
from lorabench.training.run import machine_of
from studies.bf16.weights import add_rows, train_at
from studies.lr_ratio.scripts.first_step import first_steps, layer_inputs, mean_share, without

TABLE, RANK = Path("studies/lr_ratio/scripts/moved_a.csv"), 16


def as_it_is(factors: Mapping[str, Tensor], layer: str, _: int) -> Tensor:
    """Return the A of a layer."""
    return factors[layer]


def main() -> None:
    """Train the run, and add the line searches to the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("preset", help="a preset that is finished in results/")
    parser.add_argument("model", help="one of its models")
    parser.add_argument("dataset", help="one of its datasets")
    parser.add_argument("lr", type=float, help="the learning rate of the run")
    given = parser.parse_args()
    layout = Layout.of(given.preset)
    plan = make_plan(layout.preset)
    wanted = (given.model, given.dataset, RANK, ALPHA, 1.0, 1.0)
    sweep = next(
        (
            sweep
            for sweep in plan.sweeps
            if (c := sweep.condition).method == "lora"
            and (c.model, c.dataset, c.rank, c.alpha, c.lr_ratio or 1.0, c.init_a or 1.0) == wanted
        ),
        None,
    )
    if sweep is None:
        parser.error(f"preset {given.preset} has no LoRA of rank {RANK} on {given.model!r} and {given.dataset!r}")
    with_adapter, layers, before = context.with_adapter, dict[str, Any](), dict[str, Tensor]()

    def kept(*arguments: Any) -> Any:
        model = with_adapter(*arguments)
        layers.update(lora_layers(model))
        before.update({name: layer.lora_A["default"].weight.detach().clone() for name, layer in layers.items()})
        return model

    with mock.patch.object(context, "with_adapter", kept), TemporaryDirectory() as runs:
        layout.runs = Path(runs)
        train_at([given.lr], 1, plan, sweep, layout)
    spec, machine = layout.model(given.model), machine_of(plan)
    model = load_model(spec)
    key = cache_key(load_tokenizer(spec), layout.dataset(given.dataset))
    train = read_tokens(layout.tokens(given.model, given.dataset), key)["train"]
    some = train.chosen(np.arange(32))
    inputs = layer_inputs(model, some, machine)
    # The unembedding, which carries LoRA in the runs, is none of the layers of the line search.
    before = {name: before[name] for name in inputs}
    after = {name: layers[name].lora_A["default"].weight.detach() for name in inputs}
    sizes = layer_inputs(model, some, machine, before)
    rows = []
    for (words, factors), orthogonal in product((("random", before), ("moved", after)), (False, True)):
        chosen = {name: without(a, inputs[name].mean) if orthogonal else a for name, a in factors.items()}
        outputs = layer_inputs(model, some, machine, chosen)
        size = np.mean([outputs[name].square / sizes[name].square for name in sizes]) ** 0.5
        make_a = partial(as_it_is, chosen)
        logs = np.log(first_steps(model, train, sweep.condition.batch_size, make_a, machine))[:, 1]
        row = {
            "preset": layout.name,
            "model": given.model,
            "dataset": given.dataset,
            "lr": given.lr,
            "a": words,
            "without_mean": orthogonal,
            "size": size,
            "mean_share": mean_share(outputs),
            "line_search": math.exp(logs.mean()),
            "log_error": logs.std(ddof=1) / 2,
        }
        rows.append(row)
        print(pd.DataFrame(rows[-1:]).to_string(index=False, header=len(rows) == 1), flush=True)
    add_rows(TABLE, pd.DataFrame(rows), ["preset", "model", "dataset", "lr", "a", "without_mean"])


if __name__ == "__main__":
    main()

"""What the tests of RL in several processes run in each: `torchrun ... -m tests.training.rl.several FOLDER`.

Trains the sweeps of every preset in the folder; a preset's file is named after how its model is held.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from lorabench.layout import Layout
from lorabench.plan import make_plan
from lorabench.training.distributed import join, leave
from lorabench.training.sweep import run_sweep


def main(folder: Path) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    alike = join("fsdp")
    for preset in sorted(folder.glob("*.yaml")):
        layout = Layout.of(str(preset))
        plan = make_plan(layout.preset)
        processes = replace(alike, sharding=layout.preset.execution.sharding)
        for sweep in plan.sweeps:
            run_sweep(plan, sweep, layout, lambda line: None, processes)
    leave(alike)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

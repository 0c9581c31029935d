"""The program of tests of RL in two processes: `torchrun ... -m tests.training.rl.two_processes FOLDER`.

It trains the sweeps of the preset in the folder.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from lorabench.planning.plan import make_plan
from lorabench.runs import Job
from lorabench.store.layout import Layout
from lorabench.training.distributed import join, leave
from lorabench.training.job import run_job


def main(folder: Path) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    layout = Layout.of("mine.yaml")
    plan = make_plan(layout.preset)
    processes = join()
    for sweep in plan.sweeps:
        run_job(plan, Job((sweep,)), layout, lambda line: None, processes)
    leave(processes)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

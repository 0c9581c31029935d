"""Starting the processes of a job, one per GPU, by torch's elastic launcher; `torchrun` starts them as well.

Each runs the same command. What goes wrong in one ends all; an error that a user can mend is handed to the process that
started them, which shows it once.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lorabench.errors import UserError
from lorabench.training.stop import Stopped

# Seconds that processes have to save what they have done when the job is told to end.
_GRACE = 120


def started() -> bool:
    """Whether this process is one of several that were started together."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(count: int, arguments: Sequence[str]) -> None:
    """Run this command line `count` times side by side, to the end.

    Raises:
        UserError: there are not so many GPUs, or what one of the processes met.
        Stopped: the job was told to end.
        SystemExit: a process ended badly.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    gpus = torch.cuda.device_count()
    if 0 < gpus < count:
        raise UserError(f"--processes = {count}: this machine shows {gpus} GPUs; at most one process each")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Read by the processes' thread pools before any setting of ours, and by accelerate, which warns without it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_GRACE))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        # The workflow tries again; the processes go on from their checkpoint.
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "lorabench.cli", *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        told = failure.error_file_data["message"]
        if isinstance(told, dict):
            raise UserError(told["message"].partition(": ")[2]) from error
        sys.exit(f"lorabench: process {failure.local_rank} of {count} ended with exit code {failure.exitcode}")
    except SignalException as error:
        raise Stopped(error.sigval) from error


@contextmanager
def reporting() -> Iterator[None]:
    """Hand a UserError of one process among several to the one that started them, which knows of signals itself."""
    try:
        yield
    except Stopped as stopped:
        if not started():
            raise
        sys.exit(stopped.exit_status)
    except UserError as error:
        if not started():
            raise
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        sys.exit(2)

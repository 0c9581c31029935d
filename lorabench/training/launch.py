"""The start of a job's processes, one per GPU, by torch's elastic launcher; `torchrun` can start them too.

Each process runs the same command. A failure of one process ends all of them. A `UserError` is passed to the parent
process, which shows it once.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lorabench.errors import UserError
from lorabench.utils.exhaustion import NoMemoryError
from lorabench.utils.signals import GRACE, Stopped


def is_worker() -> bool:
    """Return whether this process was started by the elastic launcher."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def launch(count: int, arguments: Sequence[str]) -> None:
    """Run the command line `lorabench ARGUMENTS` in `count` processes and wait for their end.

    Raises:
        UserError: the machine has fewer GPUs than `count`, or a process raised a UserError.
        Stopped: a signal asked the job to end.
        SystemExit: a process failed otherwise.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    gpus = torch.cuda.device_count()
    if 0 < gpus < count:
        raise UserError(f"--processes = {count}: this machine shows {gpus} GPUs; at most one process each")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Thread pools read this before any setting of ours, and accelerate warns if it is not set.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(GRACE))
    # The launcher's own handlers would give up waiting for the processes at a second SIGTERM. Ours raise Stopped once,
    # on which the launcher passes SIGTERM on and waits.
    os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGHUP,SIGQUIT")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        # The workflow restarts a failed job, which then goes on from its checkpoints.
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "lorabench.cli", *arguments)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        message = failure.error_file_data["message"]
        if isinstance(message, dict):
            name, _, text = message["message"].partition(": ")
            raise (NoMemoryError if name == NoMemoryError.__name__ else UserError)(text) from error
        sys.exit(f"lorabench: process {failure.local_rank} of {count} ended with exit code {failure.exitcode}")
    except SignalException as error:
        raise Stopped(error.sigval) from error


@contextmanager
def errors_to_launcher() -> Iterator[None]:
    """Within the context, pass a UserError to the launching process, if there is one, and exit quietly on Stopped.

    The launching process receives the signals itself.
    """
    try:
        yield
    except Stopped as stopped:
        if not is_worker():
            raise
        sys.exit(stopped.exit_status)
    except UserError as error:
        if not is_worker():
            raise
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        sys.exit(2)

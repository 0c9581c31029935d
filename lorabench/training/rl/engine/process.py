"""The trainer's side of the process in which vLLM draws responses (see `worker.py`)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from lorabench.errors import UserError
from lorabench.models.vllm_support import vllm_environment

# Seconds between two looks at whether the job is asked to end.
_LOOK = 0.2
# Seconds in which a process has ended that has closed its connection.
_END = 20
# Lines of the engine's log that an error shows.
_LINES = 3


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is started with."""

    options: dict[str, Any]
    """The arguments of vLLM's `LLM`."""
    device: int | None
    """Index of this process's GPU among the visible ones; None for a CPU."""
    threads: int


def llm_options(model: str, dtype: str, max_length: int, cache_bytes: int, max_rank: int | None) -> dict[str, Any]:
    """Return the arguments of vLLM's `LLM` with which it draws from a policy.

    Args:
        model: folder or hub id of the model.
        dtype: the name of the type of products.
        max_length: tokens of the longest prompt with its response.
        cache_bytes: bytes of keys and values.
        max_rank: largest rank of the adapter; None for an engine without one.
    """
    lora = {} if max_rank is None else {"enable_lora": True, "max_loras": 1, "max_lora_rank": max_rank}
    return lora | {
        "model": model,
        "dtype": dtype,
        "max_model_len": max_length,
        "kv_cache_memory_bytes": cache_bytes,
        "skip_tokenizer_init": True,
        # Log-probabilities of the distribution that tokens are drawn from.
        "logprobs_mode": "processed_logprobs",
        # Not the sampling settings in the model's folder.
        "generation_config": "vllm",
        "seed": 0,
        "disable_log_stats": True,
    }


class Engine:
    """A process in which vLLM draws. It is a context manager that ends the process."""

    def __init__(self, settings: EngineSettings, folder: Path) -> None:
        """Start an engine.

        Args:
            folder: the folder through which weights are handed over; the process removes it if this one dies.

        Raises:
            UserError: it does not start.
        """
        self.settings = settings
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lorabench.training.rl.engine.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=_environment(settings),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        try:
            self._ask({"trainer": os.getpid(), "folder": str(folder), "options": settings.options}, lambda: None)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def ask(self, name: str, interrupt: Callable[[], None] = lambda: None, **arguments: Any) -> Any:
        """Send a message, a method of the worker's `_Engine`, and return the answer.

        Args:
            interrupt: called while the answer is awaited; it may raise.

        Raises:
            UserError: the engine failed or has ended.
        """
        return self._ask({"do": name, "with": arguments}, interrupt)

    def close(self) -> None:
        """End the process, which holds nothing that would have to be saved."""
        self._process.kill()
        self._process.wait()
        self._connection.close()
        self._log.close()

    def _ask(self, message: dict[str, Any], interrupt: Callable[[], None]) -> Any:
        try:
            self._connection.send_bytes(json.dumps(message).encode())
            while not self._connection.poll(_LOOK):
                interrupt()
            answer = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError) as error:
            raise UserError(
                f"the process of vLLM, which draws the responses (execution.sampler), {self._end()}; start the same "
                f"command again, and its runs go on from their checkpoints{self._last_lines()}"
            ) from error
        if "error" in answer:
            raise UserError(f"vLLM, which draws the responses (execution.sampler), failed: {answer['error']}")
        return answer["result"]

    def _end(self) -> str:
        """Return how the process ended, as the end of a sentence."""
        try:
            status = self._process.wait(_END)
        except subprocess.TimeoutExpired:
            return "does not answer any more"
        return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"

    def _last_lines(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log.read().decode(errors="replace").splitlines() if line.strip()]
        return "".join(f"\n  {line}" for line in lines[-_LINES:])


def _environment(settings: EngineSettings) -> dict[str, str]:
    """Return this process's environment, without its place among the job's processes, with vLLM's variables."""
    distributed = ("TORCHELASTIC_", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "OMP_", "RANK", "WORLD_SIZE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(distributed)}
    # Models of the hub are fetched by a job of their own.
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment |= vllm_environment(settings.device is None)
    if settings.device is None:
        environment["OMP_NUM_THREADS"] = str(settings.threads)
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else []
        environment["CUDA_VISIBLE_DEVICES"] = devices[settings.device] if devices else str(settings.device)
    return environment

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
from dataclasses import dataclass, replace
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

    model: str
    """Folder or hub id of the model."""
    revision: str | None
    trust_remote_code: bool
    dtype: str
    max_length: int
    """Tokens of the longest prompt with its response."""
    cache_bytes: int
    """Bytes of keys and values."""
    memory_share: float
    """Share of the GPU's memory that the engine takes."""
    max_rank: int | None
    """Largest rank of the adapter; None for an engine without one."""
    tokenizer: str | None
    """Folder or hub id of the tokenizer; None where no stop text is to be found."""
    device: int | None
    """Index of this process's GPU among the visible ones; None for a CPU."""
    threads: int

    def of_folder(self, folder: Path) -> EngineSettings:
        """Return the settings of an engine that reads its weights from a folder."""
        return replace(self, model=str(folder), revision=None)

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of vLLM's `LLM`."""
        options: dict[str, Any] = {
            "model": self.model,
            "trust_remote_code": self.trust_remote_code,
            "dtype": self.dtype,
            "max_model_len": self.max_length,
            "kv_cache_memory_bytes": self.cache_bytes,
            "gpu_memory_utilization": self.memory_share,
            "tokenizer": self.tokenizer or self.model,
            "skip_tokenizer_init": self.tokenizer is None,
            # Log-probabilities of the distribution that tokens are drawn from.
            "logprobs_mode": "processed_logprobs",
            # Not the sampling settings in the model's folder.
            "generation_config": "vllm",
            "seed": 0,
            "disable_log_stats": True,
            # Compiling for a CPU takes longer than it saves.
            "enforce_eager": self.device is None,
        }
        if self.revision is not None:
            options |= {"revision": self.revision, "tokenizer_revision": self.revision}
        if self.max_rank is not None:
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": self.max_rank}
        return options


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

"""Sampling by vLLM: before each batch of responses, the present policy of each lane is handed over to the engine.

LoRA stays unmerged: each lane is an adapter, under a fresh name each time, since the engine keeps keys and values by
the adapter's name. In full fine-tuning the engine reads all weights again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorabench.models.lanes.shelf import Stack
from lorabench.training.distributed import Processes
from lorabench.training.rl.engine.folder import handover_folder
from lorabench.training.rl.engine.handover import adapter_tensors, model_tensors, write_adapter, write_model
from lorabench.training.rl.engine.process import Engine, EngineSettings
from lorabench.training.rl.sampler import Request, Response, Stop
from lorabench.training.rl.together import sample_in_processes


class Engines:
    """The engine of this process in a job: one at a time, which sweeps share as long as it serves them.

    It is a context manager, which ends the engine.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self._folder = ExitStack()
        self._running = ExitStack()
        self._engine: Engine | None = None
        self._path: Path | None = None
        self._handed_over = 0

    def __enter__(self) -> Engines:
        return self

    def __exit__(self, *error: object) -> None:
        self._running.close()
        self._folder.close()

    @property
    def folder(self) -> Path:
        """The folder through which policies are handed over; every process must ask for it at the same time."""
        if self._path is None:
            self._path = self._folder.enter_context(handover_folder(self.processes))
        return self._path

    def number(self) -> int:
        """Return a number that no adapter of this job has had."""
        self._handed_over += 1
        return self._handed_over

    def engine(self, settings: EngineSettings) -> tuple[Engine, bool]:
        """Return an engine with these settings, and whether it was started now, since the present one did not serve."""
        if self._engine is not None and self._engine.serves(settings):
            return self._engine, False
        self._running.close()
        self._engine = None
        self._engine = self._running.enter_context(Engine(settings, self.folder))
        return self._engine, True


@dataclass(frozen=True)
class EngineSampler:
    """Draws from the lanes of a stack by vLLM.

    Attributes:
        engines: the job's engine.
        settings: what the engine is started with. In full fine-tuning its model is replaced by the policy.
        stack: the lanes.
        rank: LoRA's rank; None in full fine-tuning.
        alpha: LoRA's alpha; None in full fine-tuning.
        stop: what ends a response.
    """

    engines: Engines
    settings: EngineSettings
    stack: Stack
    rank: int | None
    alpha: float | None
    stop: Stop

    def __call__(self, requests: list[Request], interrupt: Callable[[], None] = lambda: None) -> list[Response]:
        """Draw a response to each request from the present policies; a request without a lane is for the first one.

        Args:
            interrupt: called while responses are awaited; it may raise to end the drawing.

        Raises:
            UserError: the engine failed or has ended.
        """
        engine, adapters = (self._with_weights(), {}) if self.rank is None else self._with_adapters(requests)

        def draw(share: list[Request]) -> list[Response]:
            return _drawn(engine, share, adapters, self.stop, interrupt) if share else []

        return sample_in_processes(requests, draw, self.engines.processes)

    def _with_weights(self) -> Engine:
        """Hand over all weights; return the engine, which has read them."""
        model: Any = self.stack.model
        processes, folder = self.engines.processes, self.engines.folder / "model"
        tensors = model_tensors(model, getattr(torch, self.settings.dtype), processes.first)
        if processes.first:
            write_model(tensors, model.config, folder)
        processes.wait()
        engine, started = self.engines.engine(replace(self.settings, model=str(folder), revision=None))
        if not started:
            engine.ask("weights", folder=str(folder))
        # The next policy is written over this one, which all engines must have read.
        processes.wait()
        return engine

    def _with_adapters(self, requests: Sequence[Request]) -> tuple[Engine, dict[str | None, int]]:
        """Hand over the adapters of the lanes that are requested; return the engine, and their numbers by lane."""
        assert self.rank
        assert self.alpha
        processes, first = self.engines.processes, next(iter(self.stack.lanes))
        engine, _ = self.engines.engine(self.settings)
        adapters: dict[str | None, int] = {}
        messages = []
        for lane in dict.fromkeys(request.lane or first for request in requests):
            number = adapters[lane] = self.engines.number()
            folder = self.engines.folder / f"adapter-{number}"
            tensors = adapter_tensors(self.stack.lanes[lane])
            if processes.first:
                write_adapter(tensors, self.rank, self.alpha, folder)
            messages.append({"name": folder.name, "number": number, "folder": str(folder)})
        processes.wait()
        engine.ask("adapters", adapters=messages)
        processes.wait()
        if processes.first:
            for message in messages:
                shutil.rmtree(str(message["folder"]))
        return engine, adapters | ({None: adapters[first]} if first in adapters else {})


def _drawn(
    engine: Engine,
    requests: Sequence[Request],
    adapters: dict[str | None, int],
    stop: Stop,
    interrupt: Callable[[], None],
) -> list[Response]:
    prompts = {prompt: index for index, prompt in enumerate(dict.fromkeys(request.prompt for request in requests))}
    answers = engine.ask(
        "sample",
        interrupt,
        prompts=list(prompts),
        requests=[(prompts[one.prompt], _seed(one.key), adapters.get(one.lane)) for one in requests],
        max_new_tokens=stop.max_new_tokens,
        stop_tokens=list(stop.tokens),
        stop_texts=list(stop.texts),
    )
    return [
        Response(np.array(tokens, np.int64), np.array(logprobs, np.float32), truncated)
        for tokens, logprobs, truncated in answers
    ]


def _seed(key: tuple[int, ...] | None) -> int | None:
    """Return the seed of a response's random numbers, which depends on its key alone; None for a greedy response."""
    return None if key is None else int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))

"""Sampling by vLLM: before each batch of responses, the present policy is handed over to the engine through files.

LoRA stays unmerged: the adapter gets a fresh name each time, since the engine keeps keys and values by that name. In
full fine-tuning the engine reads all weights again.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import save_file

from lorabench.config.inputs import HubModel
from lorabench.models.base import model_location
from lorabench.models.passes import trained_parameters
from lorabench.models.vllm_support import max_lora_rank
from lorabench.planning.engine import engine_memory
from lorabench.training.distributed import Processes, full_tensor
from lorabench.training.rl.engine.process import Engine, EngineSettings, llm_options
from lorabench.training.rl.sampler import Request, Response, Stop, sample_in_processes
from lorabench.training.sweep import SweepContext

_PREFIX = "lorabench-policy-"


def engine_settings(context: SweepContext, longest: int, finds_texts: bool) -> EngineSettings:
    """Return the settings of the engine of a sweep.

    Args:
        longest: tokens of the longest prompt with its response.
        finds_texts: whether a text may end a response.
    """
    machine, condition, preset = context.machine, context.sweep.condition, context.plan.preset
    spec = context.layout.model(condition.model)
    memory = engine_memory(preset, condition.model, condition)
    location, on_gpu = model_location(spec), machine.device.type == "cuda"
    dtype = "bfloat16" if preset.protocol.precision == "bf16" else "float32"
    max_rank = None if condition.rank is None else max_lora_rank(condition.rank)
    options = llm_options(location, dtype, longest, int(memory.cache), max_rank)
    options["trust_remote_code"] = getattr(spec, "trust_remote_code", False)
    if isinstance(spec, HubModel):
        options |= {"revision": spec.revision, "tokenizer_revision": spec.revision}
    if finds_texts:
        options |= {"tokenizer": location, "skip_tokenizer_init": False}
    if on_gpu:
        share = memory.total / torch.cuda.get_device_properties(machine.device).total_memory
        options["gpu_memory_utilization"] = min(0.95, share)
    else:
        # vLLM does not look at the share on a CPU, and compiling takes longer than it saves there.
        options |= {"gpu_memory_utilization": 0.5, "enforce_eager": True}
    device = machine.device.index or 0 if on_gpu else None
    return EngineSettings(options, device, max(1, preset.execution.threads // machine.processes.count))


class PolicyEngine:
    """The engine that draws from the policies of a job's runs, one run after another.

    It is started at the first draw, and again where a sweep needs other settings. It is a context manager, which ends
    the engine and removes the folder through which policies are handed over.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes, self._opened, self._handed_over = processes, ExitStack(), 0
        self._folder = self._opened.enter_context(_handover_folder(processes))
        self._engine: Engine | None = None

    def __enter__(self) -> PolicyEngine:
        return self

    def __exit__(self, *error: object) -> None:
        if self._engine is not None:
            self._engine.close()
        self._opened.close()

    def draw(
        self,
        model: torch.nn.Module,
        settings: EngineSettings,
        requests: list[Request],
        stop: Stop,
        interrupt: Callable[[], None] = lambda: None,
    ) -> list[Response]:
        """Draw a response to each request from the present policy. Every process must call this.

        Args:
            model: the policy, a base model or one with an adapter.
            settings: what the engine is started with. In full fine-tuning its model is replaced by the policy.
            interrupt: called while responses are awaited; it may raise to end the drawing.

        Raises:
            UserError: the engine failed or has ended.
        """
        hand_over = self._with_adapter if isinstance(model, PeftModel) else self._with_weights
        engine = hand_over(model, settings)

        def draw_share(share: list[Request]) -> list[Response]:
            if not share:
                return []
            prompts = {prompt: index for index, prompt in enumerate(dict.fromkeys(request.prompt for request in share))}
            answers = engine.ask(
                "sample",
                interrupt,
                prompts=list(prompts),
                requests=[(prompts[request.prompt], _seed(request.key)) for request in share],
                max_new_tokens=stop.max_new_tokens,
                stop_tokens=list(stop.tokens),
                stop_texts=list(stop.texts),
            )
            return [
                Response(np.array(tokens, np.int64), np.array(logprobs, np.float32), truncated)
                for tokens, logprobs, truncated in answers
            ]

        return sample_in_processes(requests, draw_share, self._processes)

    def _started(self, settings: EngineSettings) -> tuple[Engine, bool]:
        """Return an engine with these settings, and whether it was started now, since the present one had others."""
        if self._engine is not None and self._engine.settings == settings:
            return self._engine, False
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        self._engine = Engine(settings, self._folder)
        return self._engine, True

    def _with_weights(self, model: Any, settings: EngineSettings) -> Engine:
        """Hand over all weights; return the engine, which has read them.

        They have the type in which their products are computed, as in training, so none is rounded that training does
        not round. A tied unembedding becomes a weight of its own, since vLLM does not renew tied ones.
        """
        folder, tensors = self._folder / "model", {}
        named = (*model.named_parameters(), ("lm_head.weight", model.get_output_embeddings().weight))
        for name, parameter in named:
            whole = full_tensor(parameter.detach())
            if self._processes.first:
                tensors[name] = whole.to("cpu", getattr(torch, settings.options["dtype"]), copy=True).contiguous()
        if self._processes.first:
            folder.mkdir(exist_ok=True)
            untied = {"tie_word_embeddings": False, "architectures": model.config.architectures}
            (folder / "config.json").write_text(json.dumps(model.config.to_dict() | untied, default=str))
            save_file(tensors, folder / "model.safetensors.new", {"format": "pt"})
            os.replace(folder / "model.safetensors.new", folder / "model.safetensors")
        self._processes.wait()
        own = {"model": str(folder), "revision": None}
        engine, started = self._started(replace(settings, options=settings.options | own))
        if not started:
            engine.ask("weights", folder=str(folder))
        # The next policy is written over this one, which all engines must have read.
        self._processes.wait()
        return engine

    def _with_adapter(self, model: Any, settings: EngineSettings) -> Engine:
        """Hand over the adapter in PEFT's format; return the engine, which has read it."""
        engine, _ = self._started(settings)
        self._handed_over += 1
        folder = self._folder / f"adapter-{self._handed_over}"
        tensors = {
            name.replace(".default.", "."): full_tensor(parameter.detach()).cpu().contiguous()
            for name, parameter in trained_parameters(model).items()
        }
        if self._processes.first:
            config = model.active_peft_config
            modules = {name.rsplit(".", 3)[-3] for name in tensors}
            folder.mkdir()
            about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": config.r, "lora_alpha": config.lora_alpha}
            (folder / "adapter_config.json").write_text(json.dumps(about | {"target_modules": sorted(modules)}))
            save_file(tensors, folder / "adapter_model.safetensors")
        self._processes.wait()
        engine.ask("adapter", number=self._handed_over, folder=str(folder))
        self._processes.wait()
        if self._processes.first:
            shutil.rmtree(folder)
        return engine


def _seed(key: tuple[int, ...] | None) -> int | None:
    """Return the seed of a response's random numbers, which depends on its key alone; None for a greedy response."""
    return None if key is None else int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def _handover_folder(processes: Processes) -> Iterator[Path]:
    """Make a folder that all processes of a job, which share a machine, see; it is removed at the end.

    It is in memory where there is such a file system. Folders that killed jobs left behind are removed first.
    """
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    owner, token = map(int, processes.gather([os.getpid(), secrets.randbelow(1 << 40)])[0])
    folder = parent / f"{_PREFIX}{owner}-{token}"
    if processes.first:
        for old in parent.glob(f"{_PREFIX}*"):
            # Another job may remove it at the same moment.
            with suppress(FileNotFoundError):
                if old.stat().st_uid == os.getuid() and not _alive(int(old.name.split("-")[2])):
                    shutil.rmtree(old, ignore_errors=True)
        folder.mkdir(mode=0o700)
    processes.wait()
    try:
        yield folder
    finally:
        if processes.first:
            shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

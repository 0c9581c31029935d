"""Sampling by vLLM, in a process of its own (`engine_worker.py`).

Before each batch of responses, the present policy is handed over to the engine through files. LoRA stays unmerged: the
adapter gets a fresh name each time, since the engine keeps keys and values by that name. In full fine-tuning the engine
reads all weights again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import save_file

from lorabench.config.fields import SUFFIXES
from lorabench.config.inputs import HubModel
from lorabench.errors import UserError
from lorabench.models.base import model_location
from lorabench.models.passes import trained_parameters
from lorabench.models.vllm_support import machine_folder, max_lora_rank, vllm_environment
from lorabench.planning.memory import EngineBatch, engine_batch, engine_memory
from lorabench.training.context import SweepContext
from lorabench.training.distributed import Processes, full_tensor
from lorabench.training.rl.sampler import Request, Response, Stop, sample_in_processes
from lorabench.utils.exhaustion import space_for
from lorabench.utils.formats import amount

MEMORY = Path("/dev/shm")
"""The file system in memory that Linux machines have."""


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is started with: the arguments of vLLM's `LLM`, its GPU among the visible ones, its threads."""

    options: dict[str, Any]
    device: int | None
    """None for a CPU."""
    threads: int


def llm_options(
    model: str,
    dtype: str,
    max_length: int,
    cache_bytes: int,
    max_rank: int | None,
    batch: EngineBatch,
    gpu_share: float | None = None,
    tokenizes: bool = False,
    adapted: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the arguments of vLLM's `LLM` with which it draws from a policy.

    Args:
        dtype: the name of the type of products.
        max_length: tokens of the longest prompt with its response.
        max_rank: largest rank of the adapter; None without one.
        gpu_share: share of the GPU's memory that the engine may take; None on a CPU.
        tokenizes: whether a text may end a response, for which the engine needs the tokenizer.
        adapted: last parts of the names of layers that may carry the adapter; None for all.
    """
    # Layers that carry no adapter would take memory all the same.
    lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": max_rank, "lora_target_modules": adapted}
    return ({} if max_rank is None else lora) | {
        "model": model,
        "dtype": dtype,
        "max_model_len": max_length,
        "kv_cache_memory_bytes": cache_bytes,
        "max_num_seqs": batch.responses,
        "max_num_batched_tokens": batch.tokens,
        # In full fine-tuning the engine reads its weights from another folder, which has no tokenizer.
        **({"tokenizer": model} if tokenizes else {}),
        "skip_tokenizer_init": not tokenizes,
        # Log-probabilities of the distribution that tokens are drawn from.
        "logprobs_mode": "processed_logprobs",
        # Not the sampling settings in the model's folder.
        "generation_config": "vllm",
        "seed": 0,
        "disable_log_stats": True,
        # vLLM does not look at the share on a CPU, and compiling takes longer than it saves there.
        "gpu_memory_utilization": gpu_share or 0.5,
        "enforce_eager": gpu_share is None,
    }


def engine_settings(context: SweepContext, longest: int, tokenizes: bool) -> EngineSettings:
    """Return the settings of the engine of a sweep; see `llm_options`."""
    machine, condition, preset = context.machine, context.sweep.condition, context.plan.preset
    spec, device = context.layout.model(condition.model), machine.device
    memory, cache = engine_memory(preset, condition.model, condition)
    head = ("lm_head",) if preset.protocol.include_unembedding else ()
    gpu, share = None, None
    if device.type == "cuda":
        gpu = device.index or 0
        share = min(0.95, memory / torch.cuda.get_device_properties(device).total_memory)
    options = llm_options(
        model_location(spec),
        "bfloat16" if preset.protocol.precision == "bf16" else "float32",
        longest,
        int(cache),
        None if condition.rank is None else max_lora_rank(condition.rank),
        engine_batch(preset, condition),
        share,
        tokenizes,
        None if condition.placement is None else (*SUFFIXES[condition.placement], *head),
    )
    options["trust_remote_code"] = getattr(spec, "trust_remote_code", False)
    if isinstance(spec, HubModel):
        options |= {"revision": spec.revision, "tokenizer_revision": spec.revision}
    return EngineSettings(options, gpu, max(1, preset.execution.threads // machine.processes.count))


class PolicyEngine(AbstractContextManager["PolicyEngine"]):
    """The process in which vLLM draws from the policies of a job's runs, one run after another.

    It is started at the first draw, and again where a sweep needs other settings. Policies are handed over through a
    folder that all processes of a job see. On exit the process ends and the folders are removed. What vLLM prints is
    appended to the file `log`.
    """

    def __init__(self, processes: Processes, log: Path) -> None:
        self._processes, self._handed_over, self._room = processes, 0, -1
        # Each process of a job has an engine.
        self._log = log if processes.first else log.with_suffix(f".{processes.rank}.log")
        self._settings: EngineSettings | None = None
        self._caches = machine_folder(Path(tempfile.gettempdir()))
        self._folders = [self._caches]

    def make_room(self, needed: int) -> None:
        """Choose the folder through which policies of `needed` bytes are handed over, in memory if it has room.

        Every process must call this. UserError says that no folder of this machine has room.
        """
        if needed <= self._room:
            return
        made = []
        if self._processes.first:
            folders = [*([MEMORY] if os.access(MEMORY, os.W_OK) else []), Path(tempfile.gettempdir())]
            free = {folder: shutil.disk_usage(folder).free for folder in folders}
            parent = next((folder for folder, space in free.items() if space >= needed), None)
            if parent is None:
                there = " and ".join(f"{amount(space, 'B')} in {folder}" for folder, space in free.items())
                raise UserError(
                    f"the policies of this job need {amount(needed, 'B')} to be handed over to vLLM, and there are "
                    f"{there} free; make room, in a container by a larger /dev/shm (docker run --shm-size), let TMPDIR "
                    "name a larger folder of this machine, or set execution.sampler to own"
                )
            made = [machine_folder(parent)]
        [self._folder] = self._processes.gather_objects(made)[0]
        self._folders, self._room = [*self._folders, *made], needed

    def __exit__(self, *error: Any) -> None:
        self._stop()
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

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
        """
        hand_over = self._hand_over_adapter if isinstance(model, PeftModel) else self._hand_over_weights
        hand_over(model, settings)
        options = {
            "max_tokens": stop.max_new_tokens,
            # The log-probability of the drawn token, and of no other.
            "logprobs": 0,
            # The stop tokens are all that end a response.
            "ignore_eos": True,
            "stop_token_ids": list(stop.tokens),
            "stop": list(stop.texts) or None,
            "detokenize": bool(stop.texts),
            "skip_special_tokens": False,
        }

        def draw_share(share: list[Request]) -> list[Response]:
            wanted: list[tuple[tuple[int, ...], int | None]] = []
            for request in share:
                seed: int | None = None
                if request.key is not None:
                    # The random numbers of a response depend on its key alone.
                    state = np.random.SeedSequence(request.key).generate_state(1, np.uint64)
                    seed = int(state[0] >> np.uint64(1))
                wanted.append((request.prompt, seed))
            answers = self.ask("sample", interrupt, requests=wanted, options=options) if share else []
            return [
                Response(np.array(tokens, np.int64), np.array(logprobs, np.float32), truncated)
                for tokens, logprobs, truncated in answers
            ]

        return sample_in_processes(requests, draw_share, self._processes)

    def _hand_over_weights(self, model: Any, settings: EngineSettings) -> None:
        """Hand over all weights in the type of the products, and a tied unembedding, which vLLM would not renew."""
        dtype, tensors = getattr(torch, settings.options["dtype"]), {}
        named = dict(model.named_parameters()) | {"lm_head.weight": model.get_output_embeddings().weight}
        # The next policy is written beside this one.
        self.make_room(2 * dtype.itemsize * sum(parameter.numel() for parameter in named.values()))
        for name, parameter in named.items():
            whole = full_tensor(parameter.detach())
            if self._processes.first:
                tensors[name] = whole.to("cpu", dtype, copy=True).contiguous()
        folder = self._folder / "model"
        if self._processes.first:
            folder.mkdir(exist_ok=True)
            untied = {"tie_word_embeddings": False, "architectures": model.config.architectures}
            (folder / "config.json").write_text(json.dumps(model.config.to_dict() | untied, default=str))
            with space_for(folder):
                save_file(tensors, folder / "model.safetensors.new", {"format": "pt"})
            os.replace(folder / "model.safetensors.new", folder / "model.safetensors")
        self._processes.wait()
        own = {"model": str(folder), "revision": None}
        if not self._start(replace(settings, options=settings.options | own)):
            self.ask("weights", folder=str(folder))
        # The next policy is written over this one, which all engines must have read.
        self._processes.wait()

    def _hand_over_adapter(self, model: Any, settings: EngineSettings) -> None:
        """Hand over the adapter in PEFT's format."""
        parameters = trained_parameters(model)
        self.make_room(sum(parameter.nbytes for parameter in parameters.values()))
        self._start(settings)
        self._handed_over += 1
        tensors = {
            name.replace(".default.", "."): full_tensor(parameter.detach()).cpu().contiguous()
            for name, parameter in parameters.items()
        }
        folder = self._folder / f"adapter-{self._handed_over}"
        if self._processes.first:
            config, modules = model.active_peft_config, sorted({name.rsplit(".", 3)[-3] for name in tensors})
            folder.mkdir()
            about = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": config.r, "lora_alpha": config.lora_alpha}
            (folder / "adapter_config.json").write_text(json.dumps(about | {"target_modules": modules}))
            with space_for(folder):
                save_file(tensors, folder / "adapter_model.safetensors")
        self._processes.wait()
        self.ask("adapter", number=self._handed_over, folder=str(folder))
        self._processes.wait()
        if self._processes.first:
            shutil.rmtree(folder)

    def _start(self, settings: EngineSettings) -> bool:
        """Start the process unless there is one with these settings; return whether it was started."""
        if settings == self._settings:
            return False
        self._stop()
        # This process's place among those of the job is not the engine's.
        distributed = ("TORCHELASTIC_", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "OMP_", "RANK", "WORLD_SIZE")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(distributed)}
        # Models of the hub are fetched by a job of their own.
        environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        environment |= vllm_environment(settings.device is None, self._caches)
        if settings.device is None:
            environment["OMP_NUM_THREADS"] = str(settings.threads)
        else:
            visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
            environment["CUDA_VISIBLE_DEVICES"] = visible[settings.device] if visible else str(settings.device)
        ours, theirs = socket.socketpair()
        folders = [str(self._folder), str(self._caches)]
        start = json.dumps({"trainer": os.getpid(), "folders": folders, "options": settings.options})
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "lorabench.training.rl.engine_worker", str(theirs.fileno()), start],
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        theirs.close()
        self._connection, self._settings = Connection(ours.detach()), settings
        try:
            self.ask(None)
        except BaseException:
            self._stop()
            raise
        return True

    def _stop(self) -> None:
        """End the process if there is one; it holds nothing that would have to be saved."""
        if self._settings is not None:
            self._process.kill()
            self._process.wait()
            self._connection.close()
            self._settings = None

    def ask(self, name: str | None, interrupt: Callable[[], None] = lambda: None, **arguments: Any) -> Any:
        """Call a method of the worker's `_Engine`, and return its answer; UserError if the engine failed or has ended.

        Without a name this only awaits the answer that the engine has started. `interrupt` is called meanwhile.
        """
        try:
            if name is not None:
                self._connection.send_bytes(json.dumps({"do": name, "with": arguments}).encode())
            while not self._connection.poll(0.2):
                interrupt()
            answer = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError) as error:
            try:
                status = self._process.wait(20)
                end = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            except subprocess.TimeoutExpired:
                end = "does not answer any more"
            raise UserError(
                f"the process of vLLM, which draws the responses (execution.sampler), {end}; start the same command "
                f"again, and its runs go on from their checkpoints; its log is {self._log}"
            ) from error
        if "error" in answer:
            hint = "; the GPU may be in a compute mode in which it takes one process (nvidia-smi -c 0 changes it)"
            raise UserError(
                f"vLLM, which draws the responses (execution.sampler), failed: {answer['error']}"
                f"{hint if 'busy or unavailable' in answer['error'] else ''}; its log is {self._log}"
            )
        return answer["result"]

"""Sampling by vLLM, in a process of its own (`engine_worker.py`).

Before each batch of responses, the present policy is handed over to the engine through files. LoRA stays unmerged: the
adapter gets a fresh name each time, since the engine keeps keys and values by that name. In full fine-tuning the engine
reads all weights again.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
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
from lorabench.models.vllm_support import max_lora_rank, vllm_environment
from lorabench.planning.memory import engine_batch, engine_memory
from lorabench.training.context import SweepContext
from lorabench.training.distributed import Processes, full_tensor
from lorabench.training.rl.sampler import Request, Response, Stop, sample_in_processes
from lorabench.utils.exhaustion import space_for


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is started with: the arguments of vLLM's `LLM`, its GPU among the visible ones, its threads."""

    options: dict[str, Any]
    device: int | None
    """None for a CPU."""
    threads: int


def engine_settings(context: SweepContext, longest: int, tokenizes: bool) -> EngineSettings:
    """Return the settings of the engine of a sweep, whose longest prompt with its response has `longest` tokens.

    With `tokenizes` a text may end a response, for which the engine needs the tokenizer.
    """
    machine, condition, preset = context.machine, context.sweep.condition, context.plan.preset
    spec, device = context.layout.model(condition.model), machine.device
    (memory, cache), batch = engine_memory(preset, condition.model, condition), engine_batch(preset, condition)
    gpu, location = None, model_location(spec)
    options: dict[str, Any] = {
        "model": location,
        "trust_remote_code": getattr(spec, "trust_remote_code", False),
        "dtype": "bfloat16" if preset.protocol.precision == "bf16" else "float32",
        "max_model_len": longest,
        "kv_cache_memory_bytes": int(cache),
        "max_num_seqs": batch.responses,
        # On a CPU vLLM can't draw by a seed after a prompt that it has computed in pieces.
        "max_num_batched_tokens": batch.tokens if device.type == "cuda" else max(batch.tokens, longest),
        "enable_chunked_prefill": device.type == "cuda",
        "skip_tokenizer_init": not tokenizes,
        # Log-probabilities of the distribution that tokens are drawn from.
        "logprobs_mode": "processed_logprobs",
        # Not the sampling settings in the model's folder.
        "generation_config": "vllm",
        "seed": 0,
        "disable_log_stats": True,
        # vLLM does not look at the share on a CPU, and compiling takes longer than it saves there.
        "gpu_memory_utilization": 0.5,
        "enforce_eager": device.type == "cpu",
    }
    if condition.rank is not None and condition.placement is not None:
        head = ("lm_head",) if preset.protocol.include_unembedding else ()
        options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": max_lora_rank(condition.rank)}
        # Layers that carry no adapter would take memory all the same.
        options["lora_target_modules"] = (*SUFFIXES[condition.placement], *head)
    if tokenizes:
        # In full fine-tuning the engine reads its weights from another folder, which has no tokenizer.
        options["tokenizer"] = location
    if isinstance(spec, HubModel):
        options |= {"revision": spec.revision, "tokenizer_revision": spec.revision}
    if device.type == "cuda":
        gpu = device.index or 0
        total = torch.cuda.get_device_properties(device).total_memory
        options["gpu_memory_utilization"] = min(0.95, memory / total)
    return EngineSettings(options, gpu, max(1, preset.execution.threads // machine.processes.count))


class PolicyEngine(AbstractContextManager["PolicyEngine"]):
    """The process in which vLLM draws from the policies of a job's runs, one run after another.

    It is started at the first draw, and again where a sweep needs other settings. Policies are handed over through a
    temporary folder of the first process, which all see. On exit the process ends and the folders are removed. What
    vLLM prints is appended to the file `log`.
    """

    def __init__(self, processes: Processes, log: Path) -> None:
        self._processes, self._handed_over = processes, 0
        # Each process of a job has an engine.
        self._log = log if processes.first else log.with_suffix(f".{processes.rank}.log")
        self._settings: EngineSettings | None = None
        self._caches = Path(tempfile.mkdtemp(prefix="lorabench-vllm-"))
        self._folder = Path(processes.gather_objects(str(self._caches))[0])

    def __exit__(self, *error: Any) -> None:
        self._stop()
        shutil.rmtree(self._caches, ignore_errors=True)

    def draw(
        self,
        model: torch.nn.Module,
        settings: EngineSettings,
        requests: list[Request],
        stop: Stop,
    ) -> list[Response]:
        """Draw a response to each request from a policy, a base model or one with an adapter.

        Every process must call this. In full fine-tuning the policy replaces the model that the settings name.
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
            wanted = []
            for request in share:
                # The random numbers of a response depend on its key alone.
                state = np.random.SeedSequence(request.key).generate_state(1, np.uint64)
                wanted.append((request.prompt, None if request.key is None else int(state[0] >> np.uint64(1))))
            answers = self.ask("sample", requests=wanted, options=options) if share else []
            return [
                Response(np.array(tokens, np.int64), np.array(logprobs, np.float32), truncated)
                for tokens, logprobs, truncated in answers
            ]

        return sample_in_processes(requests, draw_share, self._processes)

    def _hand_over_weights(self, model: Any, settings: EngineSettings) -> None:
        """Hand over all weights in the type of the products, and a tied unembedding, which vLLM would not renew."""
        dtype, tensors = getattr(torch, settings.options["dtype"]), {}
        named = dict(model.named_parameters()) | {"lm_head.weight": model.get_output_embeddings().weight}
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
        self._start(settings)
        self._handed_over += 1
        tensors = {
            name.replace(".default.", "."): full_tensor(parameter.detach()).cpu().contiguous()
            for name, parameter in trained_parameters(model).items()
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
        start = json.dumps({"trainer": os.getpid(), "folder": str(self._caches), "options": settings.options})
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

    def ask(self, name: str | None, **arguments: Any) -> Any:
        """Call a method of the worker's `_Engine`, and return its answer; UserError if the engine failed or has ended.

        Without a name this only awaits the answer that the engine has started.
        """
        try:
            if name is not None:
                self._connection.send_bytes(json.dumps({"do": name, "with": arguments}).encode())
            answer = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionError) as error:
            raise UserError(
                "the process of vLLM, which draws the responses (execution.sampler), has ended; start the same command "
                f"again, and its runs go on from their checkpoints; its log is {self._log}"
            ) from error
        if "error" in answer:
            hint = "; the GPU may be in a compute mode in which it takes one process (nvidia-smi -c 0 changes it)"
            raise UserError(
                f"vLLM, which draws the responses (execution.sampler), failed: {answer['error']}"
                f"{hint if 'busy or unavailable' in answer['error'] else ''}; its log is {self._log}"
            )
        return answer["result"]

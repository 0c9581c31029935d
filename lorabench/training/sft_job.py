"""The runs of an SFT sweep, one after another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lorabench.data.tokens import TokenizedSplit, cache_key, read_tokens
from lorabench.errors import UserError
from lorabench.models.base import load_tokenizer
from lorabench.plan import Run
from lorabench.training import stop
from lorabench.training.loss import check_packing, check_plain_head, mean_nll
from lorabench.training.sft import train_run
from lorabench.training.sweep import Job, now, provenance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train_runs(job: Job, runs: list[tuple[int, Run]]) -> None:
    """Train those runs that are not finished, given with their number in the sweep, and write each as it ends."""
    runs = job.unfinished(runs)
    if not runs:
        return
    condition, preset = job.sweep.condition, job.plan.preset
    tokenizer = load_tokenizer(job.layout.model(condition.model))
    key = cache_key(tokenizer, job.layout.dataset(condition.dataset))
    data = read_tokens(job.layout.tokens(condition.model, condition.dataset), key)
    environment = provenance(job) | {f"{name}_sha256": value for name, value in key.items()}
    adapter = "default" if condition.method == "lora" else None
    bases = _Bases(job)
    for number, run in runs:
        if job.machine.processes.any(stop.requested()):
            stop.end()
        job.announce(number, run)
        base_nll = bases.base_valid_nll(data["validation"])
        started = {"started": now()}
        with bases.ready(run) as model:
            tick = job.ticker(number, run)
            checkpoint = job.folder(run).checkpoint
            outcome = train_run(run, model, data, preset.protocol, job.machine, checkpoint, base_nll, tick)
            job.write(run, outcome, model, environment | started, adapter)
        del model  # before the next is loaded


class _Bases:
    """Base models of one job: loaded once for LoRA, which leaves them as they were; anew for each full fine-tuning.

    Where a model is sharded it is loaded anew for each run.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._model: PreTrainedModel | None = None
        self._base_nll: float | None = None

    def _pristine(self) -> PreTrainedModel:
        if self._model is None:
            self._model = self.job.load()
            check_plain_head(self._model)
            machine = self.job.machine
            # Of a model that is to be sharded, the other processes have no weights.
            if machine.packing and machine.processes.first:
                check_packing(self._model)
        return self._model

    def base_valid_nll(self, validation: TokenizedSplit) -> float:
        """Validation NLL of the untouched base; stops the job if it is worse than guessing."""
        if self._base_nll is None:
            machine = self.job.machine
            processes, autocast = machine.processes, machine.autocast(self.job.plan.preset.protocol)
            model = processes.shard(self._pristine())
            nll = mean_nll(
                model, validation, machine.max_batch_tokens, machine.device, autocast, processes, machine.packing
            )
            if processes.sharded:
                self._model = None  # LoRA goes on before a model is sharded
            uniform = math.log(model.config.vocab_size)
            if not nll < uniform + 1:
                raise UserError(
                    f"base model {self.job.sweep.condition.model} has a validation loss of {nll:.2f} nats, worse than "
                    f"guessing ({uniform:.2f}): wrong weights or tokenizer"
                )
            self._base_nll = nll
        return self._base_nll

    @contextmanager
    def ready(self, run: Run) -> Iterator[torch.nn.Module]:
        """The model that a run trains."""
        model: Any = self._pristine()
        lora, processes = run.condition.method == "lora", self.job.machine.processes
        if lora:
            model = self.job.with_lora(model, run)
        if not lora or processes.sharded:
            self._model = None
            yield processes.shard(model)
            return
        try:
            yield model
        finally:
            self._model = model.unload()
            self._model.requires_grad_(True)

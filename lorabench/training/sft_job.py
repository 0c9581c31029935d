"""The runs of an SFT sweep: in lanes as far as the plan has them together, else one after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lorabench.data.tokens import TokenizedSplit, cache_key, read_tokens
from lorabench.errors import UserError
from lorabench.models.base import load_tokenizer
from lorabench.models.full_lanes import can_stack, stack_full
from lorabench.models.lanes import Stack, alone
from lorabench.models.lora import adapter_pairs
from lorabench.models.size import Sizes
from lorabench.plan import Run
from lorabench.training import stop
from lorabench.training.lanes import train_lanes
from lorabench.training.loss import check_packing, check_plain_head, mean_nll
from lorabench.training.sft import train_run
from lorabench.training.sft_lanes import SftLanes
from lorabench.training.sweep import Group, Job, now, provenance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train_runs(job: Job, runs: list[tuple[int, Run]]) -> None:
    """Train those runs that are not finished, given with their number in the sweep, and write each as it ends."""
    groups = job.together(runs)
    if not groups:
        return
    condition, protocol, machine = job.sweep.condition, job.plan.preset.protocol, job.machine
    tokenizer = load_tokenizer(job.layout.model(condition.model))
    key = cache_key(tokenizer, job.layout.dataset(condition.dataset))
    data = read_tokens(job.layout.tokens(condition.model, condition.dataset), key)
    environment = provenance(job) | {f"{name}_sha256": value for name, value in key.items()}
    bases = _Bases(job)
    for group in bases.dealt(groups):
        if machine.processes.any(stop.requested()):
            stop.end()
        for number, run in group.values():
            job.announce(number, run)
        base_nll = bases.base_valid_nll(data["validation"])
        together = [run for _, run in group.values()]
        started = {"started": now()}
        with bases.ready(together) as (stack, sizes):
            config: Any = stack.model.config
            checkpoints = job.checkpoints(together)
            lanes = {
                name: train_run(
                    run,
                    stack.lanes[name],
                    config.vocab_size,
                    data,
                    protocol,
                    machine.processes,
                    checkpoints,
                    base_nll,
                    job.ticker(number, run),
                )
                for name, (number, run) in group.items()
            }
            for name, outcome in train_lanes(lanes, SftLanes(stack, data, machine, machine.autocast(protocol))):
                job.write(group[name][1], outcome, stack, sizes, environment | started)
                checkpoints.ended(name)
                stack.drop(name)
        del stack, lanes  # before the next model is loaded


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

    def dealt(self, groups: list[Group]) -> list[Group]:
        """The groups, each run by itself where the model's weights can't be stacked."""
        if self.job.sweep.condition.method == "lora" or max(map(len, groups)) == 1 or can_stack(self._pristine()):
            return groups
        return [{name: run} for group in groups for name, run in group.items()]

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
    def ready(self, runs: Sequence[Run]) -> Iterator[tuple[Stack, Sizes]]:
        """The model that these runs train, a lane each, named by run_id; and its sizes."""
        model, processes, names = self._pristine(), self.job.machine.processes, [run.run_id for run in runs]
        if runs[0].condition.method == "fullft":
            self._model = None
            sizes = Sizes.of(model)
            yield stack_full(model, names) if len(names) > 1 else alone(processes.shard(model), names[0]), sizes
            return
        adapted = self.job.with_lora(model, runs)
        sizes = Sizes.of(adapted)
        if processes.sharded:
            self._model = None
            adapted = processes.shard(adapted)
            yield alone(adapted, names[0], names[0], adapter_pairs(adapted, names[0])), sizes
            return
        try:
            yield self.job.stacked(adapted, runs), sizes
        finally:
            self._model = adapted.unload()
            self._model.requires_grad_(True)

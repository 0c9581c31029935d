"""Training of SFT sweeps: runs that the plan groups are trained together as lanes, groups one after another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lorabench.data.chat import Split
from lorabench.data.tokens import TokenizedSplit, cache_key, read_tokens
from lorabench.errors import UserError
from lorabench.models.base import load_tokenizer
from lorabench.models.lanes.full import can_stack_full, stack_full
from lorabench.models.lanes.shelf import Stack, single_lane
from lorabench.models.lora import adapter_pairs
from lorabench.models.size import Sizes
from lorabench.runs import Run
from lorabench.training.drive import train_lanes
from lorabench.training.loss import check_packing, check_plain_head, mean_nll
from lorabench.training.sft.loop import train_sft
from lorabench.training.sft.serve import SftServer
from lorabench.training.sweep import RunGroup, SweepContext, now, provenance

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class SftTrainer:
    """Trains the runs of a job's sweeps.

    The sweeps share one model and one dataset, which are read once; the base model is evaluated once.
    """

    def __init__(self) -> None:
        self._bases = _Bases()
        self._data: dict[Split, TokenizedSplit] | None = None
        self._environment: dict[str, Any] = {}

    def __call__(self, context: SweepContext, runs: list[tuple[int, Run]]) -> None:
        """Train the unfinished ones of some runs, given with their number in the sweep, and write each as it ends."""
        groups = context.unfinished_groups(runs)
        if not groups:
            return
        protocol, machine, bases = context.plan.preset.protocol, context.machine, self._bases
        data = self._read(context)
        for group in bases.stackable(context, groups):
            context.begin()
            for number, run in group.values():
                context.announce(number, run)
            base_nll = bases.base_valid_nll(context, data["validation"])
            together = [run for _, run in group.values()]
            started = {"started": now()}
            with bases.ready(context, together) as (stack, sizes):
                config: Any = stack.model.config
                checkpoints = context.checkpoints(together)
                lanes = {
                    name: train_sft(
                        run,
                        stack.lanes[name],
                        config.vocab_size,
                        data,
                        protocol,
                        machine.processes,
                        checkpoints,
                        base_nll,
                        context.ticker(number, run),
                    )
                    for name, (number, run) in group.items()
                }
                for name, outcome in train_lanes(lanes, SftServer(stack, data, machine, machine.autocast(protocol))):
                    context.write(group[name][1], outcome, stack, sizes, self._environment | started)
                    checkpoints.ended(name)
                    stack.drop(name)
            # Free the memory before the next model is loaded.
            del stack, lanes

    def _read(self, context: SweepContext) -> dict[Split, TokenizedSplit]:
        if self._data is None:
            condition = context.sweep.condition
            tokenizer = load_tokenizer(context.layout.model(condition.model))
            key = cache_key(tokenizer, context.layout.dataset(condition.dataset))
            self._data = read_tokens(context.layout.tokens(condition.model, condition.dataset), key)
            self._environment = provenance(context) | {f"{name}_sha256": value for name, value in key.items()}
        return self._data


class _Bases:
    """The base model of a job's sweeps and its validation NLL.

    The model is loaded once for LoRA, which does not change it, and again after each full fine-tuning. A model that is
    sharded is loaded again for each run.
    """

    def __init__(self) -> None:
        self._model: PreTrainedModel | None = None
        self._base_nll: float | None = None

    def _pristine(self, context: SweepContext) -> PreTrainedModel:
        if self._model is None:
            self._model = context.load()
            check_plain_head(self._model)
            # Before a model is sharded the other processes have no weights to check.
            if context.machine.packing and context.machine.processes.first:
                check_packing(self._model)
        return self._model

    def stackable(self, context: SweepContext, groups: list[RunGroup]) -> list[RunGroup]:
        """Return the groups, split into single runs if the model's weights cannot be stacked."""
        if (
            context.sweep.condition.method == "lora"
            or max(map(len, groups)) == 1
            or can_stack_full(self._pristine(context))
        ):
            return groups
        return [{name: run} for group in groups for name, run in group.items()]

    def base_valid_nll(self, context: SweepContext, validation: TokenizedSplit) -> float:
        """Return the validation NLL of the base model in nats per scored token.

        Raises:
            UserError: the NLL is more than 1 nat above that of a uniform guess.
        """
        if self._base_nll is None:
            machine = context.machine
            processes, autocast = machine.processes, machine.autocast(context.plan.preset.protocol)
            model = processes.shard(self._pristine(context))
            nll = mean_nll(
                model, validation, machine.max_batch_tokens, machine.device, autocast, processes, machine.packing
            )
            if processes.sharded:
                # LoRA must be added before a model is sharded, so the next run loads the model again.
                self._model = None
            uniform = math.log(model.config.vocab_size)
            if not nll < uniform + 1:
                raise UserError(
                    f"base model {context.sweep.condition.model} has a validation loss of {nll:.2f} nats, worse than "
                    f"guessing ({uniform:.2f}): wrong weights or tokenizer"
                )
            self._base_nll = nll
        return self._base_nll

    @contextmanager
    def ready(self, context: SweepContext, runs: Sequence[Run]) -> Iterator[tuple[Stack, Sizes]]:
        """Provide the stack that has a lane for each run, named by run_id, and the model's sizes."""
        model, processes, names = self._pristine(context), context.machine.processes, [run.run_id for run in runs]
        if runs[0].condition.method == "fullft":
            self._model = None
            sizes = Sizes.of(model)
            yield stack_full(model, names) if len(names) > 1 else single_lane(processes.shard(model), names[0]), sizes
            return
        adapted = context.with_lora(model, runs)
        sizes = Sizes.of(adapted)
        if processes.sharded:
            self._model = None
            adapted = processes.shard(adapted)
            yield single_lane(adapted, names[0], names[0], adapter_pairs(adapted, names[0])), sizes
            return
        try:
            yield context.stacked(adapted, runs), sizes
        finally:
            self._model = adapted.unload()
            self._model.requires_grad_(True)

"""The job of a sweep: train its runs in one process, skip what is finished, keep what was done.

The grid first, with the first seed; then the other seeds at the LR whose validation loss was lowest.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from lorabench.config import FactsDataset
from lorabench.data.tokens import TokenizedSplit, cache_key, read_tokens
from lorabench.errors import UserError
from lorabench.layout import Layout
from lorabench.models.base import load_model, load_tokenizer, weights_sha256
from lorabench.models.lora import add_lora
from lorabench.models.size import base_parameters, train_flops_per_token
from lorabench.plan import Plan, Run, Sweep
from lorabench.progress import Progress
from lorabench.records import RunFolder, write_json
from lorabench.tables import best_lr, write_curves, write_sweep
from lorabench.training.checkpoint import trainable
from lorabench.training.loss import check_plain_head, mean_nll
from lorabench.training.provenance import code_state, machine_state, peak_memory_bytes
from lorabench.training.sft import Machine, Outcome, train_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def this_machine(plan: Plan) -> Machine:
    """The GPU if there is one, else the CPU with the preset's number of threads."""
    execution = plan.preset.execution
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(execution.threads)
    return Machine(device, execution.max_batch_tokens, execution.checkpoint_minutes * 60)


def run_sweep(plan: Plan, sweep: Sweep, layout: Layout, say: Callable[[str], None]) -> None:
    """Train all runs of a sweep and write its parquet.

    Args:
        say: takes one line of progress for a person.
    """
    condition, preset = sweep.condition, plan.preset
    model_spec = preset.models[condition.model]
    machine = this_machine(plan)
    tokenizer = load_tokenizer(model_spec)
    dataset = layout.dataset(condition.dataset)
    key = cache_key(tokenizer, dataset)
    data = read_tokens(layout.tokens(condition.model, condition.dataset), key)
    environment = {
        **machine_state(machine.device),
        **code_state(layout.patches),
        "model_sha256": weights_sha256(model_spec),
        "dataset_sha256": key["dataset"],
        "tokenizer_sha256": key["tokenizer"],
        "template_sha256": key["template"],
    }
    progress = Progress(layout.progress(sweep), sweep)
    bases = _Bases(plan, sweep, machine)

    def folder(run: Run) -> RunFolder:
        return RunFolder(layout.runs, run.run_id)

    def finish(run: Run, number: int) -> None:
        if not folder(run).done():
            say(f"run {number}/{sweep.n_runs}: lr {run.lr:g}, seed {run.seed}")
            base_nll = bases.base_valid_nll(data["validation"])
            started = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
            with bases.ready(run) as model:
                outcome = train_run(
                    run,
                    model,
                    data,
                    preset.protocol,
                    machine,
                    folder(run).checkpoint,
                    base_nll,
                    lambda step: progress.tick(number, run, step),
                )
                _write_run(plan, run, outcome, model, folder(run), environment | started, machine)
        record = folder(run).read_record()
        test = record["outcome"]["final_test_nll"]
        result = f"diverged at step {record['outcome']['diverged_at']}" if test is None else f"test {test:.4f} nats"
        say(f"run {number}/{sweep.n_runs}: lr {run.lr:g}, seed {run.seed}: {result}")

    # The grid of the first seed picks the LR; what is repeated anyway comes with it.
    grid = sweep.grid()
    for number, run in enumerate(grid, 1):
        finish(run, number)
    best = best_lr([folder(run).read_record() for run in grid if run.seed == 0])
    repeats = sweep.repeats(best) if best is not None else []
    for number, run in enumerate(repeats, len(grid) + 1):
        finish(run, number)
    if preset.execution.keep_weights == "best":
        for run in grid:
            if run.lr != best:
                shutil.rmtree(folder(run).weights, ignore_errors=True)
    write_sweep([folder(run) for run in (*grid, *repeats)], sweep, layout.sweep(sweep))
    progress.close()


class _Bases:
    """Base models of one job: loaded once for LoRA, which leaves them as they were; anew for each full fine-tuning."""

    def __init__(self, plan: Plan, sweep: Sweep, machine: Machine) -> None:
        self.plan, self.sweep, self.machine = plan, sweep, machine
        self.spec = plan.preset.models[sweep.condition.model]
        self._model: PreTrainedModel | None = None
        self._base_nll: float | None = None

    def _pristine(self) -> PreTrainedModel:
        if self._model is None:
            self._model = load_model(self.spec).to(self.machine.device)
            check_plain_head(self._model)
        return self._model

    def base_valid_nll(self, validation: TokenizedSplit) -> float:
        """Validation NLL of the untouched base; stops the job if it is worse than guessing."""
        if self._base_nll is None:
            model = self._pristine()
            autocast = self.machine.autocast(self.plan.preset.protocol)
            nll = mean_nll(model, validation, self.machine.max_batch_tokens, self.machine.device, autocast)
            uniform = math.log(model.config.vocab_size)
            if not nll < uniform + 1:
                raise UserError(
                    f"base model {self.sweep.condition.model} has a validation loss of {nll:.2f} nats, worse than "
                    f"guessing ({uniform:.2f}): wrong weights or tokenizer"
                )
            self._base_nll = nll
        return self._base_nll

    @contextmanager
    def ready(self, run: Run) -> Iterator[torch.nn.Module]:
        """The model that a run trains."""
        condition, model = run.condition, self._pristine()
        if condition.method == "fullft":
            self._model = None
            yield model
            return
        assert condition.rank
        assert condition.placement
        assert condition.alpha
        head = self.plan.preset.protocol.include_unembedding
        peft_model = add_lora(
            model, condition.rank, condition.placement, condition.alpha, head, run.seed, condition.init_a or 1.0
        )
        try:
            yield peft_model
        finally:
            self._model = peft_model.unload()
            self._model.requires_grad_(True)


def _write_run(
    plan: Plan,
    run: Run,
    outcome: Outcome,
    model: torch.nn.Module,
    folder: RunFolder,
    environment: dict[str, Any],
    machine: Machine,
) -> None:
    """Write a finished run's record, curves and weights, whole or not at all."""
    condition = run.condition
    parameters = base_parameters(model)
    config: Any = model.config
    trained = sum(parameter.numel() for parameter in trainable(model).values())
    dataset = plan.preset.datasets[condition.dataset]
    record = {
        "run_id": run.run_id,
        "spec": {
            **asdict(condition),
            "lr": run.lr,
            "seed": run.seed,
            "protocol": plan.preset.protocol.model_dump(),
        },
        "outcome": {
            **{key: value for key, value in asdict(outcome).items() if key != "curve"},
            "trainable_params": trained,
            "base_params": parameters,
            "family": config.model_type,
            "hidden_size": config.hidden_size,
            "entropy_bits": dataset.entropy_bits if isinstance(dataset, FactsDataset) else None,
            "train_flops": train_flops_per_token(model) * outcome.train_tokens,
            "peak_mem_bytes": peak_memory_bytes(machine.device),
        },
        "environment": environment,
    }
    with folder.finishing() as staging:
        staged = RunFolder(staging.parent, staging.name)
        write_curves(run.run_id, outcome.curve, staged.curves)
        if outcome.status == "done":
            # An adapter holds the adapter alone: PEFT would add a copy of the unembedding it sits on.
            options = {"save_embedding_layers": False} if condition.method == "lora" else {}
            model.save_pretrained(staged.weights, **options)  # type: ignore[operator]
        write_json(record, staged.record)

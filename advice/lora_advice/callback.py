"""A callback for the trainers of transformers and TRL: it audits a run, and adds its row to a table.

    from lora_advice.callback import AuditCallback

    trainer = SFTTrainer(..., callbacks=[AuditCallback("runs", dataset="owner/data")])

After some runs of both methods, `lorabench claims --tables runs --out verdicts` judges the table. Each adapter that a
checkpoint saves gets its card (`card.py`). The main process alone prints and writes; the findings also go to the logger
`lora_advice`.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

from lora_advice.adapter_config import NAME as ADAPTER
from lora_advice.audit import check_run
from lora_advice.audit.config import Task
from lora_advice.audit.loaded import LoadedRun, loaded_run
from lora_advice.audit.output import Report
from lora_advice.card import write_card
from lora_advice.errors import UserError
from lora_advice.finding import Level
from lora_advice.runs_table import add_row, check_table

try:
    from accelerate.state import AcceleratorState
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "lora_advice.callback needs transformers and accelerate: pip install transformers[torch]"
    ) from error

_LOG = logging.getLogger("lora_advice")
# Without logging of its own, a program would write to stderr what is printed already.
_LOG.addHandler(logging.NullHandler())
_LEVELS: dict[Level, int] = {"error": logging.ERROR, "warning": logging.WARNING, "note": logging.INFO}

_HELD_OUT = re.compile(r"(?:eval|validation|valid|val|dev|test)_(?:.+_)?loss")
_Series = Mapping[str, Mapping[int, float]]  # the values of each metric by the number of steps before


class AuditCallback(TrainerCallback):  # type: ignore[misc]
    """Says at the start what is wrong in a run's real settings, and adds it to the table of a folder at the end.

    In between it writes the card of each adapter that is saved.

    The last evaluation is the test, also one after training. Of two evaluation sets the one with `test` in its name is
    the test, and the other one the validation. A row with the same settings and seed is replaced.
    """

    def __init__(self, runs: str | Path | None = None, dataset: str | None = None, task: Task | None = None) -> None:
        """Take the folder of the table, or None to audit alone; the name of the data, which the table needs; the task.

        Without a task the class of the trainer's arguments says it; those of transformers count as supervised
        fine-tuning. UserError says that an argument is wrong.
        """
        if runs is not None and not dataset:
            raise UserError("AuditCallback: the table of runs needs a name of the data: dataset=...")
        if task is not None and task not in get_args(Task):
            raise UserError(f"AuditCallback: task {task!r}: allowed: {', '.join(get_args(Task))}")
        self._folder, self._dataset, self._task = None if runs is None else Path(runs), dataset, task
        self._run: LoadedRun | None = None
        self._ended = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Audit the run; raises UserError if its row can't be written at the end."""
        self._run, self._ended = None, False
        if not state.is_world_process_zero:
            return
        kind = str(getattr(AcceleratorState().distributed_type, "value", ""))
        sharded = kind if kind in ("DEEPSPEED", "FSDP") else ""
        try:
            run = loaded_run(args, state, kwargs["model"], kwargs.get("optimizer"), self._task, sharded)
        except UserError as error:
            self._say(logging.WARNING, f"{args.output_dir} is not audited: {error}")
            return
        findings = check_run(run.config, model=run.model)
        for finding in findings:
            said = f"{finding.code}: {finding.message} [{finding.source}; {finding.sure}]"
            _LOG.log(_LEVELS[finding.level], "%s: %s", run.config.path, said)
        counts = {level: sum(finding.level == level for finding in findings) for level in _LEVELS}
        # Of a trainer, nothing that it uses is a default that nobody has seen.
        seen = replace(run.config, lines=dict.fromkeys(("lr", "rank", "alpha"), 0))
        print(*Report([seen], findings, [], counts).lines(show_all=True), sep="\n")
        if self._folder is not None:
            if reason := _not_judged(run):
                self._say(logging.WARNING, f"no row of this run will be added to {self._folder}/runs.csv: {reason}")
                return
            check_table(self._folder)
        self._run = run

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write how an adapter was trained into the card of its checkpoint."""
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and (folder / ADAPTER).is_file():
            try:
                write_card(folder)
            except Exception as error:
                self._say(logging.ERROR, f"{folder} has no card: {error!r}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the row of the run."""
        self._ended = True
        self._add_row(args, state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Renew the row if the evaluation follows training."""
        if self._ended:
            self._add_row(args, state)

    def _add_row(self, args: Any, state: Any) -> None:
        if self._folder is None or self._run is None:
            return
        try:
            row = _row(self._run, str(self._dataset), args, state)
            done = "renewed in" if add_row(self._folder, row) else "added to"
            self._say(logging.INFO, f"the row {row['run_id']} of this run is {done} {self._folder}/runs.csv")
        except Exception as error:
            # What was trained is saved after this, and must not be lost for a row.
            why = error if isinstance(error, UserError) else repr(error)
            self._say(logging.ERROR, f"no row of this run is added to {self._folder}/runs.csv: {why}")

    @staticmethod
    def _say(level: int, sentence: str) -> None:
        _LOG.log(level, sentence)
        print(sentence)


def _not_judged(run: LoadedRun) -> str | None:
    """Return why no claim is about a run, or None."""
    config = run.config
    variants = {*config.variants} - {"rslora", "lora_plus"}
    if config.task not in ("sft", "rl"):
        return f"claims are about supervised fine-tuning and reinforcement learning, and this is {config.task}"
    if config.model is None:
        return "the model has no name, model.config.name_or_path"
    if config.method is None:
        return "some weights are frozen, without LoRA"
    if config.lr is None:
        return "parts of the model have learning rates of their own"
    if not run.uniform:
        return "rank or alpha differs between layers"
    if len(variants) > 1 or (config.variant and not variants & {"pissa", "olora"}):
        return f"claims are about no such variant of LoRA: {' and '.join(sorted({*variants, config.variant or ''}))}"
    return None


def _row(run: LoadedRun, dataset: str, args: Any, state: Any) -> dict[str, object]:
    """Return a finished run as a row of the table, or raise UserError if it has no result."""
    if state.global_step < state.max_steps:
        raise UserError(f"it ended after {state.global_step} of {state.max_steps} steps")
    config, model = run.config, run.model
    is_lora, variants = config.method == "lora", {*config.variants} - {"rslora", "lora_plus"}
    settings = {
        "model": config.model,
        "dataset": dataset,
        "task": config.task,
        "method": next(iter(variants), config.method),
        "rank": config.rank,
        "placement": run.placement,
        "alpha": config.alpha,
        "lr_ratio": (config.lr_ratio or 1.0) if is_lora else None,
        "alpha_convention": ("alpha/sqrt(r)" if config.rslora else "alpha/r") if is_lora else None,
        "unembedding": run.unembedding,
        "precision": run.precision,
        "schedule": config.schedule,
        "eps": args.adam_epsilon,
        "lr": config.lr,
        "batch_size": config.batch_size,
        "steps": state.max_steps,
        "seed": args.seed,
        "group_size": config.group_size,
        "max_new_tokens": getattr(args, "max_completion_length", None) if config.task == "rl" else None,
    }
    history: dict[str, dict[int, float]] = {}
    for logged in state.log_history:
        for name, value in logged.items():
            if isinstance(value, int | float):
                history.setdefault(name, {})[logged["step"]] = float(value)
    results = _rewards(history) if config.task == "rl" else _losses(history)
    norms = history.get("grad_norm", {0: 0.0})
    last = [norms[max(norms)], *(value for value in results.values() if value is not None)]
    diverged = not all(map(math.isfinite, last))
    return {
        "run_id": sha256(repr([*settings.items()]).encode()).hexdigest()[:12],
        **settings,
        "status": "diverged" if diverged else "done",
        **{name: value if value is not None and math.isfinite(value) else None for name, value in results.items()},
        "family": model.family if model else None,
        "hidden_size": model.width if model else None,
        "trainable_params": run.trained,
        "base_params": model.parameters if model else None,
    }


def _losses(history: _Series) -> dict[str, float | None]:
    """Return the last losses on the test and validation set, or of training where nothing was evaluated."""
    held_out = {name: series[max(series)] for name, series in history.items() if _HELD_OUT.fullmatch(name)}
    tests = [name for name in held_out if "test" in name] if len(held_out) == 2 else [*held_out]
    if len(tests) > 1 or (held_out and not tests):
        raise UserError(f"which of its losses is the test is not known: {', '.join(held_out)}")
    if tests:
        valid = next((value for name, value in held_out.items() if name not in tests), None)
        return {"final_valid_nll": valid, "final_test_nll": held_out[tests[0]]}
    if "loss" not in history:
        raise UserError("it logged no loss: set eval_strategy or logging_steps")
    return {"final_train_nll": _end(history["loss"])}


def _rewards(history: _Series) -> dict[str, float | None]:
    """Return the accuracies of the base and at the end, by the mean reward on the evaluation set, and what RL logs."""
    rewards = history.get("eval_reward", {})
    if not rewards or not all(0 <= reward <= 1 for reward in rewards.values()):
        raise UserError("it has no rewards from 0 to 1 on an evaluation set, which stand for accuracies")
    final = rewards[max(rewards)]
    return {
        "base_reward": rewards.get(0),
        "final_valid_reward": final,
        "final_reward": final,
        "final_entropy": _end(history.get("entropy", {})),
        "final_truncated": _end(history.get("completions/clipped_ratio", {})),
        # The mean response has so many tokens at least.
        "response_tokens": min(history.get("completions/mean_length", {}).values(), default=None),
    }


def _end(series: Mapping[int, float]) -> float | None:
    """Return the mean over the last tenth of the logged values; None if there are none."""
    values: Sequence[float] = [series[step] for step in sorted(series)[-math.ceil(len(series) / 10) :]]
    return sum(values) / len(values) if values else None

"""Steps of RL by one trainer in its own process: `python -m benchmarks.speed.rl_step SETTINGS.json`.

The program writes the seconds from the end of each step to the end of the next (sampling, grading and learning) and the
rewards.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from lorabench.config.loading import load_preset
from lorabench.data.grading import Grader
from lorabench.data.problems import read_problems
from lorabench.models.base import load_model, load_tokenizer
from lorabench.models.lora import add_lora
from lorabench.planning.plan import Plan, make_plan
from lorabench.store.layout import Layout

StepTimes = tuple[list[float], list[float]]
"""The time at which each step ended, and its mean reward."""


def lorabench_steps(plan: Plan, layout: Layout) -> StepTimes:
    """Train the run as a job does."""
    from lorabench.training.context import SweepContext
    from lorabench.training.rl.trainer import RlTrainer
    from lorabench.training.run import machine_of

    [sweep], ends = plan.sweeps, []
    [run] = sweep.grid()
    context = SweepContext(plan, sweep, layout, machine_of(plan))
    with RlTrainer() as train:
        train(context, run, lambda step: ends.append(time.perf_counter()))
    curves = pd.read_parquet(context.folder(run).curves)
    rewards = curves[(curves["split"] == "train") & (curves["metric"] == "reward")]
    # The last step is evaluated before it ends.
    return ends[:-1], rewards.sort_values("step")["value"].tolist()[:-1]


def trl_steps(plan: Plan, layout: Layout) -> StepTimes:
    """Train the run by TRL's GRPO with settings that give the paper's objective.

    There is no KL term, no division by the standard deviation and no clipping; one update per batch, temperature 1.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    [sweep] = plan.sweeps
    run, preset = sweep.grid()[0], plan.preset
    condition, protocol = run.condition, preset.protocol
    rollouts = condition.rollouts
    assert rollouts
    assert condition.rank
    assert condition.placement
    assert condition.alpha
    spec = preset.models[condition.model]
    torch.set_num_threads(preset.execution.threads)
    model = add_lora(
        load_model(spec),
        condition.rank,
        condition.placement,
        condition.alpha,
        protocol.include_unembedding,
        run.seed,
    )
    problems = [row for row in read_problems(layout.dataset(condition.dataset)) if row["split"] == "train"]
    chats = [[{"role": "user", "content": row["question"]}] for row in problems]
    answers = [row["answer"] for row in problems]
    grader, rewards, ends = Grader(preset.problems[condition.dataset].grader), [], []

    def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        right = grader.grade([completion[0]["content"] for completion in completions], answer)
        rewards.append(statistics.mean(right))
        return [float(is_right) for is_right in right]

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    config = GRPOConfig(
        output_dir=str(layout.root / "grpo"),
        max_steps=condition.steps,
        per_device_train_batch_size=condition.batch_size,
        num_generations=rollouts.group_size,
        max_completion_length=rollouts.max_new_tokens,
        temperature=1.0,
        beta=0.0,
        epsilon=1e6,
        scale_rewards="none",
        loss_type="dr_grpo",
        num_iterations=1,
        learning_rate=run.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=protocol.betas[0],
        adam_beta2=protocol.betas[1],
        weight_decay=protocol.weight_decay,
        max_grad_norm=0.0,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,  # TRL's default is True.
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"prompt": chats, "answer": answers})
    GRPOTrainer(model, reward, config, rows, processing_class=load_tokenizer(spec), callbacks=[Ends()]).train()
    return ends, rewards


def main(path: Path) -> None:
    """Train the steps and write the measurements."""
    settings = json.loads(path.read_text())
    layout = Layout("speed", load_preset(settings["preset"]))
    by = {"lorabench": lorabench_steps, "trl": trl_steps}[settings["trainer"]]
    ends, rewards = by(make_plan(layout.preset), layout)
    seconds = [end - start for start, end in pairwise(ends)]
    Path(settings["result"]).write_text(json.dumps({"seconds": seconds, "rewards": rewards}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

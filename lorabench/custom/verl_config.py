"""The recommended settings of reinforcement learning as a folder for verl: a script, problems and a reward.

The objective is that of the paper: a policy gradient whose advantage is the reward minus the mean reward of the group.
verl calls it GRPO without the division by the standard deviation; since each response is used for one update, verl's
clipping of importance ratios changes nothing.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lorabench.config.inputs import FileProblems
from lorabench.custom.data import UserProblems
from lorabench.custom.model import UserModel
from lorabench.custom.preset import GROUP_SIZE, PROBLEMS_PER_STEP, RL_STEPS, splits
from lorabench.custom.recommend import Recommendation
from lorabench.custom.trainer_configs import check_new, shared_settings, write_lines
from lorabench.data.grading import ANY_NUMBER
from lorabench.data.problems import make_problems
from lorabench.errors import UserError
from lorabench.models.base import model_location
from lorabench.utils.files import atomic_path

_MICRO_BATCH, _PROMPT_TOKENS = 8, 1024
_REWARD = f'''"""The reward of a response: 1 if its last number is the answer, else 0."""

import re
from fractions import Fraction

NUMBER = re.compile({ANY_NUMBER.pattern!r})


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    numbers = NUMBER.findall(solution_str)
    return float(bool(numbers) and Fraction(numbers[-1].replace(",", "")) == Fraction(ground_truth.replace(",", "")))
'''
# verl grades this set of problems by the last box of a response.
_BOXED = "lighteval/MATH"


def write_verl_config(
    folder: Path,
    model: UserModel,
    recommendation: Recommendation,
    problems: UserProblems,
    template: str | None,
    full: bool,
    steps: int | None = None,
) -> str:
    """Write a new folder with a script for verl, its problems and its reward; return the command that starts it.

    Args:
        folder: the folder to write.
        model: the model.
        recommendation: the settings.
        problems: the examined problems.
        template: the `chat_template` that the model needs, as `examine_problems` returns it.
        full: whether all weights are trained, in place of LoRA.
        steps: the number of steps that the user asked for.

    Raises:
        UserError: the folder exists, or verl does not support the model.
    """
    check_new(folder, model)
    if template is not None:
        raise UserError(
            f"{model.name} has no chat template, and verl takes that of the tokenizer: save one there first"
        )
    if model.sizes.experts and not full:
        raise UserError(f"{model.name} is a mixture of experts, which get no LoRA from verl; --full trains them")
    settings = shared_settings(model, recommendation, "rl_fullft_lr" if full else "rl_lora_lr")
    _write_problems(problems, folder)
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    betas = "[{},{}]".format(*(settings[name][0] for name in ("beta1", "beta2")))
    lines: list[tuple[str, Any, str]] = [
        ("algorithm.adv_estimator", "grpo", "rewards are compared within the responses to a problem"),
        ("algorithm.norm_adv_by_std_in_grpo", False, "the paper: the advantage is the reward minus the mean"),
        (f"{actor}.loss_agg_mode", "seq-mean-token-sum", "the paper: the sum over the tokens of a response"),
        (f"{actor}.use_kl_loss", False, "the paper: no KL term"),
        (f"{actor}.entropy_coeff", 0, "nor an entropy bonus"),
        (f"{actor}.optim.lr", *settings["lr"]),
        (f"{actor}.optim.lr_scheduler_type", *settings["schedule"]),
        (f"{actor}.optim.lr_warmup_steps", *settings["warmup"]),
        (f"{actor}.optim.betas", betas, settings["beta2"][1]),
        (f"{actor}.optim.weight_decay", *settings["decay"]),
        (f"{actor}.grad_clip", 1_000_000, settings["clip"][1]),
        ("data.train_batch_size", PROBLEMS_PER_STEP, "problems a step, as in the authors' code"),
        (f"{actor}.ppo_mini_batch_size", PROBLEMS_PER_STEP, "all of them in one update"),
        (f"{rollout}.n", GROUP_SIZE, "responses to each problem, as in the authors' code"),
        ("trainer.total_training_steps", steps or min(RL_STEPS), "the learning rate is for so many"),
        ("trainer.total_epochs", 1000, "so that the number of steps decides"),
        (
            f"{actor}.ppo_micro_batch_size_per_gpu",
            _MICRO_BATCH,
            "responses at once on a GPU; raise it where memory allows",
        ),
        (f"{rollout}.log_prob_micro_batch_size_per_gpu", _MICRO_BATCH, "the same without gradients"),
        ("actor_rollout_ref.model.path", model_location(model.spec), "your model"),
        ("actor_rollout_ref.model.enable_gradient_checkpointing", *settings["checkpointing"]),
    ]
    if not full:
        lines += [
            ("actor_rollout_ref.model.lora_rank", *settings["rank"]),
            ("actor_rollout_ref.model.lora_alpha", *settings["alpha"]),
            ("actor_rollout_ref.model.target_modules", "all-linear", "the paper: attention alone is worse"),
            (f"{rollout}.load_format", "safetensors", "LoRA needs the weights of the base in vLLM"),
        ]
    lines += [
        (f"{rollout}.name", "vllm", "samples the responses"),
        (f"{rollout}.temperature", 1.0, "the policy itself"),
        (f"{rollout}.tensor_model_parallel_size", 1, "GPUs that share a model in sampling"),
        ("data.train_files", str(folder / "train.parquet"), "your problems"),
        ("data.val_files", str(folder / "test.parquet"), "held out"),
        ("data.seed", *settings["seed"]),
        ("data.max_prompt_length", _PROMPT_TOKENS, "tokens"),
        ("data.filter_overlong_prompts", True, "longer ones are left out"),
        ("data.max_response_length", problems.max_new_tokens, "tokens; what is longer is cut"),
        ("trainer.test_freq", 10, "the reward on held-out problems"),
        ("trainer.n_gpus_per_node", 1, "your GPUs"),
        ("trainer.logger", '["console"]', "prints the reward of each step"),
        ("trainer.default_local_dir", str(folder / "out"), "where the result is saved"),
        ("trainer.save_freq", steps or min(RL_STEPS), "at the end"),
    ]
    if problems.source["grader"] == "number":
        (folder / "reward.py").write_text(_REWARD, encoding="utf-8")
        lines.append(("custom_reward_function.path", str(folder / "reward.py"), "the last number of a response counts"))
    script = folder / "verl.sh"
    overrides = [f"  {shlex.quote(f'{key}={value}')}  # {reason}" for key, value, reason in lines]
    start = 'python3 -m verl.trainer.main_ppo "${overrides[@]}" "$@"'
    command = f"bash {shlex.quote(str(script))}"
    write_lines(script, "--for verl", model, full, command, ["overrides=(", *overrides, ")", start])
    return command


def _write_problems(problems: UserProblems, folder: Path) -> None:
    """Write the problems as verl reads them: `train.parquet`, and a tenth of them as `test.parquet`."""
    rows = make_problems(FileProblems.model_validate(problems.source | splits(problems.usable, 0.1)))
    source = "number" if problems.source["grader"] == "number" else _BOXED
    for name, wanted in (("train", ("train",)), ("test", ("validation", "test"))):
        table = [
            {
                "data_source": source,
                "prompt": [{"role": "user", "content": row["question"]}],
                "reward_model": {"style": "rule", "ground_truth": row["answer"]},
            }
            for row in rows
            if row["split"] in wanted
        ]
        with atomic_path(folder / f"{name}.parquet") as partial:
            pq.write_table(pa.Table.from_pylist(table), partial)

"""The callback for the trainers of transformers and TRL, in real runs of a tiny base."""

import csv
import logging
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lora_advice.audit.config import TrainingConfig
from lora_advice.audit.loaded import LoadedRun, loaded_run, task_of
from lora_advice.card import START
from lora_advice.errors import UserError

MODULES = {"attention": ["q_proj", "k_proj", "v_proj", "o_proj"], "mlp": ["gate_proj", "up_proj", "down_proj"]}


def loaded(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def settings(folder: Path, **changed: Any) -> dict[str, Any]:
    """Arguments of a run of four steps of four examples, evaluated at its ends."""
    own = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "seed": 5}
    own |= {"learning_rate": 1e-3, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 4, "use_cpu": True}
    own |= {"eval_on_start": True, "save_strategy": "no", "report_to": [], "disable_tqdm": True}
    return {"output_dir": str(folder / "run"), **own, **changed}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_lora_advice_needs_no_pytorch_and_the_callback_says_what_it_needs():
    modules = "lora_advice.cli, lora_advice.card, lora_advice.audit.loaded, lora_advice.runs_table"
    code = f"import sys; import {modules}; print(sorted({{'torch', 'transformers', 'accelerate'}} & {{*sys.modules}}))"
    code += "; sys.modules['transformers'] = None; import lora_advice.callback"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "[]\n")
    assert done.stderr.splitlines()[-1] == (
        "ImportError: lora_advice.callback needs transformers and accelerate: pip install transformers[torch]"
    )


def test_a_run_is_audited_at_its_start_and_has_its_row_at_its_end(tmp_path, base, capsys, caplog):
    import torch
    from lora_advice.callback import AuditCallback
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    ids = torch.arange(16 * 8).reshape(16, 8) * 7 % 200
    data = [{"input_ids": row, "labels": row} for row in ids]
    model = get_peft_model(loaded(base), LoraConfig(r=4, lora_alpha=32))
    callback = AuditCallback(tmp_path / "table", dataset='a, "b"')
    args = TrainingArguments(**settings(tmp_path, save_strategy="steps", save_steps=4))
    trainer = Trainer(model, args, None, data[:12], data[12:], callbacks=[callback])
    arguments = (trainer.args, replace(trainer.state, is_world_process_zero=False), trainer.control)
    for event in (callback.on_train_begin, callback.on_save, callback.on_train_end, callback.on_evaluate):
        event(*arguments, model=model, optimizer=None)
    assert (capsys.readouterr().out, list(tmp_path.glob("table"))) == ("", [])
    with caplog.at_level(logging.INFO, "lora_advice"):
        trainer.train()
    said = capsys.readouterr().out.splitlines()
    heading = f"SFT of {base} by LoRA, LR 1e-3 (linear), batch 4, 4 steps, rank 4, alpha 32, on q_proj v_proj"
    assert said.count(f"{tmp_path}/run: trl: {heading}") == 1
    [finding] = [line for line in said if "attention-only" in line]
    assert finding.startswith("  warning attention-only: LoRA is on queries and values alone")
    logged = [(record.levelname, *record.message.split(": ")[1:2]) for record in caplog.records]
    assert {("WARNING", "attention-only"), ("INFO", "short-run"), ("INFO",)} <= {*logged}
    [row] = rows(tmp_path / "table")
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert {name: value for name, value in row.items() if value} == {
        "run_id": row["run_id"], "model": str(base), "dataset": 'a, "b"', "task": "sft", "method": "lora", "rank": "4",
        "alpha": "32.0", "lr_ratio": "1.0", "alpha_convention": "alpha/r", "unembedding": "False", "precision": "fp32",
        "schedule": "linear", "eps": "1e-08", "lr": "0.001", "batch_size": "4", "steps": "4", "seed": "5",
        "status": "done", "final_test_nll": repr(losses[-1]), "family": "llama", "hidden_size": "128",
        "trainable_params": str(sum(weight.numel() for weight in model.parameters() if weight.requires_grad)),
        "base_params": str(model.get_base_model().num_parameters() - sum(
            weight.numel() for weight in model.parameters() if weight.requires_grad)),
    }  # fmt: skip
    assert said[-1] == f"the row {row['run_id']} of this run is added to {tmp_path}/table/runs.csv"
    card = (tmp_path / "run/checkpoint-4/README.md").read_text()
    assert re.search(r"^\| steps +\| 4 +\|$", card, re.MULTILINE)
    assert "attention-only" in card
    # A card that can't be written stops no run.
    (tmp_path / "run/checkpoint-4/README.md").write_text(START)
    callback.on_save(trainer.args, trainer.state, trainer.control)
    assert "checkpoint-4 has no card: " in capsys.readouterr().out
    # An evaluation after training is the last one, and so is the same run again.
    trainer.evaluate(data[:4])
    [renewed] = rows(tmp_path / "table")
    assert renewed["final_test_nll"] == repr(trainer.state.log_history[-1]["eval_loss"]) != row["final_test_nll"]
    assert "is renewed in" in capsys.readouterr().out
    # A table that can't be written stops a run before it trains, and never after.
    (tmp_path / "table/runs.csv").write_text("no table\n")
    with pytest.raises(UserError, match="is no table of runs"):
        trainer.train()
    trainer.evaluate()
    assert (tmp_path / "table/runs.csv").read_text() == "no table\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lora", "targets", "placement", "unembedding"),
    [
        ("llama-64", {"target_modules": "all-linear"}, ("all-linear",), "all", False),
        ("llama-64", {"target_modules": [*MODULES["mlp"], *MODULES["attention"], "lm_head"]},
         ("all-linear", "lm_head"), "all", True),
        ("llama-64", {"target_modules": r".*self_attn\..*"}, ("k_proj", "o_proj", "q_proj", "v_proj"), "attn", False),
        ("llama-64", {"target_modules": MODULES["mlp"]}, ("down_proj", "gate_proj", "up_proj"), "mlp", False),
        # Of two layers one has LoRA.
        ("llama-64", {"target_modules": [*MODULES["attention"], *MODULES["mlp"]], "layers_to_transform": [0]},
         ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"), None, False),
        ("moe-128", {"target_modules": MODULES["attention"]}, ("k_proj", "o_proj", "q_proj", "v_proj"), "attn", False),
        ("moe-128", {"target_modules": MODULES["attention"],
                     "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
         ("k_proj", "o_proj", "q_proj", "v_proj"), "all", False),
    ],
)  # fmt: skip
def test_layers_are_those_that_have_lora_in_the_model(tmp_path, shipped, name, lora, targets, placement, unembedding):
    from peft import LoraConfig, get_peft_model
    from transformers import TrainerState, TrainingArguments

    model = get_peft_model(loaded(shipped / name), LoraConfig(r=4, **lora))
    args = TrainingArguments(**settings(tmp_path))
    run = loaded_run(args, TrainerState(max_steps=4), model, None, None, "")
    assert (run.config.targets, run.placement, run.unembedding, run.config.lr) == (
        targets,
        placement,
        unembedding,
        1e-3,
    )
    assert run.config.target_parameters == (
        ("experts.down_proj", "experts.gate_up_proj") if "target_parameters" in lora else ()
    )
    assert run.trained == model.get_nb_trainable_parameters()[0]


def test_only_what_claims_are_about_has_a_row(tmp_path):
    from lora_advice import callback
    from transformers import TrainerState, TrainingArguments

    lora = TrainingConfig("a", "trl", task="sft", method="lora", model="m", lr=1e-3, rank=4, alpha=8.0)
    run = LoadedRun(lora, None, "all")
    assert callback._not_judged(run) is None
    for changed, reason in (
        ({"task": "preference"}, "claims are about supervised fine-tuning and reinforcement learning"),
        ({"method": None}, "some weights are frozen, without LoRA"),
        ({"model": None}, "the model has no name"),
        ({"lr": None}, "parts of the model have learning rates of their own"),
        ({"variant": "eva"}, "claims are about no such variant of LoRA: eva"),
        ({"dora": True, "bits": 4}, "claims are about no such variant of LoRA: .*dora and qlora"),
    ):
        assert re.match(reason, callback._not_judged(replace(run, config=replace(lora, **changed))))
    with pytest.raises(UserError, match="a model of transformers is needed, and this is a PosixPath"):
        loaded_run(None, None, tmp_path, None, None, "")
    for own in ({"runs": "r"}, {"task": "dpo"}):
        with pytest.raises(
            UserError, match=r"AuditCallback: (the table of runs needs a name|task 'dpo': allowed: sft)"
        ):
            callback.AuditCallback(**own)
    args = TrainingArguments(**settings(tmp_path))

    def row(*log: dict[str, float], **changed: Any) -> dict[str, object]:
        state = TrainerState(global_step=4, max_steps=4, log_history=[{"step": 4, **entry} for entry in log])
        return callback._row(replace(run, config=replace(lora, **changed)), "d", args, state)

    test, valid = {"eval_test_loss": 2.0}, {"eval_valid_loss": 1.5}
    assert row(test, valid).items() >= {"final_valid_nll": 1.5, "final_test_nll": 2.0, "status": "done"}.items()
    assert row({"loss": 3.0}, {"train_loss": 9.0})["final_train_nll"] == 3.0
    for broken in ({"eval_loss": math.nan}, {"eval_loss": 2.0, "grad_norm": math.inf}):
        assert row(broken)["status"] == "diverged"
    assert row({"eval_loss": math.nan})["final_test_nll"] is None
    assert row({"eval_loss": 2.0}, rslora=True)["alpha_convention"] == "alpha/sqrt(r)"
    assert row({"eval_loss": 2.0}, dora=True)["method"] == "dora"
    # Runs that differ in anything that is stated do not replace each other.
    changes = ({}, {"lr": 2e-3}, {"schedule": "cosine"})
    ids = {row({"eval_loss": 2.0}, **changed)["run_id"] for changed in changes}
    assert (len(ids), row({"eval_loss": 3.0})["run_id"] in ids) == (3, True)
    for log, message in (
        (
            [{"eval_a_loss": 1.0}, {"eval_b_loss": 2.0}],
            "which of its losses is the test is not known: eval_a_loss, eval",
        ),
        ([{"step": 4}], "it logged no loss: set eval_strategy or logging_steps"),
    ):
        with pytest.raises(UserError, match=message):
            row(*log)
    for log in ([], [{"reward": 0.5}], [{"eval_reward": 0.5}, {"eval_reward": 1.5}]):
        with pytest.raises(UserError, match="it has no rewards from 0 to 1 on an evaluation set"):
            row(*log, task="rl")
    with pytest.raises(UserError, match="it ended after 3 of 4 steps"):
        callback._row(run, "d", args, TrainerState(global_step=3, max_steps=4, log_history=[]))


@pytest.mark.slow
def test_trl_says_its_task_and_peft_its_learning_rates(tmp_path, base, capsys):
    from datasets import Dataset
    from lora_advice.callback import AuditCallback
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer
    from torch.optim import AdamW
    from transformers import AutoTokenizer
    from trl import DPOConfig, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = Dataset.from_dict({"text": [f"{number} plus {number}" for number in range(16)]})
    lora = LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules="all-linear")
    model = get_peft_model(loaded(base), lora)
    plus = create_loraplus_optimizer(model, AdamW, lr=2e-4, loraplus_lr_ratio=16)
    args = SFTConfig(**settings(tmp_path, max_length=16, lr_scheduler_type="constant"))
    callbacks = [AuditCallback(tmp_path, "sums")]
    data = {"train_dataset": texts, "eval_dataset": texts, "processing_class": tokenizer}
    SFTTrainer(model, args, **data, optimizers=(plus, None), callbacks=callbacks).train()
    out = capsys.readouterr().out
    assert (
        "LR 2e-4 (constant), batch 4, 4 steps, rank 4, alpha 8, on all linear layers, rsLoRA, LoRA+ with ratio 16"
        in out
    )
    SFTTrainer(str(base), args, **data, callbacks=callbacks).train()

    def short(completions: list[str], **_: Any) -> list[float]:
        return [float(len(completion) % 2) for completion in completions]

    prompts = Dataset.from_dict({"prompt": ["1 plus 1", "2 plus 2", "3 plus 3", "4 plus 4"]})
    own = {"num_generations": 2, "max_completion_length": 4, "per_device_eval_batch_size": 4, "bf16": False}
    args = GRPOConfig(**settings(tmp_path, max_steps=2, eval_steps=2, **own))
    data = {"train_dataset": prompts, "eval_dataset": prompts, "processing_class": tokenizer}
    trainer = GRPOTrainer(loaded(base), short, args, **data, peft_config=LoraConfig(r=2), callbacks=callbacks)
    trainer.train()
    plus, full, rl = rows(tmp_path)
    assert (plus["lr"], plus["lr_ratio"], plus["alpha_convention"], plus["placement"]) == (
        "0.0002", repr(3.2e-3 / 2e-4), "alpha/sqrt(r)", "all")  # fmt: skip
    assert (full["method"], full["rank"], full["schedule"], full["lr"]) == ("fullft", "", "constant", "0.001")
    rewards = [entry["eval_reward"] for entry in trainer.state.log_history if "eval_reward" in entry]
    assert (rl["task"], rl["rank"], rl["batch_size"], rl["group_size"], rl["max_new_tokens"]) == (
        "rl", "2", "4", "2", "4")  # fmt: skip
    assert (rl["base_reward"], rl["final_reward"]) == (repr(rewards[0]), repr(rewards[-1]))
    assert 0 < float(rl["response_tokens"]) <= 4
    assert (task_of(DPOConfig), task_of(type(args))) == ("preference", "rl")

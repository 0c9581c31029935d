"""Logs of other trainers become tidy tables: what they say is found, and what they do not is asked for at once."""

import json
import math
import shutil
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from lorabench.cli.commands import app
from lorabench.errors import UserError
from lorabench.models.specs import shipped_folder
from lorabench.sources.logs import LoggedRun, tidy_tables
from lorabench.sources.trackers import READERS
from lorabench.store.io import read_table

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTER = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": LAYERS, "base_model_name_or_path": "a/base"}
ADAPTER |= {"use_rslora": False, "init_lora_weights": True}


def linear(lr, steps, every=10):
    """The log of transformers: a linear schedule without warmup, logged at every few steps."""
    rows = [{"step": 0, "eval_loss": 3.0}]
    for step in range(every, steps + 1, every):
        row = {"step": step, "loss": 3 - step / steps, "learning_rate": lr * (1 - (step - 1) / steps)}
        rows += [row | {"grad_norm": 1.0}, {"step": step, "eval_loss": 3.1 - step / steps}]
    return [*rows, {"step": steps, "train_loss": 2.7, "train_runtime": 9.0}]


def write_run(folder, log, steps=40, planned=40, **files):
    """Write a run as transformers does: its state in the last checkpoint, and files beside it."""
    checkpoint = folder / f"checkpoint-{steps}"
    checkpoint.mkdir(parents=True)
    state = {"global_step": steps, "max_steps": planned, "log_history": log, "trial_params": None}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    for name, value in files.items():
        name, kind = name.rsplit("_", 1)
        (folder / f"{name}.{kind}").write_text(value if isinstance(value, str) else json.dumps(value))


CARD = """---
base_model: a/base
datasets:
- owner/data
---
- learning_rate: 0.5
- train_batch_size: 4
- seed: 7
- total_train_batch_size: 16
"""


def imported(kind, place, *said):
    return tidy_tables(READERS[kind](place), said, place)


def test_folders_of_transformers_say_most_of_what_is_needed(tmp_path):
    write_run(tmp_path / "lora", linear(1e-3, 40), README_md=CARD, adapter_config_json=ADAPTER)
    write_run(tmp_path / "lora", linear(1e-3, 30), steps=30)
    write_run(tmp_path / "full", [*linear(1e-4, 40), {"step": 40, "eval_loss": math.nan}],
              README_md=CARD, config_json={"model_type": "llama", "hidden_size": 64})  # fmt: skip
    write_run(tmp_path / "killed", linear(1e-4, 20), steps=20)
    (tmp_path / "full/training_args.bin").write_bytes(b"a pickle is never read")
    tables, notes = imported("trainer-state", tmp_path)
    full, lora = tables.runs.to_dict("records")
    common = {"model": "a/base", "dataset": "owner/data", "batch_size": 16, "seed": 7, "steps": 40, "task": "sft"}
    assert (
        lora.items()
        >= (common | {"run_id": "lora", "method": "lora", "rank": 8, "alpha": 16, "status": "done"}).items()
    )
    # A learning rate that the card rounds or mistakes is not taken from it where the log shows it.
    assert (lora["placement"], lora["alpha_convention"], lora["schedule"]) == ("all", "alpha/r", "linear")
    assert lora["final_test_nll"] == pytest.approx(2.1)
    assert full.items() >= (common | {"method": "fullft", "family": "llama", "hidden_size": 64}).items()
    assert (full["status"], pd.isna(full["rank"])) == ("diverged", True)
    curve = tables.curves[tables.curves["run_id"].eq("lora")]
    assert set(zip(curve["split"], curve["metric"], strict=True)) == {
        ("train", "nll"), ("train", "grad_norm"), ("validation", "nll")}  # fmt: skip
    first = curve[curve["split"].eq("validation")].iloc[1]
    assert (first["step"], first["examples"], first["value"]) == (10, 160, pytest.approx(2.85))
    assert "left out, since they did not reach their last step: killed" in notes


def test_the_highest_learning_rate_is_told_from_its_log(tmp_path):
    def schedule(name, shape, steps=(10, 20, 30, 40), **settings):
        lrs = {step: 3e-4 * shape(step) for step in steps}
        return LoggedRun(name, settings, {"train/learning_rate": lrs, "train/loss": {40: 2.0}, "eval/loss": {40: 2.0}})

    runs = [
        schedule("full-constant-seed1", lambda step: 1.0),
        schedule("full-linear-seed2", lambda step: 1 - step / 40),
        schedule("full-cosine-seed3", lambda step: (1 + math.cos(math.pi * (step - 1) / 40)) / 2),
        schedule("full-warm-seed4", lambda step: min(step / 20, 1.0, (44 - step) / 24), range(1, 41)),
        # Of another schedule with few points the name is believed.
        schedule("full-other-lr2e-4-s5", lambda step: step / 50, lr_scheduler_type="SchedulerType.INVERSE_SQRT"),
    ]
    said = ["model=m", "dataset=d", "batch_size=8"]
    table, notes = tidy_tables(runs, said, tmp_path)
    assert table.runs["lr"].tolist() == pytest.approx([3e-4] * 4 + [2e-4])
    assert table.runs["schedule"].tolist() == ["constant", "linear", "cosine", "unknown", "inverse_sqrt"]
    assert table.runs["seed"].tolist() == [1, 2, 3, 4, 5]
    assert "lr taken from the names of runs: full-other-lr2e-4-s5" in notes


def test_all_that_is_missing_is_asked_for_at_once(tmp_path):
    write_run(tmp_path / "a", [{"step": 40, "loss": 2.0, "eval_x_loss": 2.0, "eval_y_loss": 2.1}],
              adapter_config_json=ADAPTER | {"target_modules": ["q_proj", "up_proj"], "r": None})  # fmt: skip
    write_run(tmp_path / "full-lr1e-3", linear(1e-3, 40))
    result = CliRunner().invoke(
        app, ["import", "--from", "trainer-state", str(tmp_path), "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 2
    first, *asked = result.stderr.splitlines()
    assert "2 runs do not say all that is needed" in first
    assert [line.split("--set ")[1].partition("=")[0] for line in asked] == [
        "model", "dataset", "lr", "batch_size", "seed", "test_loss", "rank", "placement"]  # fmt: skip
    assert any(line.endswith("asked of all") for line in asked if "dataset=" in line)
    assert asked[5].endswith("asked of a; logged are eval_loss, eval_x_loss, eval_y_loss, loss, train_loss")
    for line, message in (
        ("colour=red", "--set 'colour=red': allowed: KEY=VALUE or RUN:KEY=VALUE, with a KEY such as model, dataset"),
        ("b*:lr=1", "--set 'b*:lr=1': no run of .* has this name; allowed: a, full-lr1e-3"),
    ):
        with pytest.raises(UserError, match=message.replace("*", r"\*", 1) if message[7] == "b" else message):
            imported("trainer-state", tmp_path, line)
    of_a = [f"a:{line}" for line in ("lr=2e-3", "rank=4", "placement=all", "test_loss=eval_y_loss", "dataset=d:e")]
    of_a.append("a:validation_loss=eval_x_loss")
    tables, _ = imported("trainer-state", tmp_path, "dataset=d", *of_a, "model=m", "batch_size=8", "seed=0")
    run = tables.runs.set_index("run_id").loc["a"]
    assert (run["lr"], run["rank"], run["final_valid_nll"], run["final_test_nll"]) == (2e-3, 4, 2.0, 2.1)
    assert tables.runs["dataset"].tolist() == ["d:e", "d"]


def test_what_is_no_log_is_refused_in_a_sentence(tmp_path):
    write_run(tmp_path / "a", [{"loss": 2.0}])
    table = tmp_path / "table.csv"
    table.write_text("Name,eval/loss\na,2.0\n")
    rewarded = LoggedRun("a", {}, {"train/reward": {1: 0.5}})
    for call, message in (
        (lambda: imported("trainer-state", tmp_path), r"trainer_state.json can't be read: KeyError, 'step'$"),
        (
            lambda: imported("wandb-csv", table),
            r"table.csv: has no column of optimizer steps; allowed: train/global_step",
        ),
        (lambda: imported("wandb-csv", tmp_path / "none.csv"), "none.csv can't be read: FileNotFoundError"),
        (lambda: imported("trainer-state", tmp_path / "out"), "out: holds no finished runs of this kind$"),
        (lambda: tidy_tables([rewarded], (), tmp_path), "a logs rewards; allowed: runs of supervised fine-tuning$"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            call()
        assert "\n" not in str(refused.value)


RUNS_TABLE = """Name,State,Created,Tags,learning_rate,seed,dataset_name,model_name_or_path,batch_size,\
peft_config.default.peft_type,peft_config.default.r,peft_config.default.lora_alpha,peft_config.default.target_modules,\
train/global_step,eval/loss,train/loss,train/learning_rate
lora,finished,2026-01-01,,0.001,0,d,m,8,LORA,4,32,all-linear,20,2.0,1.9,0
attn,finished,2026-01-01,,0.002,0,d,m,8,LORA,4,32,"[""q_proj"",""v_proj""]",20,2.1,1.9,0
full,finished,2026-01-01,,0.0001,0,d,m,8,,,,,20,NaN,1.9,0
going,running,2026-01-01,,0.0002,0,d,m,8,,,,,10,2.3,1.9,0
"""
CHART = """train/global_step,lora - eval/loss,lora - eval/loss__MIN,lora - eval/loss__MAX
0,3.0,3.0,3.0
10,2.5,2.5,2.5
"""
HISTORY = "_step,train/global_step,run_name,train/loss\n0,5,lora,2.8\n1,15,lora,2.2\n2,15,full,2.4\n"


def test_exports_of_wandb_say_what_they_hold(tmp_path):
    for name, text in (("runs", RUNS_TABLE), ("chart", CHART), ("history", HISTORY)):
        (tmp_path / f"{name}.csv").write_text(text)
    tables, notes = imported("wandb-csv", tmp_path)
    runs = tables.runs.set_index("run_id")
    assert runs["method"].to_dict() == {"full": "fullft", "lora": "lora", "attn": "lora"}
    assert (runs.loc["lora", ["lr", "rank", "alpha", "steps", "batch_size", "seed"]] == [1e-3, 4, 32, 20, 8, 0]).all()
    assert runs["placement"].dropna().to_dict() == {"lora": "all", "attn": "attn"}
    assert runs["status"].to_dict() == {"full": "diverged", "lora": "done", "attn": "done"}
    lora = tables.curves[tables.curves["run_id"].eq("lora")]
    points = {split: dict(zip(rows["step"], rows["value"], strict=True)) for split, rows in lora.groupby("split")}
    assert points == {"train": {5: 2.8, 15: 2.2, 20: 1.9}, "validation": {0: 3.0, 10: 2.5, 20: 2.0}}
    assert "left out, since they did not reach their last step: going" in notes
    # Calls of the log are no optimizer steps, and a table alone has no more than last values.
    (tmp_path / "chart.csv").write_text(CHART.replace("train/global_step", "Step"))
    with pytest.raises(
        UserError, match="its column Step counts what lora logged; allowed: a chart or history by train"
    ):
        imported("wandb-csv", tmp_path)
    assert len(imported("wandb-csv", tmp_path / "runs.csv")[0].runs) == 3


def test_event_files_need_a_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match="--from tensorboard needs the package tensorboard: pip install tensorboard$"):
        imported("tensorboard", tmp_path)


def test_event_files_are_read_with_the_settings_that_transformers_writes_into_them(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils import tensorboard as writers

    for name, files in (("lora", {"adapter_config.json": ADAPTER}), ("full", {})):
        with writers.SummaryWriter(tmp_path / name / "runs/Jan01_host") as writer:
            writer.add_text("args", json.dumps({"learning_rate": 1e-3, "seed": 3, "max_steps": 20}))
            for step in (10, 20):
                writer.add_scalar("eval/loss", 3 - step / 20, step)
        (tmp_path / name / "checkpoint-20").mkdir()
        for file, value in files.items():
            (tmp_path / name / "checkpoint-20" / file).write_text(json.dumps(value))
    tables, _ = imported("tensorboard", tmp_path, "model=m", "dataset=d", "batch_size=8")
    full, lora = tables.runs.to_dict("records")
    assert (full["method"], lora["method"], lora["rank"], lora["lr"], lora["seed"]) == ("fullft", "lora", 8, 1e-3, 3)
    assert (lora["final_test_nll"], lora["steps"]) == (2.0, 20)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Runs of transformers' Trainer with PEFT: both methods, three learning rates, two seeds, a few steps.

    The callback of lora-advice adds them to the table in the folder `table` beside them.
    """
    import torch
    from lora_advice.callback import AuditCallback
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    folder = tmp_path_factory.mktemp("trainer")
    base = shutil.copytree(shipped_folder("llama-64"), folder / "base")
    ids = torch.arange(16 * 8).reshape(16, 8) * 7 % 200
    rows = [{"input_ids": row, "labels": row} for row in ids]
    for method, lrs in (("full", (1e-3, 3e-3, 1e-2)), ("lora", (3e-3, 1e-2, 3e-2))):
        for lr, seed in ((lr, seed) for lr in lrs for seed in (0, 1)):
            model = AutoModelForCausalLM.from_pretrained(base)
            if method == "lora":
                model = get_peft_model(model, LoraConfig(r=4, lora_alpha=32, target_modules="all-linear"))
            arguments = TrainingArguments(
                str(folder / f"sweep/{method}-{lr:g}-{seed}"), learning_rate=lr, seed=seed, max_steps=8,
                per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=2, eval_strategy="steps",
                eval_steps=4, eval_on_start=True, save_steps=8, save_only_model=True, report_to="none", use_cpu=True,
                disable_tqdm=True,
            )  # fmt: skip
            callback = AuditCallback(folder / "table", dataset="owner/numbers")
            trainer = Trainer(model, arguments, None, rows[:12], rows[12:], callbacks=[callback])
            trainer.train()
            trainer.create_model_card(finetuned_from=str(base), dataset="owner/numbers")
    return folder / "sweep"


@pytest.mark.slow
def test_runs_of_transformers_reach_verdicts_by_two_commands(sweep, tmp_path):
    for words in (
        ("import", "--from", "trainer-state", sweep, "--out", tmp_path / "runs"),
        ("claims", "--tables", tmp_path / "runs", "--out", tmp_path / "verdicts"),
    ):
        result = CliRunner().invoke(app, list(map(str, words)))
        assert result.exit_code == 0, (result.stderr, result.exception)
    runs = read_table(tmp_path / "runs", "runs")
    assert (set(runs["method"]), set(runs["dataset"])) == ({"lora", "fullft"}, {"owner/numbers"})
    assert runs["lr"].nunique() == 4
    assert set(zip(runs["batch_size"], runs["seed"], runs["steps"], strict=True)) == {(4, 0, 8), (4, 1, 8)}
    claims = read_table(tmp_path / "verdicts", "claims").set_index("claim_id")
    assert claims.loc["B2", "n_runs"] == 12
    assert math.isfinite(claims.loc["B2", "estimate"])


@pytest.mark.slow
def test_the_callback_of_lora_advice_has_the_same_runs_and_verdicts(sweep, tmp_path):
    table = sweep.parent / "table"
    result = CliRunner().invoke(app, ["claims", "--tables", str(table), "--out", str(tmp_path)])
    assert result.exit_code == 0, (result.stderr, result.exception)
    claims = read_table(tmp_path, "claims").set_index("claim_id")
    # B1 asks for more steps.
    assert (claims.loc["B2", "n_runs"], claims.loc["B1", "verdict"]) == (12, "setting not met")
    assert claims.loc["B2", "verdict"] in ("confirmed", "contradicted", "inconclusive")
    imported_runs, own = imported("trainer-state", sweep)[0].runs, read_table(table, "runs")
    by = ["method", "lr", "seed"]
    shared = [name for name in imported_runs if name in own and name != "run_id"]
    assert {*by, "model", "dataset", "rank", "alpha", "placement", "batch_size", "steps", "final_test_nll"} <= {*shared}
    pd.testing.assert_frame_equal(
        *(runs.sort_values(by)[shared].reset_index(drop=True) for runs in (imported_runs, own)), check_dtype=False
    )

"""The folders that `lorabench recommend --for` writes: trainers know every key, and TRL trains as this project does."""

from __future__ import annotations

import json

import pytest
import yaml

from lorabench.config.inputs import PathModel
from lorabench.custom.data import examine
from lorabench.custom.model import find_model
from lorabench.custom.recommend import recommend
from lorabench.custom.trainer_configs import TRAINERS, write_config
from lorabench.data.chat import file_messages
from lorabench.data.tokens import encode_chat
from lorabench.errors import UserError
from lorabench.models.base import load_tokenizer
from lorabench.training import reference

from .conftest import rows, write_rows

# The keys that are written, among those of Axolotl at 067b021c (src/axolotl/utils/schemas) and of LLaMA-Factory at
# ff6d4d12 (src/llamafactory/hparams, and TrainingArguments of transformers).
KNOWN = {
    "axolotl": """
        adam_beta1 adam_beta2 adapter base_model bf16 chat_template chat_template_jinja datasets evals_per_epoch
        gradient_accumulation_steps gradient_checkpointing learning_rate logging_steps lora_alpha lora_dropout lora_r
        lora_rank_pattern lora_target_linear lora_target_parameters lr_scheduler max_grad_norm micro_batch_size
        num_epochs optimizer output_dir sample_packing seed sequence_len tf32 val_set_size warmup_steps weight_decay
    """,
    "llamafactory": """
        adam_beta1 adam_beta2 bf16 cutoff_len dataset dataset_dir disable_gradient_checkpointing do_train eval_on_start
        eval_strategy finetuning_type gradient_accumulation_steps learning_rate logging_steps lora_alpha lora_dropout
        lora_rank lora_target lr_scheduler_type max_grad_norm model_name_or_path num_train_epochs optim output_dir
        packing per_device_train_batch_size seed stage template val_size warmup_steps weight_decay
    """,
}


def written(trainer, folder, model, data=None, full=False, **changes):
    """Write a configuration; return its settings, its text, and the rows of the data that it names."""
    described, examined, template = find_model(str(model)), None, None
    if data is not None:
        examined, template = examine(described, str(data), None)
    tokens = examined.usable * examined.mean_completion_tokens if examined else None
    recommendation = recommend(described, tokens, examined, "A10", folder / "none", **changes)
    command = write_config(trainer, folder, described, recommendation, examined, template, full)
    text = (folder / f"{trainer}.yaml").read_text()
    assert command in text
    lines = (folder / "train.jsonl").read_text().splitlines() if data else []
    return yaml.safe_load(text), text, [json.loads(line) for line in lines]


@pytest.mark.parametrize("trainer", KNOWN)
@pytest.mark.parametrize("full", [False, True])
def test_trainers_know_every_key_and_every_line_has_its_reason(tmp_path, base, trainer, full):
    data = write_rows(tmp_path / "own.jsonl", 40)
    settings, text, examples = written(trainer, tmp_path / trainer, base, data, full)
    assert set(settings) <= set(KNOWN[trainer].split())
    assert {line for line in text.splitlines() if "# " not in line} <= {"datasets:"}
    # A learning rate such as 1e-4 would be text to PyYAML.
    assert 1e-4 < settings["learning_rate"] < 1e-2
    assert [example["messages"][0]["content"] for example in examples] == [row["prompt"] for row in rows(40)]
    assert any("lora" in line.partition("#")[0] for line in text.splitlines()[2:]) != full


CHATS = {
    "messages": {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}] * 2},
    "conversations": {"conversations": [{"from": "human", "value": "2+2"}, {"from": "gpt", "value": "4"}]},
    "instruction/output": {"instruction": "add", "input": "2+2", "output": "4"},
    "text": {"text": "2+2 is 4"},
}
TURNS = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize("form", CHATS)
def test_each_form_of_data_becomes_one_that_the_trainers_read(tmp_path, form):
    data = tmp_path / "a'b\"c  # \n{x}.jsonl"
    data.write_text(json.dumps(CHATS[form]) + "\n{}\n")
    by_trainer = {name: written(name, tmp_path / f"# {name}", "tiny", data) for name in TRAINERS}
    for name, (settings, _, [row]) in by_trainer.items():
        place = str(tmp_path / f"# {name}" / "train.jsonl")
        if form == "text":
            assert row == {"text": "2+2 is 4"}
        elif name == "trl" and form != "messages":
            assert row == {"prompt": [{**TURNS[0], "content": row["prompt"][0]["content"]}], "completion": TURNS[1:]}
        else:
            assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"] * (1 + (form == "messages"))
        if name != "llamafactory":
            assert place in settings["datasets"][0].values()
    trl = by_trainer["trl"][0]
    scored = {"messages": (None, True), "text": (None, None)}.get(form, (True, None))
    assert (trl.get("completion_only_loss"), trl.get("assistant_only_loss")) == scored
    assert by_trainer["axolotl"][0]["datasets"][0]["type"] == ("completion" if form == "text" else "chat_template")
    assert by_trainer["llamafactory"][0]["stage"] == ("pt" if form == "text" else "sft")
    info = json.loads((tmp_path / "# llamafactory" / "dataset_info.json").read_text())["train"]
    assert info["file_name"] == "train.jsonl"
    assert list(info["columns"].values()) == ["text" if form == "text" else "messages"]


def test_experts_get_lora_or_the_trainer_is_refused(tmp_path):
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    settings, text, _ = written("trl", tmp_path / "trl", "moe-128")
    assert settings["lora_target_parameters"] == stacks
    assert "their rank is 2 times the paper's" in text
    settings, _, _ = written("axolotl", tmp_path / "axolotl", "moe-128")
    assert settings["lora_target_parameters"] == stacks
    assert settings["lora_rank_pattern"] == {r"experts\..+": settings["lora_r"] // 2}
    with pytest.raises(UserError, match="is a mixture of experts, which get no LoRA from LLaMA-Factory"):
        written("llamafactory", tmp_path / "llamafactory", "moe-128")
    written("llamafactory", tmp_path / "llamafactory", "moe-128", full=True)
    for trainer, folder, message in (
        ("trl", "trl", "trl exists; name another"),
        ("nemo", "x", "trainer 'nemo': allow"),
    ):
        with pytest.raises(UserError, match=message):
            written(trainer, tmp_path / folder, "tiny")


def trained_by_trl(folder, text, *options):
    """Train by TRL as `trl sft --config` does, but in fp32 on the CPU; return losses, learning rates and the result."""
    sft = pytest.importorskip("trl.scripts.sft")
    path = folder / "trl.yaml"
    held_out = ("test_split_size", "eval_strategy", "eval_on_start")
    path.write_text("\n".join(line for line in text.splitlines() if not line.startswith(held_out)))
    options = ("--config", str(path), "--use_cpu", "--bf16", "false", *options)
    sft.main(*sft.make_parser().parse_args_and_config(options, fail_with_unknown_args=True))
    [state] = (folder / "out").glob("checkpoint-*/trainer_state.json")
    steps = [step for step in json.loads(state.read_text())["log_history"] if "loss" in step]
    return [step["loss"] for step in steps], {step["learning_rate"] for step in steps}


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_trl_trains_as_the_reference_does(tmp_path, base, full, monkeypatch):
    data = write_rows(tmp_path / "own.jsonl", 8)
    settings, text, _ = written("trl", tmp_path / "trl", base, data, full, batch_size=8, steps=4)
    losses, lrs = trained_by_trl(tmp_path / "trl", text, "--num_train_epochs", "4")
    assert lrs == {settings["learning_rate"]}
    tokenizer = load_tokenizer(
        PathModel(kind="path", path=str(base), chat_template="plain", parameters=1, hidden_size=1)
    )
    examples = [encode_chat(tokenizer, file_messages(row, "prompt/completion")) for row in rows(8)]
    # TRL puts no LoRA on the unembedding.
    monkeypatch.setattr(reference, "LAYERS", [name for name in reference.LAYERS if name != "lm_head"])
    rank = None if full else settings["lora_r"]
    expected, _ = reference.train_sft(base, examples, 4, 8, settings["learning_rate"], rank, 32.0, seed=0)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0] - 2

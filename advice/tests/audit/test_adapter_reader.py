"""The reader of finished adapters, on small folders and on one that the installed Trainer and PEFT write."""

import json
from pathlib import Path

import pytest
from lora_advice.audit.config import TrainingConfig
from lora_advice.audit.output import heading
from lora_advice.audit.readers import adapter
from lora_advice.errors import UserError

CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "org/model",
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": ["v_proj", "q_proj"],
    "target_parameters": ["mlp.experts.down_proj"],
    "modules_to_save": ["lm_head"],
    "use_rslora": True,
    "use_dora": False,
    "init_lora_weights": "pissa",
}


def read(folder: Path, **changes: object) -> TrainingConfig:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(CONFIG | changes, indent=2))
    assert adapter.matches(path, "")
    (config,) = adapter.read(path, "shown", path.read_text())
    return config


def test_an_adapter_with_a_pickle_alone(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    config = read(tmp_path)
    assert (config.method, config.model, config.rank, config.alpha) == ("lora", "org/model", 16, 32)
    assert (config.targets, config.target_parameters) == (("q_proj", "v_proj"), ("mlp.experts.down_proj",))
    assert (config.saved_modules, config.rslora, config.dora, config.variant) == (("lm_head",), True, False, "pissa")
    assert (config.lr, config.lines["rank"]) == (None, 4)
    (finding,) = config.findings
    assert "pickle" in finding.message


def test_the_state_of_the_last_checkpoint(tmp_path: Path) -> None:
    log = [{"step": 10, "learning_rate": 2e-4, "loss": 1}, {"step": 20, "learning_rate": 1e-4}, {"train_loss": 1}]
    state = {"global_step": 30, "epoch": 1.5, "train_batch_size": 4, "log_history": log}
    for steps in (9, 30):
        folder = tmp_path / f"checkpoint-{steps}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps(state | {"global_step": steps}))
    config = read(tmp_path)
    assert (config.steps, config.epochs, config.micro_batch, config.lr) == (30, 1.5, 4, 2e-4)
    assert [(finding.level, "step 10" in finding.message) for finding in config.findings] == [("note", True)]
    (tmp_path / "trainer_state.json").write_text(json.dumps(state | {"log_history": [log[0], log[0]]}))
    config = read(tmp_path)
    assert (config.lr, config.schedule, config.findings) == (2e-4, "constant", ())


def test_a_model_card_and_arguments_beside_it(tmp_path: Path) -> None:
    card = """---
tags: [trl, dpo]
---
# Model

- learning_rate: 9

### Training hyperparameters

The following hyperparameters were used during training:
- learning_rate: 0.0002
- train_batch_size: 2
- num_devices: 8
- gradient_accumulation_steps: 4
- total_train_batch_size: 64
- optimizer: Use adamw_torch with betas=(0.9,0.999) and epsilon=1e-08
- lr_scheduler_type: cosine
- lr_scheduler_warmup_ratio: 0.1
- num_epochs: 3

### Framework versions
- learning_rate: 8
"""
    (tmp_path / "README.md").write_text(card)
    config = read(tmp_path)
    assert (config.task, config.lr, config.batch_size, config.devices) == ("preference", 2e-4, 64, 8)
    assert (config.schedule, config.warmup, config.optimizer, config.epochs) == ("cosine", 0.1, "adamw_torch", 3)
    (tmp_path / "training_args.json").write_text('{"learning_rate": 1e-5, "bf16": true, "max_steps": 7}')
    config = read(tmp_path)
    assert (config.lr, config.precision, config.steps, config.micro_batch) == (1e-5, "bf16", 7, 2)
    (tmp_path / "training_args.json").write_text("{")
    assert [finding.code for finding in read(tmp_path).findings] == ["not-read"]


def test_an_adapter_of_this_project(tmp_path: Path) -> None:
    spec = {"task": "rl", "lr": 1e-3, "batch_size": 32, "steps": 100, "protocol": {"precision": "bf16"}}
    (tmp_path / "record.json").write_text(json.dumps({"run_id": "a", "spec": spec}))
    config = read(tmp_path / "weights")
    assert (config.task, config.lr, config.schedule, config.precision) == ("rl", 1e-3, "constant", "bf16")
    assert (config.batch_size, config.steps, config.rank) == (32, 100, 16)
    variants = {"olora": (8, 32, ("olora",)), "qlora": (16, 32, ("qlora",)), "lora": (16, 32, ("lora_plus",))}
    for method, expected in variants.items():
        more = {"method": method, "rank": 8, "alpha": 32, "lr_ratio": 16.0 if method == "lora" else None}
        (tmp_path / "record.json").write_text(json.dumps({"run_id": "a", "spec": spec | more}))
        config = read(tmp_path / "weights", use_rslora=False, init_lora_weights=True)
        assert (config.rank, config.alpha, config.variants) == expected
    # With one learning rate for A and B, and at rank 1 with rsLoRA, it is LoRA.
    more = {"method": "lora", "rank": 8, "alpha": 32, "lr_ratio": 1.0}
    (tmp_path / "record.json").write_text(json.dumps({"run_id": "a", "spec": spec | more}))
    config = read(tmp_path / "weights", use_rslora=True, r=1, init_lora_weights=True)
    assert config.variants == ()
    assert "LoRA+" not in heading(config)


def test_what_is_not_plain_lora_is_said(tmp_path: Path) -> None:
    config = read(tmp_path, peft_type="IA3")
    assert (config.method, config.rank) == (None, None)
    assert "IA3" in config.findings[0].message
    config = read(tmp_path, rank_pattern={"q_proj": 4})
    assert "rank_pattern" in config.findings[0].message
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match="not a mapping"):
        adapter.read(tmp_path / "adapter_config.json", "shown", "[]")


@pytest.mark.slow  # imports transformers and PEFT, and trains
def test_a_folder_that_the_installed_trainer_writes(tmp_path: Path) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = get_peft_model(
        LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)), LoraConfig(r=2, target_modules=["q_proj"])
    )
    tokens = torch.arange(8).tolist()
    data = Dataset.from_list([{"input_ids": tokens, "labels": tokens}] * 8)
    options = {"learning_rate": 1e-3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        warmup_steps=2,
        logging_steps=1,
        save_steps=3,
        report_to="none",
        use_cpu=True,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    assert {name for names in adapter.KEYS.values() for name in names} | set(adapter.OTHER_PATTERNS) <= set(written)
    (config,) = adapter.read(path, "shown", path.read_text())
    assert (config.rank, config.targets, config.lr, config.batch_size) == (2, ("q_proj",), 1e-3, 4)
    assert (config.steps, config.schedule, config.warmup, config.optimizer) == (3, "linear", 2, "adamw_torch_fused")
    # The checkpoint has no model card, so the highest logged learning rate is all that it says.
    path = tmp_path / "checkpoint-3" / "adapter_config.json"
    (config,) = adapter.read(path, "shown", path.read_text())
    assert (config.steps, config.lr) == (3, 1e-3)
    assert [finding.code for finding in config.findings] == ["not-read"]

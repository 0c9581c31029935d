"""A LoRA run without this project: by the Trainer of transformers, or by that of TRL, with PEFT.

    python finetune.py SETTINGS.json

The script imports nothing of this project, so its start-up takes as long as that of a user's own script.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED = -100


def common(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of both trainers: Adam at a constant LR over the batches in order."""
    return {
        "output_dir": settings["out"],
        "max_steps": settings["steps"],
        "per_device_train_batch_size": settings["batch_size"],
        "train_sampling_strategy": "sequential",
        "learning_rate": settings["lr"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "adam_beta1": settings["betas"][0],
        "adam_beta2": settings["betas"][1],
        "adam_epsilon": settings["eps"],
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,  # TRL's default is True.
        "dataloader_pin_memory": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def make_trainer(settings: dict[str, Any], model: Any, tokenizer: Any, train: Dataset) -> Any:
    """Return the trainer that the settings name."""
    if settings["trainer"] == "trl":
        from trl import SFTConfig, SFTTrainer

        # The data are already tokenized.
        data_options = {"max_length": None, "packing": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        return SFTTrainer(
            model, SFTConfig(**common(settings), **data_options), train_dataset=train, processing_class=tokenizer
        )
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    return Trainer(model, TrainingArguments(**common(settings)), collator, train)


@torch.no_grad()
def mean_nll(model: Any, rows: Dataset, batch_size: int) -> float:
    """Return the nats per scored token; padding is on the right, so causal attention does not see it."""
    total, count = 0.0, 0
    lengths = [len(ids) for ids in rows["input_ids"]]
    by_length = rows.select(sorted(range(len(rows)), key=lengths.__getitem__))
    for part in by_length.iter(batch_size):
        width = max(map(len, part["input_ids"]))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in part["input_ids"]])
        labels = torch.tensor([row + [IGNORED] * (width - len(row)) for row in part["labels"]])[:, 1:]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        ).item()
        count += int((labels != IGNORED).sum())
    return total / count


def main(path: str) -> None:
    """Train a run, save its adapter, and write its losses."""
    with open(path) as file:
        settings = json.load(file)
    torch.set_num_threads(settings["threads"])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    torch.manual_seed(settings["seed"])
    lora = LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules=settings["targets"])
    model = get_peft_model(model, lora)
    trainer = make_trainer(settings, model, tokenizer, Dataset.load_from_disk(settings["train"]))
    trainer.train()
    model.save_pretrained(settings["out"], save_embedding_layers=False)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tested = Dataset.load_from_disk(settings["test"])
    test = mean_nll(model.eval(), tested, settings["batch_size"])
    with open(settings["result"], "w") as file:
        json.dump({"train": losses, "test": test}, file)


if __name__ == "__main__":
    main(sys.argv[1])

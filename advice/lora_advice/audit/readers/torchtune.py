"""Configurations of torchtune's recipes. What is not in them, such as the number of devices, is on the command line."""

from __future__ import annotations

import re
from pathlib import Path

from lora_advice.audit.config import Task, TrainingConfig
from lora_advice.audit.readers.options import flag, frameworks, names, read_yaml, record, text


def read(path: Path, content: str) -> list[TrainingConfig]:
    """Return the run of a file; of RL, the batch size and the length are not known."""
    # The framework reads files with OmegaConf.
    options, keys = read_yaml(content, as_omegaconf=True), frameworks()["torchtune"]["names"]
    if text(options[keys["model"]]) is None or not options.has("optimizer"):
        return []
    # The last parts of the names of components, such as `lora_llama3_8b`.
    builder, loss, scheduler, optimizer = (
        (text(options[keys[field]]) or "").rpartition(".")[2] for field in ("model", "task", "schedule", "optimizer")
    )
    task: Task = "rl" if "GRPO" in loss or "PPO" in loss else "sft"
    if any(name in loss for name in ("DPO", "RSO", "SimPO")):
        task = "preference"
    lora = builder.startswith(("lora_", "qlora_"))
    options.fill(frameworks()["torchtune"]["defaults"] if lora else {})
    model: str | None = re.sub(r"^q?lora_", "", builder)
    # A builder without a size, such as `llama2`, has its sizes in further options.
    if not re.search(r"\d+b|mini", str(model)):
        model = (text(options["checkpointer.checkpoint_dir"]) or "").rstrip("/") or None
    # The names of transformers are what other parts of the audit know.
    targets = ["o_proj" if name == "output_proj" else name for name in names(options[keys["targets"]]) or ()]
    mlp = flag(options["model.apply_lora_to_mlp"])
    targets += ["gate_proj", "up_proj", "down_proj"] if mlp else []
    targets += ["lm_head"] if flag(options["model.apply_lora_to_output"]) else []
    # A model of text and pictures says for each part what is trained; with a frozen decoder it is neither.
    frozen = options["model.decoder_trainable"] in (False, "frozen")
    return [
        record(
            path,
            "torchtune",
            options,
            keys | (dict.fromkeys(("micro_batch", "accumulation", "epochs"), "") if task == "rl" else {}),
            lora=lora and not frozen,
            task=task,
            method=None if frozen else "lora" if lora else "fullft",
            model=model,
            bits=4 if builder.startswith("qlora_") or flag(options[keys["bits"]]) else None,
            rounded=text(options[keys["rounded"]]) == "bf16",
            schedule=re.sub(r"^get_|_schedule_with_warmup$", "", scheduler) or "constant",
            optimizer=optimizer or None,
            targets=tuple(targets),
            # The builder of Llama 4 gives each expert LoRA of its own.
            target_parameters=("experts.gate_up_proj", "experts.down_proj") if mlp and "llama4" in builder else (),
        )
    ]

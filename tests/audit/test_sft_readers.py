"""The options of trainers for supervised fine-tuning are understood, and so is what has no effect in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorabench.audit.readers import axolotl

AXOLOTL = """
base_model: org/model-8b
load_in_4bit: true
datasets:
  - path: org/data
adapter: qlora
lora_r: 32
lora_alpha: 16
lora_target_linear: true
lora_modules_to_save: [embed_tokens, lm_head]
peft_use_rslora: true
sequence_len: 4096
sample_packing: true
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
learning_rate: 2e-4
lr_scheduler: cosine
warmup_ratio: 0.1
optimizer: adamw_bnb_8bit
bf16: auto
"""


def read(reader, text, name="config.yml"):
    """Return the only run of a file."""
    assert reader.matches(Path(name), text)
    (config,) = reader.read(Path(name), name, text)
    return config


def test_axolotl():
    config = read(axolotl, AXOLOTL)
    assert (config.model, config.method, config.task, config.bits) == ("org/model-8b", "lora", "sft", 4)
    assert (config.lr, config.schedule, config.warmup, config.optimizer) == (2e-4, "cosine", 0.1, "adamw_bnb_8bit")
    assert (config.rank, config.alpha, config.targets, config.rslora) == (32, 16, ("all-linear",), True)
    assert (config.batch_size, config.epochs, config.max_length, config.packing) == (8, 3, 4096, True)
    assert config.saved_modules == ("embed_tokens", "lm_head")
    assert config.precision == "bf16"
    assert config.line("lr") == 17
    (finding,) = config.findings
    assert (finding.code, finding.level, finding.line) == ("lr-text", "note", 17)
    assert "2.0e-4 is a number to all" in finding.message


@pytest.mark.parametrize(
    ("change", "level"),
    [
        (("adapter: qlora", "adapter:"), "error"),
        (("adapter: qlora", "adapter: lora\nlora_model_dir: out/1"), "warning"),
    ],
)
def test_axolotl_without_effect(change, level):
    config = read(axolotl, AXOLOTL.replace(*change).replace("2e-4", "2.0e-4"))
    (finding,) = config.findings
    assert (finding.code, finding.level) == ("no-effect", level)
    assert config.rank is None

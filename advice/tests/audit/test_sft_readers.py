"""The options of trainers for supervised fine-tuning are understood, and so is what has no effect in them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from lora_advice.audit.checks import audit
from lora_advice.audit.files import Reading
from lora_advice.audit.output import Report
from lora_advice.audit.readers import axolotl, llamafactory, torchtune

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


def test_variants_may_be_combined():
    text = f"{AXOLOTL}loraplus_lr_ratio: 16\npeft_init_lora_weights: pissa_niter_4\n"
    config = read(axolotl, text)
    assert config.variants == ("rslora", "lora_plus", "pissa", "qlora")
    assert config.alpha_factor == pytest.approx(16 * 32**0.5)
    assert text.splitlines()[config.lines["lr_ratio"] - 1] == "loraplus_lr_ratio: 16"
    config = read(llamafactory, f"{LLAMAFACTORY}pissa_init: true\nloraplus_lr_ratio: 8.0\n")
    assert (config.variants, config.alpha_factor) == (("lora_plus", "pissa", "qlora"), 8)
    # Full fine-tuning has none, and a ratio of 1 is LoRA, as which `gaussian` counts too.
    assert read(axolotl, text.replace("pissa_niter_4", "gaussian")).variant is None
    assert read(axolotl, text.replace("adapter: qlora", "adapter:")).variants == ()
    assert read(axolotl, AXOLOTL + "loraplus_lr_ratio: 1.0\n").variants == ("rslora", "qlora")


def test_axolotl_trains_on_plain_text():
    text = AXOLOTL.replace("  - path: org/data\n", "  - path: org/data\n    type: completion\n")
    assert read(axolotl, text).task == "pretraining"
    assert read(axolotl, text.replace("adapter:", "  - path: org/chats\nadapter:")).task == "sft"


def test_axolotl_grpo_counts_responses():
    text = AXOLOTL + "rl: grpo\ntrl:\n  num_generations: 4\n"
    config = read(axolotl, text)
    assert (config.task, config.group_size, config.global_batch, config.batch_size) == ("rl", 4, None, 8)
    # Eight responses are not a whole group of sixteen, so several devices share a group.
    config = read(axolotl, text.replace("num_generations: 4", "num_generations: 16"))
    assert (config.devices, config.batch_size) == (None, 8)


LLAMAFACTORY = """
model_name_or_path: org/model-4b
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
template: qwen3
cutoff_len: 2048
quantization_bit: 4
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
bf16: true
"""


def test_llamafactory():
    config = read(llamafactory, LLAMAFACTORY)
    assert (config.model, config.method, config.task, config.bits) == ("org/model-4b", "lora", "sft", 4)
    # OmegaConf reads 1e-4 as a number. Alpha is twice the rank by default, and all linear layers have LoRA.
    assert (config.lr, config.rank, config.alpha, config.targets) == (1e-4, 16, 32, ("all-linear",))
    # KTransformers trains experts in its own way.
    assert read(llamafactory, f"{LLAMAFACTORY}use_kt: true\n").targets is None
    assert (config.batch_size, config.epochs, config.precision) == (8, 3, "bf16")
    assert config.findings == ()
    assert "alpha" not in config.lines


def test_llamafactory_defaults():
    config = read(llamafactory, "model_name_or_path: m\nstage: dpo\ndo_train: true\n")
    assert (config.method, config.task, config.lr, config.batch_size, config.epochs) == (
        "lora",
        "preference",
        5e-5,
        8,
        3,
    )
    assert (config.rank, config.alpha, config.schedule, config.max_length) == (8, 16, "linear", 2048)


@pytest.mark.parametrize(
    ("option", "level"),
    [("finetuning_type: full", "error"), ("finetuning_type: lora\nadapter_name_or_path: out/1", "warning")],
)
def test_llamafactory_without_effect(option, level):
    config = read(llamafactory, LLAMAFACTORY.replace("finetuning_type: lora", option))
    (finding,) = config.findings
    assert (finding.code, finding.level, finding.message[:33]) == (
        "no-effect",
        level,
        "lora_rank: 16 has no effect, sinc",
    )
    assert config.rank is None


def test_llamafactory_of_the_second_version():
    text = """
model: org/model-4b
peft_config:
  name: lora
  r: 16
  lora_alpha: 32
  target_modules: [q_proj, v_proj]
train_dataset: data.yaml
cutoff_len: 2048
micro_batch_size: 2
learning_rate: 1.0e-4
max_steps: 10
"""
    config = read(llamafactory, text)
    assert (config.method, config.task, config.rank, config.alpha) == ("lora", None, 16, 32)
    assert (config.targets, config.lr, config.steps, config.batch_size) == (("q_proj", "v_proj"), 1e-4, 10, 2)
    assert config.line("rank") == 5


def test_llamafactory_commands():
    text = """
MODEL=org/model-4b
llamafactory-cli train \\
    --model_name_or_path ${MODEL} --stage sft --do_train --finetuning_type lora \\
    --learning_rate 1e-4 --lora_rank 8 --lora_target q_proj,v_proj --save_only_model false \\
    --num_train_epochs $EPOCHS
llamafactory-cli train configs/other.yaml
llamafactory-cli chat --model_name_or_path org/model --stage sft --do_train
"""
    config = read(llamafactory, text, "train.sh")
    assert (config.name, config.model, config.method, config.task) == ("line 3", "org/model-4b", "lora", "sft")
    assert (config.lr, config.rank, config.alpha, config.targets) == (1e-4, 8, 16, ("q_proj", "v_proj"))
    # What a variable says that the script does not set is not known, and no default takes its place.
    assert (config.epochs, config.line("lr"), config.batch_size) == (None, 5, 8)


def test_llamafactory_without_training():
    text = LLAMAFACTORY.replace("do_train: true", "do_predict: true")
    assert llamafactory.matches(Path("c.yaml"), text)
    assert llamafactory.read(Path("c.yaml"), "c.yaml", text) == []
    # It writes the tokens of the data and ends, as in LLaMA-Factory's example qwen3_preprocess.yaml.
    text = "model_name_or_path: m\nstage: sft\ndo_train: true\ncutoff_len: 2048\ntokenized_path: saves/tokens\n"
    assert llamafactory.read(Path("c.yaml"), "c.yaml", text) == []
    assert read(llamafactory, f"{text}learning_rate: 1.0e-4\n").lr == 1e-4


TORCHTUNE = """
base: /tmp/Model-8B
model:
  _component_: torchtune.models.llama3_1.qlora_llama3_1_8b
  lora_attn_modules: ['q_proj', 'output_proj']
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 64
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  max_seq_len: null
checkpointer:
  checkpoint_dir: ${base}/
batch_size: 2
gradient_accumulation_steps: 8
epochs: 1
optimizer:
  _component_: torch.optim.AdamW
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss:
  _component_: torchtune.modules.loss.LinearCrossEntropyLoss
dtype: bf16
"""


def test_torchtune():
    config = read(torchtune, TORCHTUNE)
    assert (config.model, config.method, config.task, config.bits) == ("llama3_1_8b", "lora", "sft", 4)
    assert (config.lr, config.schedule, config.warmup, config.optimizer) == (3e-4, "cosine", 100, "AdamW")
    assert (config.rank, config.alpha, config.batch_size, config.epochs) == (64, 16, 16, 1)
    assert config.targets == ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert config.lines["rank"] == 8
    assert (config.lines["lr"], config.findings) == (19, ())


def test_where_weights_are_held_in_bf16_alone():
    assert read(axolotl, AXOLOTL).rounded
    # DeepSpeed and FSDP hold what is trained in fp32, and optimi's optimizers keep what rounding loses.
    for more in ("deepspeed: zero3.json\n", "fsdp_version: 2\nfsdp_config:\n  offload_params: false\n"):
        assert not read(axolotl, AXOLOTL + more).rounded
    assert not read(axolotl, AXOLOTL.replace("adamw_bnb_8bit", "optimi_adamw")).rounded
    # Where it is of the products, LLaMA-Factory holds what is trained in fp32.
    assert not read(llamafactory, LLAMAFACTORY).rounded
    assert read(llamafactory, f"{LLAMAFACTORY}pure_bf16: true\n").rounded
    assert read(torchtune, f"{TORCHTUNE.replace('dtype: bf16', '')}dtype: bf16\n").rounded
    assert not read(torchtune, f"{TORCHTUNE.replace('dtype: bf16', '')}dtype: fp32\n").rounded


def test_torchtune_full_fine_tuning_by_grpo():
    text = TORCHTUNE.replace("qlora_llama3_1_8b", "llama3_1").replace("LinearCrossEntropyLoss", "GRPOSimpleLoss")
    config = read(torchtune, f"{text}grpo_samples: 16\nnum_steps: 200\n")
    # A builder without a size is named by the folder of its weights.
    assert (config.model, config.method, config.task) == ("/tmp/Model-8B", "fullft", "rl")
    assert (config.group_size, config.steps, config.epochs, config.batch_size) == (16, 200, None, 256)


def test_torchtune_with_a_frozen_language_model():
    config = read(torchtune, TORCHTUNE.replace("  lora_rank: 64", "  decoder_trainable: frozen"))
    assert (config.method, config.rank) == (None, None)


def test_torchtune_without_an_optimizer_is_no_training():
    assert not torchtune.matches(Path("evaluation.yaml"), "model:\n  _component_: torchtune.models.llama2.llama2_7b\n")


def test_odd_values_are_not_known_and_stop_nothing():
    """Each option in turn has a value of another type than the framework asks for."""
    odd = (None, [], {"a": 1}, [[1]], 0, -1, True, "x", "${a}", float("nan"), 10**30)
    for reader, text in ((axolotl, AXOLOTL), (llamafactory, LLAMAFACTORY), (torchtune, TORCHTUNE)):
        data = yaml.safe_load(text)
        for key in data:
            for value in odd:
                changed = yaml.safe_dump(data | {key: value})
                for config in reader.read(Path("c.yaml"), "c.yaml", changed):
                    report = Report.of(Reading([config], [], []), audit([config]))
                    json.dumps(report.json(), allow_nan=False)
                    assert list(report.lines(show_all=True))

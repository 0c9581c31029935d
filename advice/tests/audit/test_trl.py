"""Readers of TRL and transformers, on small files."""

import dataclasses
import json
from pathlib import Path

import pytest
from lora_advice.audit.config import TrainingConfig
from lora_advice.audit.readers import trl, trl_options
from lora_advice.audit.readers.flat import Options
from lora_advice.audit.readers.shell import UNKNOWN, read_commands
from lora_advice.errors import UserError


def read(tmp_path: Path, name: str, text: str) -> list[TrainingConfig]:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert trl.matches(path, text)
    return trl.read(path, name, text)


def test_a_script_with_several_commands_variables_and_a_launcher(tmp_path: Path) -> None:
    text = r"""#!/bin/bash
LR=2e-4
MODEL=${MODEL:-Qwen/Qwen3-0.6B}
BATCH=$((2 * 4))
EXTRA="--use_peft --lora_r 16"
if [ "$LR" = 2e-4 ]; then ACCUMULATION=4; else ACCUMULATION=1; fi
if test -f x; then STEPS=10; fi
# trl sft --learning_rate 1
accelerate launch --num_processes 8 examples/scripts/sft.py \
    --model_name_or_path "$MODEL" --learning_rate=$LR \
    --per_device_train_batch_size $BATCH --gradient_accumulation_steps $ACCUMULATION \
    --max_steps $STEPS --num_train_epochs 2 \
    --lora_target_modules q_proj v_proj $EXTRA "$@" 2>&1 | tee log
for lr in 1e-6 1e-5; do
    trl grpo --model_name_or_path $X/Qwen3-8B --learning_rate $lr --num_generations 16 --per-device-train-batch-size 4
done
torchrun --nproc_per_node=2 --nnodes 2 train.py --model_name_or_path m --learning_rate 1e-5 --lora_r 8 \
    --lora_target_modules "q_proj,v_proj"
llamafactory-cli train --stage sft --model_name_or_path m --learning_rate 1e-5
"""
    sft, grpo, other = read(tmp_path, "run.sh", text)
    assert (sft.name, sft.task, sft.method, sft.model) == ("line 9", "sft", "lora", "Qwen/Qwen3-0.6B")
    assert (sft.lr, sft.rank, sft.targets) == (2e-4, 16, ("q_proj", "v_proj"))
    assert (sft.batch_size, sft.steps, sft.epochs) == (8 * 4 * 8, None, None)
    # Steps that only the running script knows would count before epochs.
    assert sft.lines["lr"] == 10
    assert sft.findings == ()
    # What a loop sets is not known, and LoRA is off in TRL's own programs unless it is on.
    assert (grpo.name, grpo.task, grpo.method, grpo.lr) == ("line 15", "rl", "fullft", None)
    assert (grpo.model, grpo.group_size, grpo.batch_size, grpo.epochs) == ("Qwen3-8B", 16, 4, 3)
    # A program of somebody else may have LoRA's options without `use_peft`.
    assert (other.method, other.rank, other.devices, other.findings) == (None, 8, 4, ())
    assert other.targets == ("q_proj", "v_proj")


def test_words_as_bash_makes_them() -> None:
    text = r"""A=(x "y z") B= C=$(nproc)
run "${A[@]}" $B "$(echo "$(date)")" ${C:-1} "${D:-2 3}" 'c"d' "e\"f" $((2 * (1 + 1))) "$@"
run x <<EOF 2>&1 >log # comment
run inside
EOF
run `# comment` "${1:-v}" last
"""
    commands = [[word.text for word in command] for command in read_commands(text)]
    assert commands == [
        ["run", "x", "y z", UNKNOWN, UNKNOWN, "2 3", 'c"d', 'e"f', "4"],
        ["run", "x"],
        ["run", UNKNOWN, "last"],
    ]


def test_lora_options_without_use_peft_have_no_effect(tmp_path: Path) -> None:
    text = "uv run https://a.com/grpo.py --model_name_or_path m --learning_rate 1e-6 \\\n  --lora_r 1 --lora_alpha 32\n"
    (config,) = read(tmp_path, "run.sh", text)
    assert (config.method, config.rank) == ("fullft", None)
    (finding,) = config.findings
    assert (finding.code, finding.level, finding.line) == ("no-effect", "error", 2)
    # A program of the user that has the name of one of TRL's.
    (tmp_path / "grpo.py").write_text("parser.add_argument('--lora_r')")
    (config,) = read(tmp_path, "own.sh", text.replace("https://a.com/", ""))
    assert (config.method, config.rank, config.epochs, config.findings) == (None, 1, None, ())
    # On the command line, a YAML file may still get `--use_peft`.
    (config,) = read(tmp_path, "sft.yaml", "model_name_or_path: m\nlearning_rate: 2e-4\nlora_r: 16\n")
    assert [(finding.code, finding.level, finding.line) for finding in config.findings] == [("no-effect", "warning", 3)]
    assert config.lr == 2e-4  # TRL's parser makes a number of the text


def test_commas_between_modules_and_a_missing_backslash(tmp_path: Path) -> None:
    text = """trl sft --model_name_or_path m --learning_rate 1e-4 \\
    --use_peft --lora_r 8 --lora_target_modules "q_proj", "v_proj" \\
    --max_steps 50
    --lora_alpha 64
"""
    (config,) = read(tmp_path, "run.sh", text)
    assert "alpha" not in config.lines
    assert config.alpha == 32
    assert config.steps == 50
    comma, cut = config.findings
    assert (comma.code, comma.line) == ("no-effect", 2)
    assert "q_proj," in comma.message
    assert (cut.code, cut.line) == ("no-effect", 4)
    assert "--lora_alpha" in cut.message


def test_a_recipe_and_the_command_that_uses_it(tmp_path: Path) -> None:
    recipe = """model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct
use_peft: true
lora_r: 8
lora_alpha: 32
lora_target_modules: [q_proj, v_proj]
learning_rate: 2.0e-05
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
per_device_train_batch_size: 2
gradient_accumulation_steps: 4
num_generations: 16
max_prompt_length: 512
max_completion_length: 1024
model_revision: <revision>
max_steps: -1
num_train_epochs: 1
"""
    (config,) = read(tmp_path, "recipes/demo.yaml", recipe)
    assert (config.task, config.method, config.rank, config.alpha) == ("rl", "lora", 8, 32)
    assert (config.lr, config.schedule, config.warmup, config.precision) == (2e-5, "cosine", 0.1, "bf16")
    assert (config.batch_size, config.group_size, config.max_length) == (8, 16, 1536)
    assert (config.steps, config.epochs) == (None, 1)
    assert config.lines["lr"] == 6
    assert not config.rounded
    (config,) = read(tmp_path, "recipes/demo.yaml", f"{recipe}dtype: bfloat16\n")
    assert config.rounded
    command = "accelerate launch --config_file zero3.yaml src/grpo.py --config recipes/demo.yaml --learning_rate 1e-5\n"
    (tmp_path / "zero3.yaml").write_text("num_processes: 4\n")
    path = tmp_path / "run.sh"
    (config,) = trl.read(path, "run.sh", command)
    assert (config.lr, config.rank, config.devices, config.task) == (1e-5, 8, 4, "rl")


def test_a_recipe_of_another_framework_is_left_to_its_reader() -> None:
    for line in ("finetuning_type: lora", "base_model: m"):
        assert not trl.matches(Path("a.yaml"), f"model_name_or_path: m\n{line}\nlearning_rate: 1e-4\n")


PYTHON = '''"""Run it with

trl dpo --model_name_or_path m \\
    --learning_rate 5e-7
"""
from transformers import BitsAndBytesConfig
rank = 16
MODEL = "Qwen/Qwen3-4B"
lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj"], use_rslora=True, init_lora_weights="pissa")
unused = LoraConfig(r=8)
quantized = BitsAndBytesConfig(load_in_4bit=True)
model = AutoModelForCausalLM.from_pretrained(MODEL, quantization_config=quantized)
args = SFTConfig(
    learning_rate=2e-4,
    per_device_train_batch_size=2,
    num_train_epochs=epochs(),
    bf16=True,
)
SFTTrainer(model=model, args=args, peft_config=lora)
GRPOTrainer(model="m/base", args=GRPOConfig(num_generations=8), reward_funcs=f)
DPOTrainer(model="m/base", args=DPOConfig(learning_rate=1e-6), peft_config=get_peft_config(model_args))
'''


def test_calls_in_python(tmp_path: Path) -> None:
    command, sft, grpo, dpo = read(tmp_path, "train.py", PYTHON)
    assert (command.name, command.task, command.lr) == ("line 3", "preference", 5e-7)
    assert (sft.name, sft.task, sft.method, sft.model, sft.bits) == ("line 13", "sft", "lora", "Qwen/Qwen3-4B", 4)
    assert (sft.lr, sft.micro_batch, sft.epochs, sft.precision) == (2e-4, 2, None, "bf16")
    # What is computed is not said.
    assert (sft.rank, sft.alpha, sft.targets, sft.rslora, sft.variant) == (16, None, ("q_proj",), True, "pissa")
    assert sft.lines["lr"] == 14
    assert sft.lines["rank"] == 9
    (unused,) = [finding for finding in sft.findings if finding.code == "no-effect"]
    assert unused.line == 10
    assert "unused" in unused.message
    # Defaults have no line.
    assert (grpo.task, grpo.method, grpo.model, grpo.lr) == ("rl", "fullft", "m/base", 1e-6)
    assert "lr" not in grpo.lines
    assert grpo.batch_size == 8
    assert dpo.method is None


def test_the_optimizer_of_lora_plus_has_the_learning_rates(tmp_path: Path) -> None:
    made = "create_loraplus_optimizer(model=model, optimizer_cls=AdamW, lr=5e-5, loraplus_lr_ratio=16)"
    *_, sft, _, _ = read(tmp_path, "train.py", PYTHON.replace("args = ", f"optimizer = {made}\nargs = "))
    assert (sft.lr, sft.lr_ratio, sft.lines["lr"], sft.lines["lr_ratio"]) == (5e-5, 16, 13, 13)
    # Where a trainer says that it is its own, it is not that of another one.
    text = f"""
optimizer = {made}
SFTTrainer(model="m", args=SFTConfig(learning_rate=1e-4), peft_config=LoraConfig(r=4), optimizers=(optimizer, None))
GRPOTrainer(model="m", args=GRPOConfig(learning_rate=1e-6), peft_config=LoraConfig(r=4))
"""
    sft, grpo = read(tmp_path, "two.py", text)
    assert [(run.lr, run.lr_ratio) for run in (sft, grpo)] == [(5e-5, 16), (1e-6, None)]


def test_ways_to_make_a_lora_model_in_python(tmp_path: Path) -> None:
    text = """
model = AutoModelForCausalLM.from_pretrained("m")
model = get_peft_model(model=model, peft_config=LoraConfig(r=4))
Trainer(model, TrainingArguments(learning_rate=1e-3, max_steps=10), train_dataset=d)
"""
    (config,) = read(tmp_path, "a.py", text)
    assert (config.task, config.method, config.model, config.rank, config.steps) == (None, "lora", "m", 4, 10)
    text = """
model, tokenizer = FastLanguageModel.from_pretrained(model_name="unsloth/m", load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=16, lora_alpha=16, target_modules=["q_proj"])
SFTTrainer(model=model, train_dataset=d)
"""
    (config,) = read(tmp_path, "b.py", text)
    assert (config.method, config.model, config.bits, config.rank, config.alpha) == ("lora", "unsloth/m", 4, 16, 16)
    assert config.unsloth
    assert config.lr == 2e-5
    # Which of two adapters a switch chooses is not known.
    text = """
peft_config = None
if use_lora:
    peft_config = LoraConfig(r=4)
SFTTrainer(model="m", args=SFTConfig(learning_rate=1e-3), peft_config=peft_config)
"""
    (config,) = read(tmp_path, "c.py", text)
    assert (config.method, config.rank, config.lr) == (None, None, 1e-3)
    with pytest.raises(UserError, match="it is not valid Python"):
        read(tmp_path, "d.py", "SFTConfig(learning_rate=")


def test_a_notebook_and_a_text(tmp_path: Path) -> None:
    cells = [
        "%pip install trl\n!nvidia-smi",
        "args = SFTConfig(learning_rate=1e-4)",
        "broken(",
        "SFTTrainer('m', args)",
    ]
    notebook = {"cells": [{"cell_type": "code", "source": [cell]} for cell in cells]}
    text = json.dumps(notebook, indent=1)
    (config,) = read(tmp_path, "a.ipynb", text)
    place = text.splitlines().index(next(line for line in text.splitlines() if "1e-4" in line)) + 1
    assert (config.name, config.lr, config.lines) == (f"line {place}", 1e-4, {"lr": place})
    text = """# How to train; don't worry

```bash
trl sft --model_name_or_path <model> --learning_rate 1e-4
```

```python
SFTTrainer(model="m", args=SFTConfig(learning_rate=1e-5), ...)
```

```python
trainer = SFTTrainer(model="m", args=SFTConfig(learning_rate=1e-5))
```
"""
    command, call = read(tmp_path, "a.md", text)
    assert (command.name, command.model, command.lr) == ("line 4", None, 1e-4)
    assert (call.name, call.lr, call.method) == ("line 12", 1e-5, "fullft")


@pytest.mark.slow  # imports TRL
def test_options_and_defaults_are_those_of_the_installed_classes() -> None:
    import peft
    import transformers
    import trl as installed

    classes = {name: getattr(installed, name, None) or getattr(transformers, name) for name in trl_options.DEFAULT_LRS}
    fields = {name: {field.name: field for field in dataclasses.fields(cls)} for name, cls in classes.items()}
    for name, own in fields.items():
        options = Options()
        trl_options.set_defaults(options, name)
        assert options.values == {option: own[option].default for option in options.values}
    model = {field.name: field for field in dataclasses.fields(installed.ModelConfig)}
    assert {
        name: model[name].default for name in trl_options.MODEL_CONFIG_DEFAULTS
    } == trl_options.MODEL_CONFIG_DEFAULTS
    assert model["use_peft"].default is False
    assert {name for names in trl.LORA.values() for name in names} <= set(model)
    lora = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    assert {name: lora[name].default for name in trl_options.LORA_CONFIG_DEFAULTS} == trl_options.LORA_CONFIG_DEFAULTS
    of_earlier_versions = {"max_seq_length", "max_prompt_length", "warmup_ratio", "torch_dtype"}
    every = set(model) | {name for own in fields.values() for name in own} | of_earlier_versions
    assert {name for names in trl_options.FIELDS.values() for name in names} <= every

"""Readers of verl and NeMo-RL, on small files."""

from pathlib import Path

from lora_advice.audit.config import TrainingConfig
from lora_advice.audit.readers import nemo_rl, verl


def read_verl(tmp_path: Path, name: str, text: str) -> list[TrainingConfig]:
    path = tmp_path / name
    path.write_text(text)
    assert verl.matches(path, text)
    return verl.read(path, name, text)


def test_overrides_of_a_trainer_of_verl(tmp_path: Path) -> None:
    text = r"""backend=fsdp
prompts=256
mini=$((prompts / 4))
if [ "$backend" = "fsdp" ]; then
    LORA="actor_rollout_ref.model.lora_rank=64 \
        actor_rollout_ref.model.lora_alpha=32"
else
    LORA="actor_rollout_ref.model.lora.rank=8"
fi
PYTHONUNBUFFERED=1 python3 -m verl.trainer.main_ppo \
    algorithm.adv_estimator=grpo \
    data.train_batch_size=$prompts data.max_prompt_length=512 data.max_response_length=1024 \
    actor_rollout_ref.model.path=${HOME}/models/Qwen2.5-7B-Instruct \
    actor_rollout_ref.actor.optim.lr=3e-6 actor_rollout_ref.actor.optim.lr_warmup_steps=-1 \
    actor_rollout_ref.actor.ppo_mini_batch_size=$mini \
    actor_rollout_ref.rollout.n=5 \
    actor_rollout_ref.model.target_modules='[q_proj,v_proj]' \
    trainer.logger='["console","wandb"]' trainer.n_gpus_per_node=8 trainer.nnodes=2 \
    trainer.total_training_steps=100 trainer.total_epochs=15 $LORA $@
python3 -m verl.trainer.main_generation data.path=x
"""
    (config,) = read_verl(tmp_path, "run.sh", text)
    assert (config.name, config.task, config.method, config.model) == ("line 10", "rl", "lora", "Qwen2.5-7B-Instruct")
    assert (config.lr, config.rank, config.alpha, config.warmup) == (3e-6, 64, 32, None)
    assert config.targets == ("q_proj", "v_proj")
    # An optimizer step is a mini-batch, of which a step of verl has four here.
    assert (config.global_batch, config.group_size, config.batch_size, config.steps) == (64, 5, 320, 400)
    assert (config.epochs, config.devices, config.max_length) == (None, 16, 1536)
    assert config.lines["lr"] == 14
    # Training that goes on from an adapter is LoRA with that adapter's rank.
    text = text.replace("model.lora_rank=64", "model.lora_adapter_path=/adapter")
    (config,) = read_verl(tmp_path, "run.sh", text)
    assert (config.method, config.rank) == ("lora", None)


def test_sft_of_verl_without_lora_options_that_count(tmp_path: Path) -> None:
    text = r"""ENTRYPOINT=${ENTRYPOINT:-"-m verl.trainer.sft_trainer"}
torchrun --standalone --nnodes=1 --nproc_per_node=$1 $ENTRYPOINT \
    data.train_batch_size=96 data.max_length=2048 optim.lr=1e-4 model.partial_pretrain=Qwen/Qwen2.5-0.5B \
    model.lora_alpha=16 trainer.total_epochs=2
    optim.weight_decay=0.1
"""
    (config,) = read_verl(tmp_path, "run.sh", text)
    assert (config.task, config.method, config.model, config.lr) == ("sft", "fullft", "Qwen/Qwen2.5-0.5B", 1e-4)
    assert (config.batch_size, config.epochs, config.max_length, config.devices) == (96, 2, 2048, None)
    assert sorted((finding.code, finding.line) for finding in config.findings) == [("no-effect", 4), ("no-effect", 5)]


def test_a_yaml_file_of_verl(tmp_path: Path) -> None:
    text = """data:
  train_batch_size: 1024
actor_rollout_ref:
  model:
    path: m
    lora_rank: 0
  actor:
    ppo_mini_batch_size: 256
    optim:
      lr: 1e-6
  rollout:
    n: ${actor_rollout_ref.actor.responses}
"""
    (config,) = read_verl(tmp_path, "a.yaml", text)
    assert (config.method, config.model, config.lr, config.batch_size) == ("fullft", "m", 1e-6, 256)
    assert config.lines["lr"] == 10
    # A file of settings of the rollout alone states no run.
    assert read_verl(tmp_path, "b.yaml", "actor_rollout_ref:\n  rollout:\n    n: 5\n") == []


BASE = """grpo:
  num_prompts_per_step: 32
  num_generations_per_prompt: 16
  max_num_steps: 1000000
  max_num_epochs: 1
policy:
  model_name: base/model
  train_global_batch_size: 512
  max_total_sequence_length: 512
  precision: bfloat16
  dtensor_cfg:
    lora_cfg: {enabled: false, dim: 8, alpha: 32, match_all_linear: true}
  megatron_cfg:
    enabled: false
    peft: {enabled: false, dim: 8}
    optimizer: {optimizer: adam, lr: 3e-7}
    scheduler: {lr_warmup_iters: 13, lr_decay_style: constant}
  optimizer:
    name: torch.optim.AdamW
    kwargs: {lr: 5e-6}
  scheduler:
    - name: torch.optim.lr_scheduler.LinearLR
      kwargs: {start_factor: 0.1, total_iters: 50}
    - name: torch.optim.lr_scheduler.ConstantLR
cluster: {gpus_per_node: 8, num_nodes: 2}
"""
CHILD = """defaults: ../base.yaml
grpo:
  max_num_steps: 100
policy:
  model_name: child/model
  train_global_batch_size: 128
  dtensor_cfg:
    lora_cfg:
      enabled: true
      dim: 64
"""


def read_nemo_rl(tmp_path: Path, name: str, text: str) -> TrainingConfig:
    (tmp_path / "recipes").mkdir(exist_ok=True)
    (tmp_path / "base.yaml").write_text(BASE)
    path = tmp_path / "recipes" / name
    path.write_text(text)
    assert nemo_rl.matches(path, text)
    (config,) = nemo_rl.read(path, name, text)
    return config


def test_a_file_of_nemo_rl_over_the_one_that_it_inherits_from(tmp_path: Path) -> None:
    config = read_nemo_rl(tmp_path, "a.yaml", CHILD)
    assert (config.task, config.method, config.model, config.precision) == ("rl", "lora", "child/model", "bf16")
    assert (config.lr, config.schedule, config.warmup, config.optimizer) == (5e-6, "ConstantLR", 50, "AdamW")
    assert (config.rank, config.alpha, config.targets, config.devices) == (64, 32, ("all-linear",), 16)
    # A step of GRPO has 512 responses, which are four steps of the optimizer.
    assert (config.global_batch, config.group_size, config.batch_size, config.steps) == (8, 16, 128, 400)
    assert (config.lines["rank"], "lr" in config.lines) == (10, False)
    alone = read_nemo_rl(tmp_path, "b.yaml", CHILD.replace("../base", "missing"))
    assert (alone.lr, alone.rank, [finding.code for finding in alone.findings]) == (None, 64, ["not-read"])
    # A large number of steps is no limit, and a section with `_override_` is not merged.
    base = read_nemo_rl(tmp_path, "c.yaml", BASE)
    assert (base.steps, base.epochs, base.method) == (None, 1, "fullft")
    replaced = "defaults: ../base.yaml\npolicy:\n  optimizer:\n    _override_: true\n    name: torch.optim.SGD\n"
    assert read_nemo_rl(tmp_path, "d.yaml", replaced).lr is None


def test_the_backend_of_nemo_rl_decides_what_counts(tmp_path: Path) -> None:
    config = read_nemo_rl(tmp_path, "a.yaml", f"{CHILD}  megatron_cfg:\n    enabled: true\n")
    assert (config.method, config.lr, config.schedule, config.warmup) == ("fullft", 3e-7, "constant", 13)
    assert [(finding.code, finding.line) for finding in config.findings] == [("no-effect", 9)]


def test_commands_of_nemo_rl(tmp_path: Path) -> None:
    text = """uv run $ROOT/examples/run_grpo.py --config $ROOT/recipes/child.yaml policy.optimizer.kwargs.lr=1e-5 "$@"
uv run examples/run_eval.py --config x.yaml
"""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "child.yaml").write_text(CHILD)
    config = read_nemo_rl(tmp_path, "run.sh", text)
    assert (config.name, config.model, config.lr, config.rank, config.task) == ("line 1", "child/model", 1e-5, 64, "rl")
    assert config.lines == {"lr": 1}
    # Which file a program takes by default is not known.
    config = read_nemo_rl(tmp_path, "b.sh", "python run_sft.py policy.megatron_cfg.peft.enabled=True\n")
    assert (config.method, config.task, config.findings) == ("lora", "sft", ())

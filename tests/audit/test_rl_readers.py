"""Readers of verl and NeMo-RL, on small files."""

from pathlib import Path

from lorabench.audit.config import TrainingConfig
from lorabench.audit.readers import verl


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

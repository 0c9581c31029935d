"""Fine-tune by both methods at three learning rates, each run audited and added to a table that can be judged.

python examples/finetune.py
lorabench claims --tables runs --out verdicts
"""

import torch
from datasets import Dataset
from lora_advice.callback import AuditCallback
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from lorabench.models.specs import shipped_folder

model = str(shipped_folder("llama-64"))  # your model, such as "Qwen/Qwen3-0.6B"
data = Dataset.from_dict({"text": [f"{n} and {n} make {2 * n}." for n in range(64)]}).train_test_split(16, seed=0)
settings = {"max_steps": 8, "eval_strategy": "steps", "report_to": "none", "bf16": torch.cuda.is_available()}

callback = AuditCallback("runs", dataset="sums")  # the folder of the table, and a name of the data
lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
for name, adapter, lrs in (("full", None, (1e-4, 3e-4, 1e-3)), ("lora", lora, (1e-3, 3e-3, 1e-2))):
    for lr in lrs:
        args = SFTConfig(f"out/{name}-{lr:g}", learning_rate=lr, **settings)
        trainer = SFTTrainer(model, args, None, data["train"], data["test"], peft_config=adapter, callbacks=[callback])
        trainer.train()

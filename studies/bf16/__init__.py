"""Full fine-tuning whose weights are held in bf16."""

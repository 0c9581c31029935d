"""Advice on LoRA without a run: what configurations and adapters get wrong, and which settings to start from."""

"""Base models, LoRA, and several runs that share one base."""

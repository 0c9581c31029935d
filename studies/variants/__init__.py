"""Variants of LoRA, each at its own best learning rate: the claims X1 to X7."""

"""Evaluate models with lm-eval."""

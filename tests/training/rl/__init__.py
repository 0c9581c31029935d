"""Tests of lorabench.training.rl."""

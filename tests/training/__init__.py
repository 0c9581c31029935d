"""Tests of lorabench.training."""

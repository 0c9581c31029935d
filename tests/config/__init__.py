"""Tests of lorabench.config."""

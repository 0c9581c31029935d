"""Tests of lorabench.models."""

"""Tests of lorabench.tables."""

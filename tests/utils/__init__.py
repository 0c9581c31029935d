"""Tests of lorabench.utils."""

"""Tests of lorabench.data."""

"""Tests of lorabench.cli."""

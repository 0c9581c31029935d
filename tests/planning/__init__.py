"""Tests of lorabench.planning."""

"""Tests of lorabench.store."""

"""Tests of lorabench.claims."""

"""Tests of lorabench.storage."""

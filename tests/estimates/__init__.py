"""Tests of lorabench.estimates."""

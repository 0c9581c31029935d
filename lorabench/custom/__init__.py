"""Presets, recommendations and scripts for a user's own model and data."""

"""Presets: their sections, validation, and the JSON schema."""

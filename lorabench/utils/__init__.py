"""Helpers that know nothing of experiments: files, hashes, locks, signals, memory, the hub."""

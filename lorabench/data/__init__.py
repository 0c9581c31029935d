"""Datasets, token caches, problem sets and graders, and the hashes that identify data."""

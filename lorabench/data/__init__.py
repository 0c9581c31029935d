"""Datasets, token caches, problem sets and graders."""

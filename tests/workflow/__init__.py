"""Tests of the workflow: its DAG, the preset `smoke` end to end, and the Slurm profile."""

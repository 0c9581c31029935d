"""Tests of what goes wrong: killed jobs, full disks, damaged files, clocks that differ."""

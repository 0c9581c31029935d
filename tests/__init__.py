"""The tests of lorabench, its workflow and its benchmarks."""

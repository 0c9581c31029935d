"""Runs that others have published, in folders with tidy tables and a file `source.yaml`.

A source is read and judged by the same claims as own runs (`studies`), and measured where several sources repeat a
measurement (`measurements`). The matrix of claims by scale (`matrix`) puts the verdicts side by side. The optimal
learning rates that are known (`lr_optima`) are pooled for recommendations, which `lr_left_out` tests.
"""

"""Runs that others have published, in folders with tidy tables and a file `source.yaml`.

A source is read and judged by the same claims as own runs (`studies`), and measured where several sources repeat a
measurement (`measurements`, with the matrix of claims by scale). The optimal learning rates that are known
(`lr_optima`) are pooled for recommendations, which `lr_left_out` tests.
"""

"""Runs that others have published, in folders with tidy tables and a file `source.yaml`.

A source is read and judged by the same claims as own runs (`source`), and measured where several sources repeat a
measurement (`measurements`). Its optimal learning rates are pooled (`lr_optima`).
"""

"""Rerun every comparison of "LoRA Without Regret" and judge from data which of its claims hold.

The functions for other programs are in `lorabench.api`.
"""

"""The noise of made-up sweeps: how large each source of it is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NoiseLevels:
    """The noise of a sweep. Losses are in nats per token; SD is a standard deviation.

    The defaults are those of the preset `laptop` on its worked solutions (see MEASURED), as the option --measure of
    `python -m benchmarks.calibration` measures them. What it does not measure, of RL, is chosen.
    """

    curvature: float = 0.053
    """The rise of the loss around its optimum, per squared unit of ln LR."""
    asymmetry: float = 0.011
    """The part of the rise that grows with the third power of ln LR: the loss rises faster towards high LRs."""
    shared_seed: float = 0.0069
    """SD of what a seed does to all arms alike, through the order of the data."""
    arm_seed: float = 0.004
    """SD of what a seed does to one arm at all LRs."""
    run: float = 0.004
    """SD of what is left for a single run."""
    example_common: float = 0.123
    """SD over test examples of their difficulty for all arms alike."""
    example_arm: float = 0.0073
    """SD over test examples of their difficulty for one arm."""
    example_run: float = 0.051
    """SD over test examples of what is left for a single run."""
    batch: float = 0.044
    """SD over steps of the training loss, the same in all runs with one seed, which see the same batches."""
    step: float = 0.018
    """SD over steps of the training loss that is left for a single run."""
    gain: float = 0.61
    """The fall of the loss from the base to full fine-tuning."""
    loss: float = 0.18
    """The loss of full fine-tuning."""
    rl_curvature: float = 0.11
    """The rise of the error rate of reinforcement learning (RL), per squared unit of ln LR."""
    rl_shared_seed: float = 0.005
    """SD of what a seed does to the error rate of all arms."""
    rl_arm_seed: float = 0.011
    """SD of what a seed does to the error rate of one arm."""
    rl_run: float = 0.011
    """SD of what is left of the error rate for a single run."""
    rl_problem_common: float = 0.8
    """The share of a test problem's difficulty, as a variance, that all arms have in common."""
    rl_problem_arm: float = 0.05
    """The share that is of one arm; the rest is of a single run."""
    rl_batch: float = 0.03
    """SD over steps of the training reward, the same in all runs with one seed."""
    rl_step: float = 0.03
    """SD over steps of the training reward that is left for a single run."""
    rl_base: float = 0.28
    """The accuracy of the base."""
    rl_tuned: float = 0.59
    """The accuracy of full fine-tuning."""


MEASURED = "2026-11-26"
"""The day on which the defaults of `NoiseLevels` were measured."""

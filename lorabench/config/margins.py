"""The section `margins` of a preset: the smallest effects that matter, written down before the runs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lorabench.config.fields import Strict


class Margins(Strict):
    """The smallest effects of interest. Differences below them count as none, so a claim of equality is judged within
    them, and a claim of a difference must exceed them."""

    loss: Annotated[float, Field(gt=0, lt=1, examples=[0.02])]
    """For losses of SFT: a share of the fall of the loss from the base to full fine-tuning."""
    reward: Annotated[float, Field(gt=0, lt=1, examples=[0.1])]
    """For accuracies of RL: a share of the gain in accuracy from the base to full fine-tuning."""
    lr_factor: Annotated[float, Field(gt=1, allow_inf_nan=False, examples=[1.6])]
    """For optimal LRs: the factor up to which two count as the same."""


DEFAULT_MARGINS = Margins(loss=0.02, reward=0.1, lr_factor=1.6)
"""The margins of the shipped presets, for tables without a preset."""

SHARE_OF_LOSS = 0.01
"""The margin of a loss, as a share of it, where the loss of the base is not known."""

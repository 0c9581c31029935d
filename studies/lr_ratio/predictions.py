"""What a preset may state of the theories in its section `predictions`: their parameters, written before the runs.

The theories themselves are functions in `theories`. A theory that a preset leaves out makes no prediction.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from lorabench.config.fields import PositiveFloat, Strict
from lorabench.utils.yaml_files import read_yaml

NotNegativeFloat = Annotated[float, Field(ge=0, le=1e20)]


class MovementTheory(Strict):
    """Parameters of the theory that A's movement lowers the ratio, given the optimal LR of full fine-tuning."""

    c: PositiveFloat
    """While A stands still, the ratio is this number times the width over alpha."""
    u0: PositiveFloat
    """LoRA's LR at which A's movement matters as much as its initial values, at width 128 and 50 steps."""
    k: NotNegativeFloat
    """The ratio at rank r is 1 + k/r times as low as at high ranks, while A stands still."""


class StillTheory(Strict):
    """The parameter of the theory that A's movement does not matter."""

    c: PositiveFloat
    """The ratio is this number times the width over alpha; sqrt(3) is derived."""


class MuATheory(Strict):
    """The parameter of the maximal-update theory of LoRA (arXiv 2602.06204), by which the ratio goes as a root."""

    c: PositiveFloat
    """The ratio is this number times the square root of the width over alpha."""


class ScaleTheory(Strict):
    """Parameters of the theory that the ratio depends on the width over alpha alone, not on length or batch size."""

    c: PositiveFloat
    """While A stands still, the ratio is this number times the width over alpha."""
    kappa: NotNegativeFloat
    """How much A's movement matters where both optimal LRs are equal, as a share of A's initial values."""


class FixedLoraTheory(Strict):
    """Parameters of the theory that LoRA's optimal LR does not depend on the width, while that of full fine-tuning
    does. It is silent on other values of alpha, lengths and batch sizes."""

    ratio: PositiveFloat
    """The ratio at width 128 and alpha 32."""
    fullft_exponent: NotNegativeFloat
    """The power of one over the width with which the optimal LR of full fine-tuning falls."""
    lora_exponent: NotNegativeFloat
    """The same of LoRA."""


class ConstantTheory(Strict):
    """The parameter of the paper's statement that the ratio is the same everywhere."""

    ratio: PositiveFloat
    """The ratio."""


class NaiveTheory(Strict):
    """The parameter of a derivation, by which the ratio is proportional to the width over alpha; the paper gives it
    and finds it refuted."""

    c: PositiveFloat
    """The ratio is this number times the width over alpha; the paper derives a half."""


class Predictions(Strict):
    """Predictions of the ratio of LoRA's to full fine-tuning's optimal LR, by theory; null for no prediction."""

    movement: MovementTheory | None = None
    still: StillTheory | None = None
    mu_a: MuATheory | None = None
    scale: ScaleTheory | None = None
    fixed_lora: FixedLoraTheory | None = None
    constant: ConstantTheory | None = None
    naive: NaiveTheory | None = None


_SUITE = Path(__file__).parent / "presets/suites/predictions.yaml"

DEFAULT = Predictions.model_validate(read_yaml(_SUITE)["predictions"]["lr_ratio"])
"""The predictions of the shipped presets, for tables without a preset and for figures."""

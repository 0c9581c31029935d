from __future__ import annotations

import math

from lorabench.runs import TIE, lowest


def test_the_lowest_loss_of_a_grid_and_the_lowest_lr_of_equals():
    assert lowest({1e-3: 2.0, 1e-4: 3.0, 3e-4: 2.0, 1e-2: math.nan, 3e-2: math.inf}) == 3e-4
    assert lowest({1e-4: 2.0 + TIE / 2, 3e-4: 2.0}) == 3e-4
    assert lowest({1e-4: 2.0 + TIE / 2, 3e-4: 2.0}, TIE) == 1e-4
    assert lowest({1e-4: math.nan, 3e-4: math.inf}) is None
    assert lowest({}) is None

"""Interpolation within a grid of learning rates."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabench.analysis.arm_grid import first_lowest
from lorabench.analysis.lr_grid import vertex


@settings(deadline=None)
@given(st.floats(0.1, 3.0), st.floats(0.1, 3.0), st.floats(0.0, 2.0), st.floats(0.0, 2.0), st.floats(-10, 10))
def test_a_vertex_lies_between_its_neighbours(left, right, rise_left, rise_right, middle):
    x = np.array([middle - left, middle, middle + right])
    estimate = vertex(x, np.array([rise_left, 0.0, rise_right]))
    assert x[0] - 1e-9 <= estimate <= x[2] + 1e-9


def test_rounding_does_not_choose_between_equal_losses():
    """The mean accuracy of three seeds depends on the order in which they are summed."""
    equal = np.array([1.0, 0.1 + 0.2 + 0.7, 0.7 + 0.2 + 0.1, 0.1 + 0.7 + 0.2])
    for order in ([0, 1, 2, 3], [0, 2, 1, 3], [0, 3, 2, 1]):
        assert first_lowest(equal[order] + np.array([1.0, 0.0, 0.0, 0.0])) == 1
    assert first_lowest(np.array([np.nan, 0.3, 0.2, np.nan, 0.1])) == 4

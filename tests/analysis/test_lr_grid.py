"""Interpolation within a grid of learning rates."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabench.analysis.lr_grid import vertex


@settings(deadline=None)
@given(st.floats(0.1, 3.0), st.floats(0.1, 3.0), st.floats(0.0, 2.0), st.floats(0.0, 2.0), st.floats(-10, 10))
def test_a_vertex_lies_between_its_neighbours(left, right, rise_left, rise_right, middle):
    x = np.array([middle - left, middle, middle + right])
    estimate = vertex(x, np.array([rise_left, 0.0, rise_right]))
    assert x[0] - 1e-9 <= estimate <= x[2] + 1e-9

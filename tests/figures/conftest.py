"""Pictures of tests have few pixels: most of the time that a figure takes goes into its PNG."""

import pytest

from lorabench.figures import style


@pytest.fixture(autouse=True)
def few_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style, "PNG_DPI", 40)

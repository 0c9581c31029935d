"""GPUs are recognized by their own names."""

from __future__ import annotations

import pytest

from lorabench.utils.gpus import GPUS, is_called


@pytest.mark.parametrize(
    ("gpu", "device", "same"),
    [
        ("A100-80GB", "NVIDIA A100-SXM4-80GB", True),
        ("A100-80GB", "NVIDIA A100 80GB PCIe", True),
        ("A100-80GB", "NVIDIA A100-SXM4-40GB", False),
        ("H100-80GB", "NVIDIA H100 80GB HBM3", True),
        ("A10", "NVIDIA A100-SXM4-80GB", False),
        ("RTX-4090", "NVIDIA GeForce RTX 4090", True),
    ],
)
def test_gpus_are_known_by_what_they_call_themselves(gpu, device, same):
    assert gpu in GPUS
    assert is_called(gpu, device) == same

"""GPUs are recognized by their own names."""

from __future__ import annotations

import pytest

from lorabench.utils.gpus import GB, GPUS, difference_from, is_called


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


def test_another_gpu_or_a_part_of_one_is_told():
    # A whole H100 reports 85.0 of its 80 x 1.0737 GB; a half of it (MIG) has the same name.
    assert difference_from("H100-80GB", "NVIDIA H100 80GB HBM3", 85.0 * GB) is None
    assert difference_from("H100-80GB", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", 42 * GB) == (
        "this job runs on an NVIDIA H100 80GB HBM3 MIG 3g.40gb of 42 GB, but execution.gpu is H100-80GB of 80 GB: "
        "the plan's times do not hold, and its memory may not fit"
    )
    assert "NVIDIA L40S of 48 GB" in difference_from("A100-40GB", "NVIDIA L40S", 48 * GB)

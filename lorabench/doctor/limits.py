"""The limits of the checks, each with its reason; a check without a limit here only measures."""

from __future__ import annotations

FP32_ERROR = 1e-4
"""Largest relative error of a loss, a gradient or a log-probability in fp32. Sums in another order, over the few layers
and tokens that are compared, differ by 1e-6 to 1e-5; a wrong formula, or TF32 by accident, by 1e-3 and more."""

BF16_ERROR = 0.05
"""Largest relative error of a loss or a gradient in bf16 against fp32. A number in bf16 has a relative error of up to
0.4%, which a few layers forward and backward raise to 1 or 2%."""

LOSS_SPREAD = {"fp32": 5e-5, "bf16": 0.05}
"""Largest relative difference of the losses of one process and of several, by precision. Several processes add in
another order, and in bf16 round the gradient of each part of a batch, which a few steps of training enlarge: 1.4% was
measured with two processes on a CPU."""

SHARE_OF_PEAK = 0.6
"""Least speed of a training step as a share of the matrix product's on the same device. Models of 1B parameters and
more consist of large products, so less means that something else (launches, attention, copies) takes the time."""

LARGE_PARAMETERS = 1e9
"""Parameters of the smallest model to which `SHARE_OF_PEAK` applies; smaller ones leave a GPU idle."""

MEMORY_ERROR = {"cuda": 0.10, "cpu": 0.25}
"""Largest relative difference of the measured peak of a step from the plan's, by type of device. The plan keeps 8% of a
GPU for the driver and for gaps, and asks for a quarter more memory than it estimates on a CPU."""

MIN_CAPABILITY = (8, 0)
"""Least compute capability of a GPU: from 8.0 (Ampere) on there are bf16 products and flash attention."""

USABLE_MEMORY = 0.92
"""Least memory of a GPU as a share of the data sheet's, of which the driver and error correction take a part."""

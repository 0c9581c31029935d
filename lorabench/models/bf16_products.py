"""Products of bf16 matrices on a CPU: native, or in fp32 and rounded to bf16 afterwards.

Where a processor has no instructions for bf16, PyTorch multiplies bf16 matrices in plain loops, 30 to 250 times as
slowly as fp32 ones. Processors that have them multiply two bf16 numbers exactly, add the products in fp32, and round
the sum to bf16 at the end. A product in fp32 of the same operands, rounded to bf16, is therefore the same up to the
order of the sums, as it is on two processors with different instructions. Converting takes a quarter of the time of an
fp32 product more.

The kernels of PyTorch's CPU backend are replaced, so that layers, attention, their backward passes and all code beneath
are covered (`torch.library` calls this a conditional override). Operands of other types go to the original kernels.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Products = Literal["native", "fp32"]
"""How products of bf16 matrices are computed."""

KERNELS = (
    *("mm", "mm.out", "addmm", "addmm.out", "addmm_"),
    *("bmm", "bmm.out", "baddbmm", "baddbmm.out", "baddbmm_"),
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)
"""PyTorch's operators on a CPU that multiply matrices in training and sampling."""

_library: torch.library.Library | None = None


def current() -> Products:
    """Return how this process computes products of bf16 matrices on the CPU."""
    return "native" if _library is None else "fp32"


def choose_faster() -> Products:
    """Time both ways for some milliseconds, and use the faster one in this process from now on."""
    # A product takes 0.1 ms with instructions for bf16, 3 ms and more without.
    x = weight = torch.ones(128, 128, dtype=torch.bfloat16)
    seconds: dict[Products, float] = {}
    for way in ("native", "fp32"):
        use(way)
        tries = []
        # The first try also prepares what all later products use.
        for _ in range(5):
            started = time.perf_counter()
            # The products of a linear layer: forward, and the gradients of its input and its weight.
            y = x @ weight.t()
            y @ weight
            y.t() @ x
            tries.append(time.perf_counter() - started)
        seconds[way] = min(tries)
    # Native products take half as long with instructions for bf16, and about ten times as long without (larger ones up
    # to a hundred times), so they are preferred unless they take this many times as long.
    use("fp32" if seconds["native"] > 4.0 * seconds["fp32"] else "native")
    return current()


def use(way: Products) -> None:
    """Compute products of bf16 matrices on the CPU this way from now on, in this process."""
    global _library
    if way == current():
        return
    if _library is not None:
        _library._destroy()
        _library = None
        return
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # PyTorch warns of every replaced kernel.
        warnings.filterwarnings("ignore", message="Warning only once for all operators")
        for name in KERNELS:
            original = torch.library.get_kernel(f"aten::{name}", "CPU")
            _library.impl(name, _rounding(original.call_boxed), "CPU", with_keyset=True)


def _rounding(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel that computes in fp32 what it is asked to compute in bf16, and rounds its results to bf16."""

    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value

    def compute(keys: object, *inputs: Any, **options: Any) -> Any:
        # The first tensor is an operand in all these operators, and `out` has the type of the operands.
        if inputs[0].dtype != torch.bfloat16:
            return kernel(keys, *inputs, **options)
        wide_inputs = [wide(value) for value in inputs]
        wide_options = {name: wide(value) for name, value in options.items()}
        results = kernel(keys, *wide_inputs, **wide_options)
        pairs = [*zip(inputs, wide_inputs, strict=True), *((options[name], wide_options[name]) for name in options)]
        for given, widened in pairs:
            # An operator that writes into one of its arguments returns it.
            if widened is results:
                return given.copy_(widened)
        if isinstance(results, Tensor):
            return results.to(torch.bfloat16)
        # The logarithms of attention's sums stay in fp32, as in the native kernel.
        return tuple(part if part.ndim == 3 else part.to(torch.bfloat16) for part in results)

    return compute

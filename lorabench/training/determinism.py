"""Training steps that give the same numbers each time on a GPU, as they do on a CPU.

By default the backward pass of PyTorch's fused attention, and of indexing, adds in an order that differs from one call
to the next. Two runs that are equivalent by argument, or a run that was resumed, would then differ from the first step
on. `torch.use_deterministic_algorithms` selects kernels with a fixed order; it has to be strict, since with `warn_only`
fused attention keeps its default. cuBLAS also needs a workspace of a fixed size.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_NONE = "does not have a deterministic implementation"
_unavailable: list[str] = []


def fix_workspaces() -> None:
    """Give cuBLAS workspaces of a fixed size, unless the user has chosen some; call this before the first product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def deterministically(compute: Callable[[], T], undo: Callable[[], None], device: torch.device) -> T:
    """Return the result of `compute`, on a GPU with deterministic kernels.

    If an operation has none, a warning names it, and this call and all later ones do without.

    Args:
        compute: computes a gradient.
        undo: discards what `compute` has done so far, before it is called again.
        device: the device that computes.
    """
    if device.type != "cuda":
        return compute()
    if not _unavailable:
        try:
            with _strict():
                return compute()
        except RuntimeError as error:
            if _NONE not in str(error):
                raise
            _unavailable.append(str(error).split(_NONE, maxsplit=1)[0].strip())
            logging.warning("training on this GPU is not deterministic: %s has no such kernel", _unavailable[0])
        undo()
    return compute()


@contextmanager
def _strict() -> Iterator[None]:
    setting: Any = torch.utils.deterministic
    fill = setting.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    # It would write into each new tensor, to show errors in programs.
    setting.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        setting.fill_uninitialized_memory = fill

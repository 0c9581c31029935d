"""Tensor files that reveal damage: safetensors with a checksum in the header.

safetensors itself detects a truncated file, but not a changed byte. Hashing takes about half a second per GB and core.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open


class DamagedTensorsError(Exception):
    """A file differs from what was written, or can't be read."""


def write_tensors(path: Path, tensors: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """Write tensors, either all of torch or all of numpy, with `about` and a checksum in the header."""
    if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
        from safetensors.numpy import save_file
    else:
        from safetensors.torch import save_file
    save_file(dict(tensors), path, metadata={**about, "sha256": _sha256(tensors, about)})


def read_header(path: Path) -> dict[str, str]:
    """Return the header's metadata without checking the checksum.

    Raises:
        DamagedTensorsError: the file is missing or truncated.
    """
    with _opened(path, "numpy") as file:
        return file.metadata() or {}


def read_tensors(path: Path, framework: Literal["numpy", "pt"]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tensors by name, and the header's metadata without the checksum.

    Args:
        path: the file.
        framework: whether to return arrays of numpy, or tensors of torch (`pt`).

    Raises:
        DamagedTensorsError: the file is missing or truncated, or its content differs from what was written.
    """
    with _opened(path, framework) as file:
        about: dict[str, str] = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if about.pop("sha256", None) != _sha256(tensors, about):
        raise DamagedTensorsError(f"{path} is damaged (its checksum is not that of its content)")
    return tensors, about


@contextmanager
def _opened(path: Path, framework: Literal["numpy", "pt"]) -> Iterator[Any]:
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DamagedTensorsError(f"{path} can't be read ({error})") from error


def _sha256(tensors: Mapping[str, Any], about: Mapping[str, str]) -> str:
    """Return a hash of the header's metadata and of each tensor with its name, type and shape."""

    def described(name: str) -> str:
        tensor = tensors[name]
        # Numpy and torch name types alike except for this prefix.
        dtype = str(tensor.dtype).removeprefix("torch.")
        return f"{name} {dtype} {tuple(tensor.shape)} {hashlib.sha256(_bytes(tensor)).hexdigest()}"

    with ThreadPoolExecutor() as threads:
        parts = list(threads.map(described, sorted(tensors)))
    return hashlib.sha256(json.dumps([dict(about), parts], sort_keys=True).encode()).hexdigest()


def _bytes(tensor: Any) -> memoryview:
    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
    import torch

    flat: np.ndarray = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.data

"""Files of tensors that tell damage: safetensors with a checksum in the header.

safetensors itself sees a file that is cut short, not a byte that is another. Hashing takes about half a second per GB
and core.
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


class DamagedError(Exception):
    """A file that is not as it was written."""


def write_tensors(path: Path, tensors: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """Write tensors, all of torch or all of numpy, with `about` in the header."""
    if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
        from safetensors.numpy import save_file
    else:
        from safetensors.torch import save_file
    save_file(dict(tensors), path, metadata={**about, "sha256": _sha256(tensors, about)})


def read_header(path: Path) -> dict[str, str]:
    """What the header says, unchecked.

    Raises:
        DamagedError: the file is missing or cut short.
    """
    with _opened(path, "numpy") as file:
        return file.metadata() or {}


def read_tensors(path: Path, framework: Literal["numpy", "pt"]) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors, and what the header says about them.

    Raises:
        DamagedError: the file is missing, is cut short, or holds anything but what was written.
    """
    with _opened(path, framework) as file:
        about: dict[str, str] = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if about.pop("sha256", None) != _sha256(tensors, about):
        raise DamagedError(f"{path} is damaged (its checksum is not that of its content)")
    return tensors, about


@contextmanager
def _opened(path: Path, framework: Literal["numpy", "pt"]) -> Iterator[Any]:
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{path} can't be read ({error})") from error


def _sha256(tensors: Mapping[str, Any], about: Mapping[str, str]) -> str:
    """Hash of the header's text and of each tensor with its name, type and shape."""

    def one(name: str) -> str:
        tensor = tensors[name]
        # Numpy and torch call a type by one name, but for this.
        dtype = str(tensor.dtype).removeprefix("torch.")
        return f"{name} {dtype} {tuple(tensor.shape)} {hashlib.sha256(_bytes(tensor)).hexdigest()}"

    with ThreadPoolExecutor() as threads:
        parts = list(threads.map(one, sorted(tensors)))
    return hashlib.sha256(json.dumps([dict(about), parts], sort_keys=True).encode()).hexdigest()


def _bytes(tensor: Any) -> memoryview:
    if isinstance(tensor, np.ndarray):
        return np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data
    import torch

    flat: np.ndarray = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.data

"""Tensor files that reveal damage: safetensors with a checksum in the header.

safetensors itself detects a truncated file, but not a changed byte. Hashing takes about half a second per GB.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open


class DamagedTensorsError(Exception):
    """A file differs from what was written, or can't be read."""


def write_tensors(path: Path, tensors: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """Write tensors of torch or arrays of numpy, with `about` and a checksum in the header.

    Tensors on a GPU are copied to the host's memory first; none may share its memory with another.
    """
    whole: dict[str, Any]
    if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
        from safetensors.numpy import save_file

        whole = dict(tensors)
    else:
        from safetensors.torch import save_file

        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, {**about, "sha256": _checksum(whole.items(), about)})


def read_header(path: Path) -> dict[str, str]:
    """Return the header's metadata without checking the checksum; DamagedTensorsError if the file is truncated."""
    with open_tensors(path, "numpy") as file:
        return file.metadata() or {}


def verify_tensors(path: Path) -> dict[str, str]:
    """Verify the checksum of a file of tensors of torch, one by one, and return the header's metadata without it."""
    about = read_header(path)
    known = about.pop("sha256", None)
    with open_tensors(path) as file:
        checksum = _checksum(((name, file.get_tensor(name)) for name in file.keys()), about)  # noqa: SIM118
    if checksum != known:
        raise DamagedTensorsError(f"{path} is damaged (its checksum is not that of its content)")
    return about


def read_tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tensors of torch by name, and the header's metadata without the checksum, which is verified."""
    about = verify_tensors(path)
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118


@contextmanager
def open_tensors(path: Path, framework: str = "pt") -> Iterator[Any]:
    """Open a file without checking the checksum; safetensors reads a tensor when it is asked for."""
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DamagedTensorsError(f"{path} can't be read ({error})") from error


def _checksum(tensors: Iterable[tuple[str, Any]], about: Mapping[str, str]) -> str:
    """Return a hash of the header's metadata and of each contiguous tensor with its name, type and shape."""
    lines = []
    for name, tensor in tensors:
        content = tensor.reshape(-1)
        if not isinstance(content, np.ndarray):
            import torch

            # Numpy has no bf16.
            content = content.view(torch.uint8).numpy()
        dtype = str(tensor.dtype).removeprefix("torch.")
        lines.append(f"{name} {dtype} {tuple(tensor.shape)} {hashlib.sha256(content.view(np.uint8).data).hexdigest()}")
    return hashlib.sha256(json.dumps([dict(about), sorted(lines)], sort_keys=True).encode()).hexdigest()

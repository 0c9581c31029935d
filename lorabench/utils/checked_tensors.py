"""Tensor files that reveal damage: safetensors with a checksum in the header.

safetensors itself detects a truncated file, but not a changed byte. Hashing takes about half a second per GB and core.
Files are written and verified piece by piece, so that tensors of a GPU that are larger than the host's memory can be
written; safetensors' own function copies all of them first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

_THREADS, _PIECE = 4, 1 << 23
"""Tensors that are written or verified at once, and the bytes of a piece; each thread holds up to two pieces."""

# Names of types in the file, by those of numpy and torch.
_TYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _TYPES.items()}


class DamagedTensorsError(Exception):
    """A file differs from what was written, or can't be read."""


@dataclass(frozen=True)
class _Entry:
    """A tensor in a file: its name, type and shape, and the first of its bytes and the one after the last."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def described(self, sha256: str) -> str:
        """Return the line that the checksum of the file covers."""
        return f"{self.name} {self.dtype} {self.shape} {sha256}"


def write_tensors(path: Path, tensors: Mapping[str, Any], about: Mapping[str, str]) -> None:
    """Write tensors of torch or arrays of numpy, with `about` and a checksum in the header."""
    entries, end = [], 0
    # As in safetensors' own files, wide types come first, so that all are aligned.
    for name in sorted(tensors, key=lambda name: (-_itemsize(tensors[name]), name)):
        tensor = tensors[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        size = _itemsize(tensor) * int(np.prod(tensor.shape))
        entries.append(_Entry(name, dtype, tuple(tensor.shape), end, end := end + size))
    # The checksum is known when all tensors are written; it takes as many bytes as this.
    first = len(_header(entries, about, "0" * 64))

    def write(entry: _Entry) -> str:
        sha256 = hashlib.sha256()
        with path.open("r+b") as file:
            file.seek(first + entry.start)
            for piece in _pieces(tensors[entry.name]):
                sha256.update(piece)
                file.write(piece)
        return entry.described(sha256.hexdigest())

    path.write_bytes(b"")
    with ThreadPoolExecutor(_THREADS) as threads:
        lines = list(threads.map(write, entries))
    with path.open("r+b") as file:
        file.write(_header(entries, about, _checksum(lines, about)))


def read_header(path: Path) -> dict[str, str]:
    """Return the header's metadata without checking the checksum.

    Raises:
        DamagedTensorsError: the file is missing or truncated.
    """
    with open_tensors(path, "numpy") as file:
        return file.metadata() or {}


def verify_tensors(path: Path) -> dict[str, str]:
    """Verify the checksum of a file, and return the header's metadata without it.

    Raises:
        DamagedTensorsError: the file is missing or truncated, or its content differs from what was written.
    """
    about = read_header(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    entries = [
        _Entry(name, _DTYPES.get(entry["dtype"], entry["dtype"]), tuple(entry["shape"]), *entry["data_offsets"])
        for name, entry in header.items()
        if name != "__metadata__"
    ]

    def read(entry: _Entry) -> str:
        sha256, left = hashlib.sha256(), entry.stop - entry.start
        with path.open("rb") as file:
            file.seek(8 + size + entry.start)
            while left and (piece := file.read(min(left, _PIECE))):
                sha256.update(piece)
                left -= len(piece)
        return entry.described(sha256.hexdigest())

    with ThreadPoolExecutor(_THREADS) as threads:
        lines = list(threads.map(read, entries))
    if about.pop("sha256", None) != _checksum(lines, about):
        raise DamagedTensorsError(f"{path} is damaged (its checksum is not that of its content)")
    return about


def read_tensors(path: Path, framework: Literal["numpy", "pt"]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the tensors by name, and the header's metadata without the checksum.

    Args:
        path: the file.
        framework: whether to return arrays of numpy, or tensors of torch (`pt`).

    Raises:
        DamagedTensorsError: the file is missing or truncated, or its content differs from what was written.
    """
    about = verify_tensors(path)
    with open_tensors(path, framework) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118


@contextmanager
def open_tensors(path: Path, framework: Literal["numpy", "pt"]) -> Iterator[Any]:
    """Open a file without checking the checksum; safetensors reads a tensor when it is asked for.

    Raises:
        DamagedTensorsError: the file is missing or truncated.
    """
    try:
        with safe_open(path, framework=framework) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise DamagedTensorsError(f"{path} can't be read ({error})") from error


def _header(entries: list[_Entry], about: Mapping[str, str], sha256: str) -> bytes:
    """Return the beginning of a file: the length of the header, and the header, padded to whole words."""
    header: dict[str, Any] = {"__metadata__": {**about, "sha256": sha256}}
    for entry in entries:
        header[entry.name] = {
            "dtype": _TYPES[entry.dtype],
            "shape": entry.shape,
            "data_offsets": (entry.start, entry.stop),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _checksum(lines: list[str], about: Mapping[str, str]) -> str:
    """Return a hash of the header's metadata and of each tensor with its name, type and shape."""
    return hashlib.sha256(json.dumps([dict(about), sorted(lines)], sort_keys=True).encode()).hexdigest()


def _itemsize(tensor: Any) -> int:
    return int(tensor.dtype.itemsize)


def _pieces(tensor: Any) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in pieces, each copied to the host if it is on a GPU."""
    count = max(1, _PIECE // _itemsize(tensor))
    if isinstance(tensor, np.ndarray):
        flat = np.ascontiguousarray(tensor).reshape(-1)
        for start in range(0, len(flat), count):
            yield flat[start : start + count].view(np.uint8).data
        return
    import torch

    elements = tensor.detach().reshape(-1)
    for start in range(0, len(elements), count):
        piece: np.ndarray = elements[start : start + count].cpu().view(torch.uint8).numpy()
        yield piece.data

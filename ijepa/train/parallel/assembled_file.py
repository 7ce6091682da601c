"""A safetensors file whose tensors are filled in piece by piece, through mapped memory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ALIGNMENT = 8


def assembled_file(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Make a file for tensors of these shapes and dtypes; what is written into them lands in it.

    The file has its full length on the disk at once, for a full disk would otherwise kill the
    process that writes into the mapping.

    Returns:
        CPU tensors by name, of undefined content.

    Raises:
        OSError: no room.
    """
    described: dict[str, dict[str, Any]] = {}
    start = 0
    # by the size of an element, so that each tensor starts at a multiple of it
    for name in sorted(like, key=lambda name: -like[name].element_size()):
        tensor = like[name]
        end = start + tensor.numel() * tensor.element_size()
        described[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    header = json.dumps(described).encode()
    header += b" " * (-len(header) % _ALIGNMENT)
    first = 8 + len(header)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, first + start)
    mapped = torch.from_file(str(path), shared=True, size=first + start, dtype=torch.uint8)
    return {
        name: mapped[first + begin : first + end].view(tensor.dtype).view(tensor.shape)
        for name, tensor in like.items()
        for begin, end in [described[name]["data_offsets"]]
    }

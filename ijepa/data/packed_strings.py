"""Many strings in one array of bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def joined(strings: Sequence[str]) -> np.ndarray:
    """(bytes,) uint8: each string as UTF-8 and a NUL, which no file's name holds."""
    data = b"".join(s.encode("utf-8", "surrogateescape") + b"\0" for s in strings)
    return np.frombuffer(data, dtype=np.uint8)


def split(data: np.ndarray) -> list[str]:
    """The inverse of `joined`."""
    pieces = data.tobytes().split(b"\0")[:-1]
    return [piece.decode("utf-8", "surrogateescape") for piece in pieces]

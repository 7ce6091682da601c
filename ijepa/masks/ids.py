"""Patch ids as flat arrays: counted by sequence, joined, padded with -1, checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def sequence_lengths(flat: np.ndarray, sequences: int, num_patches: int) -> np.ndarray:
    """(sequences,) counts of ascending flat indices into (sequences, num_patches)."""
    edges = np.arange(sequences + 1) * num_patches
    return np.diff(np.searchsorted(flat, edges))


def padded_ids(values: np.ndarray, capacity: int) -> Tensor:
    """(capacity,) int64 tensor: the values, then -1."""
    if len(values) == capacity:
        return torch.from_numpy(values)
    padded = np.full(capacity, -1, dtype=np.int64)
    padded[: len(values)] = values
    return torch.from_numpy(padded)


def concatenated(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Ragged id lists -> (T,) int64."""
    arrays = [np.asarray(ids, dtype=np.int64).reshape(-1) for ids in sequences]
    return np.concatenate([np.zeros(0, dtype=np.int64), *arrays])


def check_ids(name: str, ids: np.ndarray, lengths: np.ndarray, num_patches: int) -> None:
    """Raise IndexError for an id outside [0, N), ValueError for one twice in a sequence."""
    outside = (ids < 0) | (ids >= num_patches)
    if outside.any():
        raise IndexError(f"{name} holds patch {int(ids[outside][0])}, outside 0..{num_patches - 1}")
    sequences = np.repeat(np.arange(len(lengths)), lengths)
    rows, counts = np.unique(sequences * num_patches + ids, return_counts=True)
    if (counts > 1).any():
        sequence, patch = divmod(int(rows[counts > 1][0]), num_patches)
        raise ValueError(f"{name} holds patch {patch} twice in sequence {sequence}")

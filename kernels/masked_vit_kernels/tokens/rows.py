"""What the token ops share: which image and token a row stands for, and how rows are cut in blocks.

Dense, packed and flat layouts differ only in how a row finds its image and token:

    dense (B, K):        image r // K,                          token indices[r]
    packed (capacity,):  image sequence_ids[r] // (S / B),      token indices[r]
    every token:         image r // N,                          token r % N
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from masked_vit_kernels.checks import check_index_dtype, check_shape
from masked_vit_kernels.kernel_language import tl, triton
from masked_vit_kernels.launch import round_up_to_power_of_two
from masked_vit_kernels.packing import Packing

# Counts among the kernels' parameters: one compiled kernel serves all their values. Strides stay
# specialised, they decide how wide loads are.
ROW_COUNTS = ["num_rows", "num_tokens", "rows_per_image", "sequences_per_image"]


@triton.jit
def locate_rows(
    rows,  # int64
    present,
    indices_ptr,  # (R,), or None where every token has its row
    sequence_ids_ptr,  # (R,) where the layout is packed, or None
    num_tokens,
    rows_per_image,
    sequences_per_image,
):
    """Image and token of each row, both int64, and whether the row stands for one at all."""
    if indices_ptr is None:
        tokens = rows % num_tokens
    else:
        tokens = tl.load(indices_ptr + rows, mask=present, other=-1).to(tl.int64)
    if sequence_ids_ptr is None:
        images = rows // rows_per_image
    else:
        # Divided as int32, which takes a fraction of the instructions of int64.
        sequences = tl.load(sequence_ids_ptr + rows, mask=present, other=-1)
        present = present & (sequences >= 0)
        images = (sequences // sequences_per_image).to(tl.int64)
    return images, tokens, present & (tokens >= 0) & (tokens < num_tokens)


class RowIndex(NamedTuple):
    """Which image and token each of R rows stands for, in any of the layouts above."""

    indices: Tensor | None  # (R,) int32 or int64, or None: every token of every image
    sequence_ids: Tensor | None  # (R,) int32 where the layout is packed
    rows_per_image: int
    sequences_per_image: int

    @property
    def given_ids(self) -> Tensor:
        """(R,) the indices, of an index that has some."""
        if self.indices is None:
            raise ValueError("indices must be given here, got the index of every token")
        return self.indices

    def arguments(self, num_tokens: int) -> dict[str, object]:
        """The kernel parameters that `locate_rows` takes, by their usual names."""
        return {
            "indices_ptr": self.indices,
            "sequence_ids_ptr": self.sequence_ids,
            "num_tokens": num_tokens,
            "rows_per_image": self.rows_per_image,
            "sequences_per_image": self.sequences_per_image,
        }

    def places(self, num_rows: int, num_tokens: int, device: torch.device) -> Tensor:
        """(R,) int64: image * N + token of each row, -1 where it stands for none."""
        rows = torch.arange(num_rows, device=device)
        tokens = rows % num_tokens if self.indices is None else self.indices.long()
        if self.sequence_ids is None:
            images = rows // self.rows_per_image
        else:
            sequences = self.sequence_ids.long()
            images = sequences.div(self.sequences_per_image, rounding_mode="floor")
        valid = (images >= 0) & (tokens >= 0) & (tokens < num_tokens)
        return torch.where(valid, images * num_tokens + tokens, -1)


def row_index(indices: Tensor, packing: Packing | None, batch: int) -> RowIndex:
    """The rows that (B, K) or, with a packing, (capacity,) token ids of `batch` images describe."""
    check_index_dtype("indices", indices)
    if indices.ndim == 2:
        check_shape("indices", indices, (batch, None), f"(B, K) with B = {batch}")
        return RowIndex(indices.reshape(-1), None, max(indices.shape[1], 1), 1)
    if indices.ndim != 1 or packing is None:
        raise ValueError(
            f"indices must have shape (B, K), or (capacity,) with a packing, got"
            f" {tuple(indices.shape)} and packing={'None' if packing is None else 'given'}"
        )
    check_shape("indices", indices, (packing.capacity,), f"({packing.capacity},), the capacity")
    if batch == 0 or packing.num_sequences % batch:
        raise ValueError(f"{packing.num_sequences} sequences cannot be shared by {batch} images")
    return RowIndex(indices, packing.sequence_ids, 1, packing.num_sequences // batch)


def with_unit_columns(x: Tensor) -> Tensor:
    """`x`, copied only if its last dimension is strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def column_block(width: int, limit: int = 256) -> int:
    """Columns a program covers: the largest power of two up to `limit` that divides `width`.

    A width with no such divisor of at least 32 is covered by masked blocks.
    """
    divisor = min(width & -width, limit)
    return divisor if divisor >= 32 else min(round_up_to_power_of_two(width), limit)


def tile_rows(x: Tensor, block_d: int) -> int:
    """Rows of a program that moves 8 KB: four 16-byte accesses for each of its 128 threads."""
    return max(1, 8192 // (x.element_size() * block_d))


def sum_dtype(x: Tensor) -> tl.dtype:
    """What sums over rows of `x` are accumulated in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32

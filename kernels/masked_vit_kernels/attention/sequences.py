"""One side of an attention, its queries or its keys: how packed rows fall into sequences."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from masked_vit_kernels.packing import Packing


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """The sequences of the queries or of the keys, as the launches take them.

    Attributes:
        cu_seqlens: (S + 1,) int32 or int64, first row of each sequence.
        max_seqlen: an upper bound of the lengths.
        tile_map, wide_tile_map: (tiles, 2) int32 (sequence, first row) of every tile of 64 and of
            128 rows; without them the grid covers `max_seqlen` in every sequence.
        order: (S,) int32, longest sequences first, or None for their own order.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    tile_map: Tensor | None = None
    wide_tile_map: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def of(cls, cu_seqlens: Tensor, max_seqlen: int, packing: Packing | None) -> Sequences:
        """Of what a caller gives: bounds, and the maps of their packing where there is one."""
        if packing is None:
            return cls(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)
        return cls(
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            tile_map=packing.tile_map,
            wide_tile_map=packing.wide_tile_map,
            order=packing.sequence_order,
        )

    @property
    def count(self) -> int:
        """S."""
        return self.cu_seqlens.shape[0] - 1

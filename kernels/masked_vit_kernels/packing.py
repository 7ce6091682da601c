"""Variable-length sequences laid end to end, described once a batch on the host.

Every op of the library works on *packed* tokens: the tokens of sequence 0, then those of sequence
1, and so on, in one (T, D) tensor without padding between them. A `Packing` says where each
sequence lies. It is built with numpy in the data worker, travels to the device with the batch, and
is shared by every layer and every op of the step.

Glossary (used throughout the library): B images, N patches, K kept patches, T packed tokens,
S sequences, H heads, D width, M target blocks an image.

What may change from batch to batch is a device tensor; what is a Python int (`max_seqlen`,
`capacity`) is a constant of the run, so that one compiled graph serves every step. `capacity` is
the padded length of every id and row tensor; rows from `cu_seqlens[-1]` on are padding and hold -1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

TILE = 64  # rows an entry of the tile map covers: the row block of the attention kernels
WIDE_TILE = 128  # the same for the wide tile map


@dataclass(frozen=True)
class Packing:
    """S sequences laid end to end in `capacity` rows.

    Attributes:
        cu_seqlens: (S + 1,) int32, first row of each sequence; the last entry is the true total.
        sequence_ids: (capacity,) int32, the sequence of each row, -1 on padding.
        tile_map: (capacity // TILE + S, 2) int32, one (sequence, first row within it) for every
            `TILE` rows of every sequence, longest sequences first, then (-1, -1).
        wide_tile_map: (capacity // WIDE_TILE + S, 2) int32, the same for every `WIDE_TILE` rows.
        sequence_order: (S,) int32, the sequences from longest to shortest.
        max_seqlen: upper bound of a sequence's length.
        capacity: rows of every packed tensor, padding included.
        unique: no source row is taken twice, so that a gather's backward needs no accumulation.
    """

    cu_seqlens: Tensor
    sequence_ids: Tensor
    tile_map: Tensor
    wide_tile_map: Tensor
    sequence_order: Tensor
    max_seqlen: int
    capacity: int
    unique: bool = True

    @property
    def num_sequences(self) -> int:
        """S, a constant of the run."""
        return self.cu_seqlens.shape[0] - 1

    def to(self, device: torch.device | str, non_blocking: bool = True):
        """The same packing with its tensors on `device`."""
        return self.map_tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        """The same packing in page-locked host memory, for asynchronous copies."""
        return self.map_tensors(lambda tensor: tensor.pin_memory())

    def map_tensors(self, function: Callable[[Tensor], Tensor]):
        """The same packing with `function` applied to every tensor."""
        values: dict[str, Any] = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self)
        }
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = function(value)
        return type(self)(**values)


@dataclass(frozen=True)
class PredictorPacking(Packing):
    """The predictor's B * M sequences: an image's context rows, then one block's mask tokens.

    Attributes:
        source_rows: (capacity,) int64. r < context capacity: the row copies context row r.
            Otherwise it is the mask token of target row r - context capacity. -1 on padding.
        context_copies: (context capacity, M) int64, the M rows that copy each context row; -1 on
            padding. The backward of the assembly sums over them in this order.
        target_rows: (target capacity,) int64, the row of each target patch's mask token, in the
            order of the target packing; -1 on padding.
    """

    source_rows: Tensor = None  # type: ignore[assignment]
    context_copies: Tensor = None  # type: ignore[assignment]
    target_rows: Tensor = None  # type: ignore[assignment]


@dataclass(frozen=True)
class PrefixPacking(Packing):
    """Sequences that begin with P tokens of their own, class or registers, before packed ones.

    Attributes:
        source_rows: (capacity,) int64, the packed row that each row holds; -1 on prefixes and on
            padding.
        token_rows: (the packed tokens' capacity,) int64, the row of each packed token; -1 on
            padding.
        prefix_rows: (S * P,) int64, the rows of the first sequence's prefix, of the second's, ...
    """

    source_rows: Tensor = None  # type: ignore[assignment]
    token_rows: Tensor = None  # type: ignore[assignment]
    prefix_rows: Tensor = None  # type: ignore[assignment]

    @property
    def num_prefix_tokens(self) -> int:
        """P, a constant of the run."""
        return self.prefix_rows.shape[0] // max(self.num_sequences, 1)


def pack_lengths(
    lengths: Sequence[int] | np.ndarray,
    *,
    max_seqlen: int | None = None,
    capacity: int | None = None,
    unique: bool = True,
) -> Packing:
    """Describe sequences of the given lengths, on the host.

    Args:
        lengths: (S,) non-negative ints; zero-length sequences are allowed.
        max_seqlen: upper bound of the lengths; default: their maximum.
        capacity: padded number of rows; default: their sum.
        unique: promise that no source row is taken twice.

    Raises:
        ValueError: lengths that are no integers or not on the host, a negative one, one over
            `max_seqlen`, a total over `capacity` or over int32.
    """
    lengths = _host_integers(lengths)
    if lengths.ndim != 1:
        raise ValueError(f"lengths must have shape (S,), got {lengths.shape}")
    if lengths.size and lengths.min() < 0:
        raise ValueError(f"lengths must not be negative, got {int(lengths.min())}")
    longest, total = int(lengths.max(initial=0)), int(lengths.sum())
    max_seqlen = longest if max_seqlen is None else max_seqlen
    capacity = total if capacity is None else capacity
    if longest > max_seqlen:
        raise ValueError(f"a sequence has {longest} tokens, over max_seqlen={max_seqlen}")
    if total > capacity:
        raise ValueError(f"{total} tokens do not fit capacity={capacity}")
    if capacity > np.iinfo(np.int32).max:
        raise ValueError(f"rows are numbered in int32, got capacity={capacity}")

    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    sequence_ids = np.empty(capacity, dtype=np.int32)
    sequence_ids[:total] = np.repeat(np.arange(lengths.size, dtype=np.int32), lengths)
    sequence_ids[total:] = -1
    order = np.argsort(-lengths, kind="stable")
    return Packing(
        cu_seqlens=torch.from_numpy(cu_seqlens),
        sequence_ids=torch.from_numpy(sequence_ids),
        tile_map=torch.from_numpy(_host_tile_map(lengths, order, capacity, TILE)),
        wide_tile_map=torch.from_numpy(_host_tile_map(lengths, order, capacity, WIDE_TILE)),
        sequence_order=torch.from_numpy(order.astype(np.int32)),
        max_seqlen=max_seqlen,
        capacity=capacity,
        unique=unique,
    )


def _host_integers(lengths: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
    """int64 array of what was given as lengths."""
    if isinstance(lengths, Tensor) and lengths.device.type != "cpu":
        raise ValueError(
            f"lengths are read on the host, got a tensor on {lengths.device}: move it there, or "
            "describe it on its device with packing_from_cu_seqlens"
        )
    array = np.asarray(lengths)
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"lengths must be integers, got {array.dtype}")
    return array.astype(np.int64)


def _host_tile_map(lengths: np.ndarray, order: np.ndarray, capacity: int, rows: int) -> np.ndarray:
    """(S,) lengths -> (capacity // rows + S, 2) int32 tiles of `rows`, sequences in `order`."""
    tile_map = np.full((capacity // rows + lengths.size, 2), -1, dtype=np.int32)
    tiles = -(-lengths[order] // rows)
    count = int(tiles.sum())
    first_tile = np.cumsum(tiles) - tiles
    tile_map[:count, 0] = np.repeat(order, tiles)
    tile_map[:count, 1] = (np.arange(count) - np.repeat(first_tile, tiles)) * rows
    return tile_map


def packing_from_cu_seqlens(cu_seqlens: Tensor, max_seqlen: int, capacity: int) -> Packing:
    """Describe sequences given as flash-attn gives them, on their own device, without a sync.

    Args:
        cu_seqlens: (S + 1,) int32 or int64, on any device, non-decreasing, starting at 0.
        max_seqlen: upper bound of the lengths.
        capacity: rows of the packed tensors; rows from `cu_seqlens[-1]` on are padding.

    Raises:
        ValueError: cu_seqlens of another shape or dtype; on the CPU also bounds that decrease, do
            not start at 0 or leave `capacity`, and lengths over `max_seqlen`.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"cu_seqlens must have shape (S + 1,), got {tuple(cu_seqlens.shape)}")
    cu_seqlens = cu_seqlens.to(torch.int32)
    rows = torch.arange(capacity, device=cu_seqlens.device, dtype=torch.int32)
    sequence_ids = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
    sequence_ids = torch.where(rows < cu_seqlens[-1], sequence_ids, -1).to(torch.int32)

    lengths = cu_seqlens.diff()
    if cu_seqlens.is_cpu and type(cu_seqlens) is Tensor and not torch.compiler.is_compiling():
        _check_bounds(cu_seqlens.tolist(), lengths.tolist(), max_seqlen, capacity)
    order = torch.argsort(lengths, descending=True, stable=True)
    return Packing(
        cu_seqlens=cu_seqlens,
        sequence_ids=sequence_ids,
        tile_map=_device_tile_map(lengths, order, capacity, TILE),
        wide_tile_map=_device_tile_map(lengths, order, capacity, WIDE_TILE),
        sequence_order=order.to(torch.int32),
        max_seqlen=max_seqlen,
        capacity=capacity,
        unique=False,
    )


def _check_bounds(
    bounds: list[int], lengths: list[int], max_seqlen: int, capacity: int
) -> None:
    """Raise ValueError for what `packing_from_cu_seqlens` must not be given."""
    if bounds[0] != 0 or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must start at 0 and not decrease, got {bounds[:8]}")
    if bounds[-1] > capacity:
        raise ValueError(f"{bounds[-1]} tokens do not fit capacity={capacity}")
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(f"a sequence has {max(lengths)} tokens, over max_seqlen={max_seqlen}")


def _device_tile_map(lengths: Tensor, order: Tensor, capacity: int, rows: int) -> Tensor:
    """`_host_tile_map` on the lengths' own device, without a sync."""
    tiles = torch.arange(capacity // rows + lengths.shape[0], device=lengths.device)
    if not lengths.shape[0]:
        return tiles.new_full((tiles.shape[0], 2), -1, dtype=torch.int32)
    counts = (lengths[order] + rows - 1) // rows
    ends = counts.cumsum(0)
    entry = torch.searchsorted(ends, tiles, right=True).clamp(max=lengths.shape[0] - 1)
    first_row = (tiles - (ends - counts)[entry]) * rows
    tile_map = torch.stack([order[entry], first_row], dim=1)
    return torch.where((tiles < ends[-1])[:, None], tile_map, -1).to(torch.int32)


def pack_predictor(
    context: Packing,
    target: Packing,
    *,
    max_seqlen: int | None = None,
    capacity: int | None = None,
) -> PredictorPacking:
    """Describe the predictor's sequences from the context's and the targets' packings, on the host.

    Sequence b * M + m holds image b's context rows and then the mask tokens of its block m
    (paper section 3, Prediction: the predictor is applied M times, once a block).

    Args:
        context: B sequences.
        target: B * M sequences, all blocks of image 0, then of image 1, ...

    Raises:
        ValueError: the number of target sequences is no multiple of the number of images.
    """
    images, blocks = context.num_sequences, target.num_sequences
    if images == 0 or blocks % images:
        raise ValueError(f"{blocks} target blocks cannot be shared among {images} images")
    per_image = blocks // images
    context_starts = context.cu_seqlens.numpy().astype(np.int64)
    target_starts = target.cu_seqlens.numpy().astype(np.int64)
    context_lengths, target_lengths = np.diff(context_starts), np.diff(target_starts)
    copied_lengths = np.repeat(context_lengths, per_image)  # (B * M,)
    packing = pack_lengths(
        copied_lengths + target_lengths, max_seqlen=max_seqlen, capacity=capacity
    )
    starts = packing.cu_seqlens.numpy()[:-1].astype(np.int64)  # (B * M,)
    mask_token_starts = starts + copied_lengths

    # A sequence is two runs of consecutive source rows, one of context and one of mask tokens.
    # Seen from the other side, the rows that take a sequence's tokens are runs as well.
    run_lengths = np.stack([copied_lengths, target_lengths], axis=1)
    run_starts = np.stack(
        [np.repeat(context_starts[:-1], per_image), context.capacity + target_starts[:-1]], axis=1
    )
    context_copies = np.empty((context.capacity, per_image), dtype=np.int64)
    for block, block_starts in enumerate(starts.reshape(images, per_image).T):
        context_copies[:, block] = _runs(block_starts, context_lengths, context.capacity)
    fields = {field.name: getattr(packing, field.name) for field in dataclasses.fields(packing)}
    return PredictorPacking(
        **fields,
        source_rows=torch.from_numpy(
            _runs(run_starts.ravel(), run_lengths.ravel(), packing.capacity)
        ),
        context_copies=torch.from_numpy(context_copies),
        target_rows=torch.from_numpy(_runs(mask_token_starts, target_lengths, target.capacity)),
    )


def pack_prefix(packing: Packing, num_prefix_tokens: int) -> PrefixPacking:
    """Describe the sequences of `packing` with class or register tokens before each, on the host.

    Args:
        packing: S sequences of packed tokens; a sequence without any gets its prefix, too.
        num_prefix_tokens: P.

    Raises:
        ValueError: a negative number of tokens, a packing that is not on the host.
    """
    if num_prefix_tokens < 0:
        raise ValueError(f"num_prefix_tokens must not be negative, got {num_prefix_tokens}")
    if not packing.cu_seqlens.is_cpu:
        raise ValueError(
            f"a packing is extended on the host, got one on {packing.cu_seqlens.device}: extend it "
            "first and move it then"
        )
    token_starts = packing.cu_seqlens.numpy().astype(np.int64)
    lengths, count = np.diff(token_starts), packing.num_sequences
    extended = pack_lengths(
        lengths + num_prefix_tokens,
        max_seqlen=packing.max_seqlen + num_prefix_tokens,
        capacity=packing.capacity + count * num_prefix_tokens,
        unique=packing.unique,
    )
    starts = extended.cu_seqlens.numpy()[:-1].astype(np.int64)
    source_rows = np.full(extended.capacity, -1, dtype=np.int64)
    token_rows = _runs(starts + num_prefix_tokens, lengths, packing.capacity)
    total = int(token_starts[-1])
    source_rows[token_rows[:total]] = np.arange(total)
    prefix_rows = (starts[:, None] + np.arange(num_prefix_tokens)).reshape(-1)
    fields = {field.name: getattr(extended, field.name) for field in dataclasses.fields(extended)}
    return PrefixPacking(
        **fields,
        source_rows=torch.from_numpy(source_rows),
        token_rows=torch.from_numpy(token_rows),
        prefix_rows=torch.from_numpy(prefix_rows),
    )


def _runs(firsts: np.ndarray, lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Runs of consecutive int64 numbers from `firsts` end to end, then -1 up to (capacity,)."""
    offsets = firsts - (np.cumsum(lengths) - lengths)  # a run's numbers less their places
    numbers = np.repeat(offsets, lengths)
    total = numbers.size
    if total < capacity:
        padded = np.empty(capacity, dtype=np.int64)
        padded[total:] = -1
        np.add(numbers, _places(total), out=padded[:total])
        return padded
    numbers += _places(total)
    return numbers


def _places(count: int) -> np.ndarray:
    """(count,) int64 from 0, a view of an array kept for the process.

    The page faults of a fresh array cost more than filling it: kept, it halves a batch's packing.
    """
    global _all_places
    if count > _all_places.size:
        _all_places = np.arange(2 * count)
    return _all_places[:count]


_all_places = np.arange(0)


def choose_capacity(total: int, capacities: Sequence[int]) -> int | None:
    """The smallest capacity that holds `total` tokens, or None where none does."""
    return min((c for c in capacities if c >= total), default=None)

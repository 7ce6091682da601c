"""Many tensors in one launch: flat views, and the map from programs to pieces of tensors.

Nothing is concatenated. Every tensor is seen as the one-dimensional run of memory that it is, cut
into tiles of `TILE` elements; a launch has one program a tile. A program finds its tensor in the
tile map and the addresses in a pointer table, both built once. Only gradients move from step to
step, so their addresses are a column of their own that one copy from page-locked memory refreshes.

Index width: a tile's first element is tile * TILE in int64: a tensor may hold over 2^31 elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from masked_vit_kernels.kernel_language import tl, triton

TILE = 8192  # elements a program covers

# Elements of one trip of a program's loop, at 4 warps. Reading alone takes 8 a thread, 16 bytes in
# bfloat16. Updates take 4 a thread, 16 bytes in float32 and 8 in bfloat16: with 8, Triton passes
# every float32 result through shared memory to store it without gaps.
READ_BLOCK = 1024
UPDATE_BLOCK = 512

TRITON_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}

Layout = tuple[tuple[int, int], ...]


@triton.jit
def lerp(old, new, keep, rate):
    """keep * old + rate * new, where keep + rate = 1, in the form that is exact at both ends."""
    return tl.where(rate < 0.5, old + rate * (new - old), new - keep * (new - old))


def local(tensor: Tensor) -> Tensor:
    """The part of `tensor` that lies on this rank: a DTensor's shard, else the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def layout_of(tensor: Tensor) -> Layout:
    """(size, stride) of every dimension that has more than one entry: equal layouts pair up
    element by element in memory."""
    return tuple(
        (size, stride)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size != 1
    )


def is_dense(tensor: Tensor) -> bool:
    """The elements fill one run of memory without gaps or overlaps, in whatever order."""
    return tensor.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(tensor)


def flat_view(tensor: Tensor) -> Tensor:
    """(numel,) alias of a dense tensor in the order of its memory, unknown to autograd.

    `.data` drops the link to the base, on whose shape compiled code would otherwise depend.
    """
    return tensor.detach().as_strided((tensor.numel(),), (1,)).data


class FlatView:
    """A tensor as one run of memory in a given layout: a view of it, or a staged copy.

    A tensor that is not dense, or whose companions are laid out otherwise, is staged: `load` before
    an update copies it in, `store` after it copies the result back. All others cost nothing.

    Attributes:
        flat: (numel,) what the update reads and writes.
        staged: whether `flat` is a copy.
    """

    def __init__(self, tensor: Tensor, like: Tensor):
        """`like`: a dense tensor of the same shape whose layout the flat view must have."""
        if any(stride == 0 and size > 1 for size, stride in layout_of(tensor)):
            raise ValueError(
                f"cannot update a tensor whose elements overlap in memory: shape "
                f"{tuple(tensor.shape)}, strides {tensor.stride()}"
            )
        self.original = tensor
        self.staged = not is_dense(tensor) or layout_of(tensor) != layout_of(like)
        self._buffer = torch.empty_like(like, dtype=tensor.dtype) if self.staged else tensor
        self.flat = flat_view(self._buffer)

    def load(self) -> None:
        if self.staged:
            self._buffer.copy_(self.original)

    def store(self) -> None:
        if self.staged:
            self.original.copy_(self._buffer)


def addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    """Where each tensor's data lies; 0 stands for none, 16 for a tensor without elements."""
    return [
        0 if tensor is None else tensor.data_ptr() if tensor.numel() else 16 for tensor in tensors
    ]


def tile_map(sizes: Sequence[int]) -> Tensor:
    """(number of tiles, 2) int32 on the host: (tensor, tile within it) of every program."""
    tiles = (torch.tensor(list(sizes), dtype=torch.int64) + TILE - 1) // TILE
    owner = torch.repeat_interleave(torch.arange(len(sizes)), tiles)
    first = torch.cumsum(tiles, 0) - tiles
    within = torch.arange(owner.numel()) - first[owner]
    return torch.stack([owner, within], dim=1).to(torch.int32)

"""The masks of one batch, packed end to end with everything that the ops need to know of them.

A `MaskBatch` is built once a batch on the host (in the data worker), travels to the device with
the images and is shared by every layer of the step. Lengths differ from image to image and from
block to block; nothing is padded to the longest and nothing is cut to the shortest.

Glossary: B images, N patches, M target blocks an image, T packed tokens (`Tc` context, `Tt`
target, `Tu` union), K kept patches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from masked_vit_kernels.packing import (
    Packing,
    PredictorPacking,
    pack_lengths,
    pack_predictor,
)
from torch import Tensor

from ijepa.masks.ids import check_ids, concatenated, padded_ids, sequence_lengths
from ijepa.masks.layout import padded_bytes, tensors_of, views_of
from ijepa.masks.sizes import MaskSizes, padded_sizes


@dataclass(frozen=True, eq=False)
class MaskBatch:
    """Context and target patches of B images. Ids and rows are int64; -1 marks padding.

    Attributes:
        grid: (rows, columns) of patches; patch ids are `row * columns + column`, N in all.
        num_targets: M.
        context: (Tc,) patch ids, image after image.
        context_packing: B sequences.
        targets: (Tt,) patch ids: all blocks of image 0, then of image 1, ...
        target_packing: B * M sequences.
        predictor_packing: B * M sequences, an image's context and then one block's mask tokens.
        target_rows: (Tt,) rows `b * N + patch` of the targets among all patches of the batch.
        target_union: (Tu,) ascending rows `b * N + patch` that are in at least one block.
        target_union_packing: B sequences.
        target_rows_in_union: (Tt,) place of each target row in `target_union`.
        redraws: how often the whole batch was drawn again because it overflowed the capacities.
        fallbacks: images whose context came from the sampler's stated fallback.
    """

    grid: tuple[int, int]
    num_targets: int
    context: Tensor
    context_packing: Packing
    targets: Tensor
    target_packing: Packing
    predictor_packing: PredictorPacking
    target_rows: Tensor
    target_union: Tensor
    target_union_packing: Packing
    target_rows_in_union: Tensor
    redraws: int = 0
    fallbacks: int = 0

    @property
    def batch_size(self) -> int:
        """B."""
        return self.context_packing.num_sequences

    @property
    def num_patches(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]

    @property
    def predictor_target_rows(self) -> Tensor:
        """(Tt,) row of each target's mask token in the predictor's packed sequences."""
        return self.predictor_packing.target_rows

    @property
    def predictor_target_packing(self) -> Packing:
        """`target_packing` for `predictor_target_rows`: blocks may share a patch, never a row."""
        return dataclasses.replace(self.target_packing, unique=True)

    def context_of(self, image: int) -> Tensor:
        """(K,) context patch ids of one image."""
        return _sequence(self.context, self.context_packing, image)

    def targets_of(self, image: int) -> list[Tensor]:
        """M tensors (K',) of patch ids, the target blocks of one image."""
        first = image * self.num_targets
        return [
            _sequence(self.targets, self.target_packing, first + block)
            for block in range(self.num_targets)
        ]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> MaskBatch:
        """The same masks on `device`, in one copy."""
        if torch.device(device) == self.context.device:
            return self
        fields, block = self._in_one_block()
        return _cut(fields, block.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MaskBatch:
        """The same masks in page-locked host memory, for asynchronous copies."""
        fields, block = self._in_one_block()
        return _cut(fields, block.pin_memory())

    def in_shared_memory(self) -> MaskBatch:
        """The same masks in memory that other processes can be handed.

        Raises:
            RuntimeError: there is no room for them.
        """
        fields, block = self._in_one_block()
        return _cut(fields, block.share_memory_())

    def __reduce__(self):
        """Between processes too they travel as one tensor: each takes an open file and a handshake,
        and a batch has thirty."""
        return _cut, self._in_one_block()

    def _in_one_block(self) -> tuple[dict[str, object], Tensor]:
        """The fields with tensors without memory in them, and (bytes,) uint8 of all their memory.

        The block itself where the tensors are cut from one already.
        """
        tensors = tensors_of(self)
        skeleton = self.map_tensors(lambda tensor: tensor.to("meta"))
        fields = {field.name: getattr(skeleton, field.name) for field in dataclasses.fields(self)}
        storage = tensors[0].untyped_storage()
        starts = np.cumsum([0, *(padded_bytes(tensor) for tensor in tensors)])
        if all(
            tensor.untyped_storage().data_ptr() == storage.data_ptr()
            and tensor.storage_offset() * tensor.element_size() == start
            for tensor, start in zip(tensors, starts[:-1], strict=True)
        ):
            return fields, tensors[0].new_empty(0, dtype=torch.uint8).set_(storage)
        block = torch.zeros(int(starts[-1]), dtype=torch.uint8, device=self.context.device)
        for tensor, view in zip(tensors, views_of(tensors, block), strict=True):
            view.copy_(tensor)
        return fields, block

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> MaskBatch:
        """The same masks with `function` applied to every tensor, those of the packings too."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, value in values.items():
            if isinstance(value, Packing):
                values[name] = value.map_tensors(function)
            elif isinstance(value, Tensor):
                values[name] = function(value)
        return MaskBatch(**values)

    @classmethod
    def from_dense(cls, context: Tensor, targets: Tensor, grid: tuple[int, int]) -> MaskBatch:
        """Masks given as index tensors, in any order of patches, which is kept.

        Args:
            context: (B, K) patch ids; -1 leaves a place empty, so that lengths may differ.
            targets: (B, M, K') patch ids, -1 likewise.
            grid: (rows, columns).

        Raises:
            ValueError: wrong shapes, or a patch twice in one sequence.
            IndexError: a patch id outside the grid.
        """
        context, targets = torch.as_tensor(context).cpu(), torch.as_tensor(targets).cpu()
        if context.ndim != 2:
            raise ValueError(f"context must have shape (B, K), got {tuple(context.shape)}")
        if targets.ndim != 3 or targets.shape[0] != context.shape[0]:
            raise ValueError(
                f"targets must have shape (B, M, K') with B={context.shape[0]}, "
                f"got {tuple(targets.shape)}"
            )
        context_ids, target_ids = context.numpy().astype(np.int64), targets.numpy().astype(np.int64)
        in_context, in_targets = context_ids != -1, target_ids != -1
        longest_context, longest_target = context.shape[1], targets.shape[2]
        num_patches = grid[0] * grid[1]
        return cls._from_checked_ids(
            grid,
            context_ids[in_context],
            in_context.sum(axis=1),
            target_ids[in_targets],
            in_targets.sum(axis=2),
            max_seqlens=MaskSizes(
                context=longest_context,
                targets=longest_target,
                predictor=longest_context + longest_target,
                target_union=min(num_patches, targets.shape[1] * longest_target),
            ),
        )

    @classmethod
    def from_lists(
        cls,
        context: Sequence[Sequence[int]],
        targets: Sequence[Sequence[Sequence[int]]],
        grid: tuple[int, int],
    ) -> MaskBatch:
        """Masks given as B lists of patch ids and B lists of M lists, of any lengths.

        Raises:
            ValueError: B or M differ, or a patch twice in one sequence.
            IndexError: a patch id outside the grid.
        """
        if len(context) != len(targets):
            raise ValueError(f"{len(context)} contexts but targets of {len(targets)} images")
        block_counts = {len(blocks) for blocks in targets}
        if len(block_counts) != 1:
            raise ValueError(f"every image needs as many target blocks, got {sorted(block_counts)}")
        blocks = [block for image in targets for block in image]
        target_lengths = np.array([len(block) for block in blocks], dtype=np.int64)
        return cls._from_checked_ids(
            grid,
            concatenated(context),
            np.array([len(ids) for ids in context], dtype=np.int64),
            concatenated(blocks),
            target_lengths.reshape(len(targets), -1),
        )

    @classmethod
    def from_boolean(
        cls,
        context: np.ndarray,
        targets: np.ndarray,
        grid: tuple[int, int],
        *,
        max_seqlens: MaskSizes | None = None,
        capacities: Sequence[MaskSizes] | int | None = None,
        redraws: int = 0,
        fallbacks: int = 0,
    ) -> MaskBatch:
        """Masks given as booleans, packed in raster order; what the samplers call.

        Args:
            context: (B, N) bool.
            targets: (B, M, N) bool.
            max_seqlens: bounds of the sequences' lengths; default: those of this batch.
            capacities: padded lengths to choose from (the first that holds the batch), or a
                number of rows to whose multiples each length is padded; default: exact lengths.

        Raises:
            CapacityOverflow: no capacity holds the batch.
        """
        images, blocks, num_patches = targets.shape
        context_flat, target_flat = np.flatnonzero(context), np.flatnonzero(targets)
        context_lengths = sequence_lengths(context_flat, images, num_patches)
        target_lengths = sequence_lengths(target_flat, images * blocks, num_patches)
        context_offsets = np.arange(images) * num_patches
        target_offsets = np.arange(images * blocks) * num_patches
        return cls._from_ids(
            grid,
            context_flat - np.repeat(context_offsets, context_lengths),
            context_lengths,
            target_flat - np.repeat(target_offsets, target_lengths),
            target_lengths.reshape(images, blocks),
            np.any(targets, axis=1),
            max_seqlens=max_seqlens,
            capacities=capacities,
            redraws=redraws,
            fallbacks=fallbacks,
        )

    @classmethod
    def _from_checked_ids(
        cls, grid, context_ids, context_lengths, target_ids, target_lengths, **options
    ) -> MaskBatch:
        """`_from_ids` for ids that come from outside: range and uniqueness are checked."""
        num_patches, images = grid[0] * grid[1], len(context_lengths)
        if images == 0 or target_lengths.shape[1] == 0:
            raise ValueError(f"at least one image and one block, got {target_lengths.shape}")
        check_ids("context", context_ids, context_lengths, num_patches)
        check_ids("targets", target_ids, target_lengths.ravel(), num_patches)
        union = np.zeros((images, num_patches), dtype=bool)
        union[np.repeat(np.arange(images), target_lengths.sum(axis=1)), target_ids] = True
        return cls._from_ids(
            grid, context_ids, context_lengths, target_ids, target_lengths, union, **options
        )

    @classmethod
    def _from_ids(
        cls,
        grid: tuple[int, int],
        context_ids: np.ndarray,  # (Tc,)
        context_lengths: np.ndarray,  # (B,)
        target_ids: np.ndarray,  # (Tt,)
        target_lengths: np.ndarray,  # (B, M)
        union: np.ndarray,  # (B, N) bool
        *,
        max_seqlens: MaskSizes | None = None,
        capacities: Sequence[MaskSizes] | int | None = None,
        redraws: int = 0,
        fallbacks: int = 0,
    ) -> MaskBatch:
        _keep_freed_memory()
        images, num_patches = union.shape
        blocks = target_lengths.shape[1]
        union_rows = np.flatnonzero(union)
        union_lengths = sequence_lengths(union_rows, images, num_patches)
        totals = MaskSizes(
            context=len(context_ids),
            targets=len(target_ids),
            predictor=len(context_ids) * blocks + len(target_ids),
            target_union=len(union_rows),
        )
        capacity = padded_sizes(totals, capacities)
        bounds = max_seqlens or MaskSizes(
            context=int(context_lengths.max()),
            targets=int(target_lengths.max()),
            predictor=int((context_lengths[:, None] + target_lengths).max()),
            target_union=num_patches,
        )

        image_of_target = np.repeat(np.arange(images) * num_patches, target_lengths.sum(axis=1))
        target_rows = target_ids + image_of_target
        place_in_union = np.cumsum(union) - 1
        context_packing = pack_lengths(
            context_lengths, max_seqlen=bounds.context, capacity=capacity.context
        )
        target_packing = pack_lengths(
            target_lengths.ravel(),
            max_seqlen=bounds.targets,
            capacity=capacity.targets,
            unique=blocks == 1,  # the blocks of an image may overlap
        )
        return cls(
            grid=(grid[0], grid[1]),
            num_targets=blocks,
            context=padded_ids(context_ids, capacity.context),
            context_packing=context_packing,
            targets=padded_ids(target_ids, capacity.targets),
            target_packing=target_packing,
            predictor_packing=pack_predictor(
                context_packing,
                target_packing,
                max_seqlen=bounds.predictor,
                capacity=capacity.predictor,
            ),
            target_rows=padded_ids(target_rows, capacity.targets),
            target_union=padded_ids(union_rows, capacity.target_union),
            target_union_packing=pack_lengths(
                union_lengths, max_seqlen=bounds.target_union, capacity=capacity.target_union
            ),
            target_rows_in_union=padded_ids(place_in_union[target_rows], capacity.targets),
            redraws=redraws,
            fallbacks=fallbacks,
        )


def _cut(fields: dict[str, object], block: Tensor) -> MaskBatch:
    """The inverse of `MaskBatch._in_one_block`."""
    skeleton = MaskBatch(**fields)  # type: ignore[arg-type]
    views = views_of(tensors_of(skeleton), block)
    return skeleton.map_tensors(lambda _: next(views))


def _sequence(ids: Tensor, packing: Packing, sequence: int) -> Tensor:
    return ids[packing.cu_seqlens[sequence] : packing.cu_seqlens[sequence + 1]]


@functools.cache
def _keep_freed_memory() -> None:
    """Once a process: glibc is to keep what batches free.

    A batch's arrays are each about a megabyte. glibc gives blocks of that size back to the system
    as they are freed, and page faults on the new ones took more than half the time of building a
    batch. Freeing one large block, never touched, tells it to keep up to twice as much from then
    on.
    """
    np.empty(16 << 20, dtype=np.uint8)

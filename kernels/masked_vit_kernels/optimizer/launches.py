"""Tables and launches of the optimiser step on a GPU; the kernels are `kernels.py`'s."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from masked_vit_kernels.launch import KernelLaunch
from masked_vit_kernels.optimizer.kernels import (
    COEFFICIENTS,
    GROUP_VALUES,
    TABLE_COLUMNS,
    decide_kernel,
    gradient_norm_kernel,
    update_kernel,
)
from masked_vit_kernels.optimizer.multi_tensor import (
    READ_BLOCK,
    TILE,
    TRITON_TYPES,
    UPDATE_BLOCK,
    addresses,
    tile_map,
)
from masked_vit_kernels.optimizer.slots import GroupValues, Slot

NOT_UPLOADED = -1  # a gradient address that was never sent: the step is skipped, not wrong
MAX_CAPTURES = 32  # CUDA graphs that may hold a step of one set of tables


@dataclass(frozen=True)
class Bucket:
    """Consecutive tiles of one combination of dtypes."""

    first_tile: int
    num_tiles: int
    source: torch.dtype
    gradient: torch.dtype
    target: torch.dtype


def gradient_norm_launch(
    tiles: Tensor, table: Tensor, gradients: Tensor, partials: Tensor, bucket: Bucket
) -> KernelLaunch:
    """(a): sums of squares of the bucket's gradients into its part of `partials`."""
    return KernelLaunch(
        kernel=gradient_norm_kernel,
        grid=(bucket.num_tiles,),
        arguments={
            "tiles_ptr": tiles,
            "table_ptr": table,
            "gradients_ptr": gradients,
            "partials_ptr": partials,
            "first_tile": bucket.first_tile,
            "GRADIENT_DTYPE": TRITON_TYPES[bucket.gradient],
            "TILE": TILE,
            "BLOCK": READ_BLOCK,
        },
    )


def decide_launch(
    partials: Tensor,
    loss: Tensor | None,
    hyper: Tensor,
    groups: Tensor,
    gradients: Tensor,
    steps: Tensor,
    coefficients: Tensor,
    scalars: Tensor,
    status: tuple[Tensor, Tensor, Tensor],
) -> KernelLaunch:
    """(b): norm, skip decision, step counts, coefficients. `status`: the three public tensors."""
    grad_norm, skipped, skip_count = status
    return KernelLaunch(
        kernel=decide_kernel,
        grid=(1,),
        arguments={
            "partials_ptr": partials,
            "num_partials": partials.numel(),
            "loss_ptr": partials if loss is None else loss,
            "hyper_ptr": hyper,
            "groups_ptr": groups,
            "gradients_ptr": gradients,
            "steps_ptr": steps,
            "num_slots": steps.numel(),
            "coefficients_ptr": coefficients,
            "scalars_ptr": scalars,
            "grad_norm_ptr": grad_norm,
            "skipped_ptr": skipped.view(torch.uint8),
            "skip_count_ptr": skip_count,
            "HAS_LOSS": loss is not None,
            "BLOCK": 1024,
        },
        num_warps=8,
    )


def update_launch(
    tiles: Tensor,
    table: Tensor,
    gradients: Tensor,
    coefficients: Tensor,
    scalars: Tensor,
    bucket: Bucket,
) -> KernelLaunch:
    """(c): one pass over everything the bucket's slots hold."""
    return KernelLaunch(
        kernel=update_kernel,
        grid=(bucket.num_tiles,),
        arguments={
            "tiles_ptr": tiles,
            "table_ptr": table,
            "gradients_ptr": gradients,
            "coefficients_ptr": coefficients,
            "scalars_ptr": scalars,
            "first_tile": bucket.first_tile,
            "SOURCE_DTYPE": TRITON_TYPES[bucket.source],
            "GRADIENT_DTYPE": TRITON_TYPES[bucket.gradient],
            "TARGET_DTYPE": TRITON_TYPES[bucket.target],
            "TILE": TILE,
            "BLOCK": UPDATE_BLOCK,
        },
    )


class DeviceTables:
    """What the launches read besides the tensors themselves, in the memory of the device.

    Gradient addresses live in rows: row 0 is rewritten by every step that is not captured, and
    every captured step owns a row, so that graphs do not disturb each other.
    """

    def __init__(
        self, slots: Sequence[Slot], steps: Tensor, gradient_dtypes: Sequence[torch.dtype]
    ):
        """`steps`: (P,) float32. `gradient_dtypes`: what each slot's gradient will be."""
        device = steps.device
        self.slots, self.steps, self.gradient_dtypes = slots, steps, list(gradient_dtypes)
        tiles, self.buckets = _bucketed_tiles(slots, gradient_dtypes)
        self.tiles = tiles.to(device)
        self.table = _pointer_table(slots).to(device)
        groups = [slot.group for slot in slots]
        self.groups = torch.tensor(groups, dtype=torch.int32, device=device)
        # Even rows keep every row 16-byte aligned: all run the kernel variant compiled first.
        rows = (1 + MAX_CAPTURES, len(slots) + len(slots) % 2)
        self.gradients = torch.full(rows, NOT_UPLOADED, dtype=torch.int64, device=device)
        self.partials = torch.zeros(max(len(tiles), 1), device=device)
        self.coefficients = torch.zeros(len(slots), COEFFICIENTS.value, device=device)
        self.scalars = torch.zeros(4, device=device)
        num_groups = 1 + max(groups, default=0)
        self.hyper = torch.zeros(
            2 + num_groups * GROUP_VALUES.value, dtype=torch.float64, device=device
        )
        self._uploaded: list[float] | None = None
        self._captured_rows: list[list[int]] = []
        self._rows_on_device = 0

    def upload(
        self, groups: Sequence[GroupValues], momentum: float | Tensor, max_grad_norm: float | None
    ) -> None:
        """Send what has changed: hyper-parameters, and gradient addresses of captured steps."""
        limit = math.inf if max_grad_norm is None else max_grad_norm
        values = [momentum, limit] + [value for group in groups for value in group]
        numbers = [0.0 if isinstance(value, Tensor) else float(value) for value in values]
        if numbers != self._uploaded:
            self.hyper.copy_(_on_host(numbers, torch.float64, self.hyper.device), non_blocking=True)
            self._uploaded = numbers
        self.copy_tensor_values(groups, momentum)
        while self._rows_on_device < len(self._captured_rows):
            row = _on_host(
                self._captured_rows[self._rows_on_device], torch.int64, self.hyper.device
            )
            self._rows_on_device += 1
            self.gradients[self._rows_on_device, : len(row)].copy_(row, non_blocking=True)

    def copy_tensor_values(self, groups: Sequence[GroupValues], momentum: float | Tensor) -> None:
        """Hyper-parameters given as tensors, copied on the device (in a capture: by the graph)."""
        values = [momentum, 0.0] + [value for group in groups for value in group]
        for place, value in enumerate(values):
            if isinstance(value, Tensor):
                self.hyper[place].copy_(value, non_blocking=True)

    def send_gradients(self, gradients: Sequence[Tensor | None], capturing: bool) -> Tensor:
        """(P,) int64 on the device: the addresses of this step's gradients."""
        column = addresses(gradients)
        if not capturing:
            host = _on_host(column, torch.int64, self.hyper.device)
            return self.gradients[0, : len(column)].copy_(host, non_blocking=True)
        if len(self._captured_rows) == MAX_CAPTURES:
            raise RuntimeError(f"at most {MAX_CAPTURES} graphs can hold a step of one AdamWEMA")
        self._captured_rows.append(column)
        return self.gradients[len(self._captured_rows), : len(column)]

    def sum_squares(self, gradients: Tensor) -> Tensor:
        """Launch (a). `gradients`: (P,) addresses -> (number of tiles,) float32."""
        for bucket in self.buckets:
            gradient_norm_launch(self.tiles, self.table, gradients, self.partials, bucket).run()
        return self.partials

    def decide(
        self,
        gradients: Tensor,
        squares: Tensor,
        loss: Tensor | None,
        status: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        """Launch (b)."""
        decide_launch(
            squares,
            loss,
            self.hyper,
            self.groups,
            gradients,
            self.steps,
            self.coefficients,
            self.scalars,
            status,
        ).run()

    def update(self, gradients: Tensor) -> None:
        """Launch (c)."""
        for bucket in self.buckets:
            update_launch(
                self.tiles, self.table, gradients, self.coefficients, self.scalars, bucket
            ).run()


def _on_host(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A host tensor whose copy to `device` need not be waited for.

    PyTorch's caching allocator keeps page-locked memory until the copies that read it are done.
    """
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")


def _bucketed_tiles(
    slots: Sequence[Slot], gradient_dtypes: Sequence[torch.dtype]
) -> tuple[Tensor, list[Bucket]]:
    """The tiles of all slots, those of one combination of dtypes side by side."""
    members: dict[tuple, list[int]] = {}
    for index, (slot, gradient_dtype) in enumerate(zip(slots, gradient_dtypes, strict=True)):
        source = slot.source.flat.dtype
        target = source if slot.target is None else slot.target.flat.dtype
        members.setdefault((source, gradient_dtype, target), []).append(index)
    parts, buckets, first = [], [], 0
    for dtypes, indices in members.items():
        part = tile_map([slots[i].numel for i in indices])
        part[:, 0] = torch.tensor(indices, dtype=torch.int32)[part[:, 0].long()]
        parts.append(part)
        buckets.append(Bucket(first, len(part), *dtypes))
        first += len(part)
    tiles = torch.cat(parts) if parts else torch.zeros(0, 2, dtype=torch.int32)
    return tiles, [bucket for bucket in buckets if bucket.num_tiles]


def _pointer_table(slots: Sequence[Slot]) -> Tensor:
    """(P, TABLE_COLUMNS) int64 on the host, see `kernels.py`."""
    table = torch.zeros(len(slots), TABLE_COLUMNS.value, dtype=torch.int64)
    for index, slot in enumerate(slots):
        columns = (
            slot.master,
            slot.shadow,
            slot.exp_avg,
            slot.exp_avg_sq,
            slot.target_master,
            slot.target_shadow,
        )
        table[index, :7] = torch.tensor([*addresses(columns), slot.numel])
    return table

"""Fixed 2-D sine-cosine positions and their resize to another grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Positions of a grid's patches in raster order, (1, N, width) float32.

    The first half of the channels encodes the column and the second half the row, as in the
    released checkpoints; each half is sines, then cosines, of the index over 10000^(i / quarter).

    Args:
        grid: (rows, columns) of patches.

    Raises:
        ValueError: `width` is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width divisible by 4, got {width}")
    rows, columns = grid
    quarter = width // 4
    frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)  # (D / 4,)

    def encode(count: int) -> Tensor:  # (count, D / 2)
        angle = torch.arange(count, dtype=torch.float64)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    column = encode(columns)[None].expand(rows, -1, -1)  # (rows, columns, D / 2)
    row = encode(rows)[:, None].expand(-1, columns, -1)  # (rows, columns, D / 2)
    return torch.cat([column, row], dim=2).reshape(1, rows * columns, width).float()


def resize_positions(positions: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Interpolate (1, N, D) positions of `grid` to `new_grid`, bicubically; no token is special.

    Raises:
        ValueError: `positions` does not hold one row a patch of `grid`.
    """
    rows, columns = grid
    if positions.ndim != 3 or positions.shape[:2] != (1, rows * columns):
        raise ValueError(
            f"positions of a {rows}x{columns} grid must have shape (1, {rows * columns}, D),"
            f" got {tuple(positions.shape)}"
        )
    if grid == new_grid:
        return positions
    as_image = positions.reshape(1, rows, columns, -1).permute(0, 3, 1, 2).float()
    resized = F.interpolate(as_image, size=new_grid, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).to(positions.dtype)

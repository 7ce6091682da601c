"""Masks drawn on the images they belong to."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ijepa.masks.batch import MaskBatch

PALETTE = ((226, 88, 34), (46, 134, 193), (241, 196, 15), (39, 174, 96), (142, 68, 173))
_PAPER = 255
_GAP = 6  # pixels between pictures


def draw_mask_examples(
    images: Tensor, masks: MaskBatch, count: int = 8, height: int = 128
) -> np.ndarray:
    """Three rows of pictures, a column an image: the image, its context, its target blocks.

    Args:
        images: (B, C, Hi, Wi) uint8; the first three channels are shown, or one as grey.
        masks: theirs, on the host.
        count: columns, at most B.
        height: of each picture in pixels, rounded to a multiple of the image's.

    Returns:
        (height of the sheet, width of the sheet, 3) uint8.
    """
    columns = []
    for index in range(min(count, images.shape[0])):
        pixels = _rgb(images[index].numpy())  # (Hi, Wi, 3)
        zoom = max(round(height / pixels.shape[0]), 1)
        pixels = pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)
        grid = masks.grid
        context = _patch_map(masks.context_of(index).numpy(), grid, pixels.shape)
        blocks = [
            _patch_map(block.numpy(), grid, pixels.shape) for block in masks.targets_of(index)
        ]
        columns.append(
            _stack(
                [pixels, _veiled(pixels, context), _outlined(pixels, blocks, max(zoom // 2, 2))],
                axis=0,
            )
        )
    return _stack(columns, axis=1)


def _rgb(image: np.ndarray) -> np.ndarray:
    """(C, H, W) uint8 -> (H, W, 3)."""
    shown = image[:3] if image.shape[0] >= 3 else image[:1].repeat(3, axis=0)
    return shown.transpose(1, 2, 0)


def _patch_map(ids: np.ndarray, grid: tuple[int, int], shape: tuple[int, ...]) -> np.ndarray:
    """Patch ids (K,) -> (H, W) bool, true on their pixels."""
    cells = np.zeros(grid[0] * grid[1], dtype=bool)
    cells[ids] = True
    cells = cells.reshape(grid)
    return cells.repeat(shape[0] // grid[0], axis=0).repeat(shape[1] // grid[1], axis=1)


def _veiled(pixels: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """What the context encoder sees: everything else is paper with a hint of the image."""
    hint = 0.08 * pixels + 0.92 * 232
    return np.where(visible[..., None], pixels, hint).astype(np.uint8)


def _outlined(pixels: np.ndarray, blocks: list[np.ndarray], width: int) -> np.ndarray:
    """The target blocks as windows in a pale image, each framed in a colour of its own."""
    covered = np.any(blocks, axis=0)
    drawn = np.where(covered[..., None], pixels, 0.25 * pixels + 0.75 * 232)
    for number, block in enumerate(blocks):
        drawn[_border(block, width)] = PALETTE[number % len(PALETTE)]
    return drawn.astype(np.uint8)


def _border(block: np.ndarray, width: int) -> np.ndarray:
    """(H, W) bool: pixels of the block closer than `width` to its outside."""
    padded = np.pad(block, width)
    rows, columns = block.shape
    inner = block.copy()
    for step in range(1, width + 1):
        for dy, dx in ((step, 0), (-step, 0), (0, step), (0, -step), (step, step), (step, -step),
                       (-step, step), (-step, -step)):  # fmt: skip
            top, left = width + dy, width + dx
            inner &= padded[top : top + rows, left : left + columns]
    return block & ~inner


def _stack(pictures: list[np.ndarray], axis: int) -> np.ndarray:
    """Pictures side by side (axis 1) or one below the other (axis 0), with gaps between them."""
    shape = list(pictures[0].shape)
    shape[axis] = _GAP
    gap = np.full(shape, _PAPER, dtype=np.uint8)
    parts = [part for picture in pictures for part in (picture, gap)]
    return np.concatenate(parts[:-1], axis=axis)

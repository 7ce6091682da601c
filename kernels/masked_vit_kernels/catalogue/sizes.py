"""Sizes of the released models and predictors: what kernels are tuned, compiled and timed for.

ViT-T to ViT-G, images of the recipes, and the predictors beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD_DIMS = (24, 32, 64, 80, 88)
ENCODER_WIDTHS = (192, 384, 768, 1024, 1280, 1408)
PREDICTOR_WIDTHS = (192, 384)
TARGET_BLOCKS = (1, 4)  # M


@dataclass(frozen=True)
class Geometry:
    """Images (3, size, size) in square patches, and the encoder widths that go with them."""

    size: int
    patch: int
    widths: tuple[int, ...]


GEOMETRIES = (
    Geometry(224, 16, (192, 384, 768, 1024, 1408)),
    Geometry(224, 14, (1280,)),
    Geometry(448, 16, (1280,)),
)

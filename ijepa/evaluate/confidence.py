"""How sure an accuracy is."""

from __future__ import annotations

import math

_DEVIATIONS = 1.959964  # of a normal distribution that hold 95 % of it


def wilson_interval(accuracy: float, images: int) -> tuple[float, float]:
    """95 % confidence interval (low, high) of an accuracy in [0, 1] on so many test images.

    Wilson's score interval. It speaks of the draw of the test images alone: not of the training,
    and not of the choice of the best among several.

    Raises:
        ValueError: no image, or an accuracy outside [0, 1].
    """
    if images < 1 or not 0 <= accuracy <= 1:
        raise ValueError(f"an accuracy in [0, 1] on images expected, got {accuracy} on {images}")
    square = _DEVIATIONS**2 / images
    centre = (accuracy + square / 2) / (1 + square)
    spread = accuracy * (1 - accuracy) / images + square / (4 * images)
    half = _DEVIATIONS * math.sqrt(spread) / (1 + square)
    return max(centre - half, 0.0), min(centre + half, 1.0)

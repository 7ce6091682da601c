"""When figures of a run say that it does not learn, and what to try.

The thresholds are provisional: they separate runs of width 96 on procedural shapes that learned
from runs that did not (docs/small_data.md), and large models have not been held against them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIRST_STEP = 1000  # before it, and during warm-up, nothing is said
LOWEST_R2 = 0.02
LOWEST_ENCODER_GRADIENT = 1e-4
LOWEST_RANK_SHARE = 0.15  # centred effective rank over the width
HIGHEST_IMAGE_SHARE = 0.6

INIT_HINT = "try --model.init fan_in"
NORM_HINT = "try --model.target-norm instance"


def learning_warnings(
    figures: Mapping[str, Any], width: int, warmup_steps: int
) -> dict[str, str]:
    """Kind of trouble -> a sentence with the figure, its limit and what to try; empty if healthy.

    Args:
        figures: a panel's line of the log: `step`, and the figures of `Panel` and `Learning`. Those
            that are missing or None are not judged.
        width: of the encoder, which bounds the rank.
        warmup_steps: of the schedule.
    """
    found: dict[str, str] = {}
    step = figures["step"]
    if step < max(FIRST_STEP, warmup_steps):
        return found
    r2, gradient = figures.get("r2"), figures.get("encoder_grad_norm")
    image_share, rank = figures.get("image_share"), figures.get("centred_rank")
    if r2 is not None and r2 < LOWEST_R2:
        found["context ignored"] = (
            f"the predictor ignores the context: R2 {r2:.3f} after {step:,} steps, healthy above "
            f"{LOWEST_R2}; {INIT_HINT}, or a longer warm-up"
        )
    if gradient is not None and gradient < LOWEST_ENCODER_GRADIENT:
        found["encoder stands still"] = (
            f"hardly any gradient reaches the encoder: norm {gradient:.1e} after {step:,} steps, "
            f"healthy above {LOWEST_ENCODER_GRADIENT:.0e}; {INIT_HINT}"
        )
    if image_share is not None and image_share > HIGHEST_IMAGE_SHARE:
        found["easy targets"] = (
            f"{100 * image_share:.0f} % of the targets' variance is shared by all patches of an "
            f"image after {step:,} steps, healthy below {100 * HIGHEST_IMAGE_SHARE:.0f} %: easy "
            f"to predict, with little to learn; {NORM_HINT}"
        )
    if rank is not None and rank < LOWEST_RANK_SHARE * width:
        found["few directions"] = (
            f"images differ in few directions: centred effective rank {rank:.1f} of {width} after "
            f"{step:,} steps, healthy above {LOWEST_RANK_SHARE * width:.0f}; {INIT_HINT} and "
            "--model.target-norm instance"
        )
    return found

"""Learning rate, weight decay and momentum: pure functions of the step.

`step` counts from 0. The released schedulers advance before the first update, so the learning
rate and the weight decay of step s are their formulas at s + 1, and the momentum's at s. Past
`total_steps` every schedule stays at its final value.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ijepa.config import ScheduleConfig


class ScheduleValues(NamedTuple):
    """The settings of one step."""

    lr: float
    weight_decay: float
    momentum: float


def schedule_at(config: ScheduleConfig, step: int) -> ScheduleValues:
    """All three values of `step`."""
    return ScheduleValues(
        learning_rate(config, step), weight_decay(config, step), momentum(config, step)
    )


def learning_rate(config: ScheduleConfig, step: int) -> float:
    """Linear from `start_lr` to `peak_lr` over the warm-up, then a half cosine to `final_lr`."""
    done = step + 1
    if done < config.warmup_steps:
        return config.start_lr + (config.peak_lr - config.start_lr) * done / config.warmup_steps
    progress = _share(done - config.warmup_steps, config.num_steps - config.warmup_steps)
    return _cosine(config.peak_lr, config.final_lr, progress)


def weight_decay(config: ScheduleConfig, step: int) -> float:
    """From `weight_decay` to `final_weight_decay`: cosine (released code) or linear (paper)."""
    progress = _share(step + 1, config.num_steps)
    if config.weight_decay_shape == "cosine":
        return _cosine(config.weight_decay, config.final_weight_decay, progress)
    return config.weight_decay + (config.final_weight_decay - config.weight_decay) * progress


def momentum(config: ScheduleConfig, step: int) -> float:
    """Of the target encoder, linear from `momentum` to `final_momentum`."""
    progress = _share(step, config.num_steps)
    return config.momentum + (config.final_momentum - config.momentum) * progress


def due(every: int, done: int, last: int) -> bool:
    """Whether what happens every so many steps, and after the last, is due; 0 is never."""
    return every > 0 and (done % every == 0 or done == last)


def _share(done: int, total: int) -> float:
    return min(done / max(total, 1), 1.0)


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))

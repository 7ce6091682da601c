"""Schedules are pure functions of the step; the golden test holds their released values."""

import math
from dataclasses import replace

import pytest

from ijepa import ScheduleConfig
from ijepa.train.schedules import learning_rate, momentum, schedule_at, weight_decay

CONFIG = ScheduleConfig(
    total_steps=100,
    warmup_steps=10,
    start_lr=1e-4,
    peak_lr=1e-3,
    final_lr=1e-6,
    weight_decay=0.04,
    final_weight_decay=0.4,
    momentum=0.996,
    final_momentum=1.0,
)


def test_learning_rate_rises_linearly_then_falls_as_a_half_cosine():
    # the value of step s belongs to s + 1 finished steps
    assert learning_rate(CONFIG, 0) == pytest.approx(1e-4 + 9e-4 * 1 / 10, abs=1e-15)
    assert learning_rate(CONFIG, 4) == pytest.approx(1e-4 + 9e-4 * 5 / 10, abs=1e-15)
    assert learning_rate(CONFIG, 9) == pytest.approx(1e-3, abs=1e-15)
    assert learning_rate(CONFIG, 54) == pytest.approx((1e-3 + 1e-6) / 2, abs=1e-15)
    third = 1e-6 + (1e-3 - 1e-6) * (1 + math.cos(math.pi / 3)) / 2
    assert learning_rate(CONFIG, 39) == pytest.approx(third, abs=1e-15)
    assert learning_rate(CONFIG, 99) == pytest.approx(1e-6, abs=1e-15)
    values = [learning_rate(CONFIG, step) for step in range(100)]
    assert values[:10] == sorted(values[:10]) and values[9:] == sorted(values[9:], reverse=True)


def test_weight_decay_cosine_and_linear():
    linear = replace(CONFIG, weight_decay_shape="linear")
    for config in (CONFIG, linear):
        assert weight_decay(config, 49) == pytest.approx(0.22, abs=1e-15)
        assert weight_decay(config, 99) == pytest.approx(0.4, abs=1e-15)
    assert weight_decay(linear, 24) == pytest.approx(0.13, abs=1e-15)
    cosine = 0.4 - 0.36 * (1 + math.cos(math.pi / 4)) / 2
    assert weight_decay(CONFIG, 24) == pytest.approx(cosine, abs=1e-15)


def test_a_constant_weight_decay_stays_constant():
    """Table 13 of the paper: a fixed .05."""
    for shape in ("cosine", "linear"):
        config = replace(
            CONFIG, weight_decay=0.05, final_weight_decay=0.05, weight_decay_shape=shape
        )
        assert {weight_decay(config, step) for step in range(100)} == {0.05}


def test_momentum_starts_at_its_first_value():
    assert momentum(CONFIG, 0) == 0.996
    assert momentum(CONFIG, 50) == pytest.approx(0.998, abs=1e-15)
    assert momentum(CONFIG, 100) == 1.0


def test_after_the_end_everything_stays():
    assert schedule_at(CONFIG, 1000) == schedule_at(CONFIG, 10_000)
    assert schedule_at(CONFIG, 1000) == pytest.approx((1e-6, 0.4, 1.0), abs=1e-15)


def test_no_warm_up_starts_below_the_peak():
    config = replace(CONFIG, warmup_steps=0)
    assert 0.99e-3 < learning_rate(config, 0) < 1e-3


def test_warm_up_as_long_as_the_run():
    config = replace(CONFIG, warmup_steps=100)
    assert learning_rate(config, 98) < learning_rate(config, 99) == pytest.approx(1e-3)

"""AdamWEMA's cases: each combination of dtypes of weights, gradients and averages that is used."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from masked_vit_kernels import adamw_ema_launch as launches
from masked_vit_kernels.adamw_ema_kernels import COEFFICIENTS, TABLE_COLUMNS
from masked_vit_kernels.catalogue.case import Case, code_of, meta

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16

# (weights, gradients): rounded weights may have gradients summed in float32.
UPDATES = (
    (FLOAT32, FLOAT32),
    (BFLOAT16, BFLOAT16),
    (BFLOAT16, FLOAT32),
    (FLOAT16, FLOAT16),
    (FLOAT16, FLOAT32),
)


def optimizer_cases() -> Iterator[Case]:
    """The three launches of a step."""
    tiles, slots = 64, 8
    tile_map = meta(tiles, 2, dtype=torch.int32)
    table = meta(slots, TABLE_COLUMNS.value, dtype=torch.int64)
    gradients = meta(slots, dtype=torch.int64)
    coefficients, scalars = meta(slots, COEFFICIENTS.value), meta(4)
    for dtype in (FLOAT32, BFLOAT16, FLOAT16):
        bucket = launches.Bucket(0, tiles, dtype, dtype, dtype)
        launch = launches.gradient_norm_launch(tile_map, table, gradients, meta(tiles), bucket)
        keys = {"gradient_dtype": code_of(dtype)}
        yield Case("adamw_ema_gradient_norm", keys, (launch,), "streaming_with_tails")
    for weights, gradient in UPDATES:
        bucket = launches.Bucket(0, tiles, weights, gradient, weights)
        launch = launches.update_launch(tile_map, table, gradients, coefficients, scalars, bucket)
        keys = {"dtype": code_of(weights), "gradient_dtype": code_of(gradient)}
        yield Case("adamw_ema_update", keys, (launch,), "streaming_with_tails")
    status = meta(), meta(dtype=torch.bool), meta(dtype=torch.int64)
    for has_loss in (False, True):
        launch = launches.decide_launch(
            meta(tiles), meta() if has_loss else None, meta(12, dtype=torch.float64),
            meta(slots, dtype=torch.int32), gradients, meta(slots), coefficients, scalars, status,
        )  # fmt: skip
        yield Case("adamw_ema_decide", {"has_loss": has_loss}, (launch,), "reported")

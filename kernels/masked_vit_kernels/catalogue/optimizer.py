"""The optimiser's cases: each combination of dtypes of weights, gradients and averages in use."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from masked_vit_kernels.catalogue.case import Case, meta
from masked_vit_kernels.optimizer import ema, launches
from masked_vit_kernels.optimizer.float8_copies import TABLE_COLUMNS as TABLE_COLUMNS_OF_COPIES
from masked_vit_kernels.optimizer.float8_copies import quantize_launch
from masked_vit_kernels.optimizer.kernels import COEFFICIENTS, TABLE_COLUMNS

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
CORE_DTYPES = (FLOAT32, BFLOAT16)

# (weights, gradients): rounded weights may have gradients summed in float32.
UPDATES = (
    (FLOAT32, FLOAT32),
    (BFLOAT16, BFLOAT16),
    (BFLOAT16, FLOAT32),
    (FLOAT16, FLOAT16),
    (FLOAT16, FLOAT32),
)


def optimizer_cases(capability: int) -> Iterator[Case]:
    """The moving average alone, the three launches of an `AdamWEMA` step, float8 copies."""
    yield from _ema_cases()
    yield from _adamw_cases()
    if capability >= 90:  # no table entry below has float8
        yield from _float8_cases()


def _float8_cases() -> Iterator[Case]:
    """Rows as wide as the layers of ViT-B to ViT-G; for Python alone."""
    table = meta(8, TABLE_COLUMNS_OF_COPIES.value, dtype=torch.int64)
    for dtype in (FLOAT32, BFLOAT16):
        for width in (1024, 2048, 8192):
            launch = quantize_launch(meta(64, dtype=torch.int32), table, dtype, width)
            yield Case(
                "float8_copies", {"dtype": dtype, "row_up_to": width}, (launch,), ("streaming",),
                core=dtype == BFLOAT16 and width == 8192, in_library=False,
            )  # fmt: skip


def _ema_cases() -> Iterator[Case]:
    tiles, table = meta(64, 2, dtype=torch.int32), meta(8, 4, dtype=torch.int64)
    for dtype in (BFLOAT16, FLOAT16, FLOAT32):
        for on_device in (0, 1):
            launch = ema.ema_launch(tiles, table, meta() if on_device else 0.996, dtype)
            yield Case(
                "ema_update", {"source_dtype": dtype, "momentum_on_device": on_device}, (launch,),
                ("streaming_with_tails",), core=dtype in CORE_DTYPES and not on_device,
            )  # fmt: skip


def _adamw_cases() -> Iterator[Case]:
    tiles, slots = 64, 8
    tile_map = meta(tiles, 2, dtype=torch.int32)
    table = meta(slots, TABLE_COLUMNS.value, dtype=torch.int64)
    gradients = meta(slots, dtype=torch.int64)
    coefficients, scalars = meta(slots, COEFFICIENTS.value), meta(4)
    for dtype in (FLOAT32, BFLOAT16, FLOAT16):
        bucket = launches.Bucket(0, tiles, dtype, dtype, dtype)
        launch = launches.gradient_norm_launch(tile_map, table, gradients, meta(tiles), bucket)
        yield Case(
            "adamw_ema_gradient_norm", {"gradient_dtype": dtype}, (launch,),
            ("streaming_with_tails",), core=dtype in CORE_DTYPES,
        )  # fmt: skip
    for weights, gradient in UPDATES:
        bucket = launches.Bucket(0, tiles, weights, gradient, weights)
        launch = launches.update_launch(tile_map, table, gradients, coefficients, scalars, bucket)
        yield Case(
            "adamw_ema_update", {"dtype": weights, "gradient_dtype": gradient}, (launch,),
            ("streaming_with_tails",), core=weights == gradient and weights in CORE_DTYPES,
        )  # fmt: skip
    status = meta(), meta(dtype=torch.bool), meta(dtype=torch.int64)
    for has_loss in (0, 1):
        launch = launches.decide_launch(
            meta(tiles), meta() if has_loss else None, meta(12, dtype=torch.float64),
            meta(slots, dtype=torch.int32), gradients, meta(slots), coefficients, scalars, status,
        )  # fmt: skip
        yield Case(
            "adamw_ema_decide", {"has_loss": has_loss}, (launch,), ("reported",),
            core=bool(has_loss),
        )  # fmt: skip

"""Which launches the C library holds: one `Case` an entry of its tables.

Every launch is built from `meta` tensors by the op's own launch function, so that constexprs,
options and divisibility hints are those of the Python launch. A case adds the keys by which the C
function finds it. Nothing here says what a tile is or how many warps run it.

Sizes are the models': widths and head dims of ViT-T to ViT-G and their predictors, images of the
recipes, ids as int64, `cu_seqlens` and maps as int32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from masked_vit_kernels import ema, prediction_loss, predictor_tokens, rows
from masked_vit_kernels import gather_kernels as gather
from masked_vit_kernels import patch_embed_kernels as embed
from masked_vit_kernels.catalogue.attention import attention_cases
from masked_vit_kernels.catalogue.case import Case, code_of, meta
from masked_vit_kernels.catalogue.optimizer import optimizer_cases
from masked_vit_kernels.launch import KernelLaunch
from masked_vit_kernels.rows import RowIndex

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
ROW_DTYPES = (BFLOAT16, FLOAT16, FLOAT32)

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

# How rows find their image and token (`rows.py`): the value of the key `layout`.
EVERY_TOKEN, DENSE, PACKED = 0, 1, 2
LAYOUTS = (EVERY_TOKEN, DENSE, PACKED)

R, B, N = 4096, 32, 256  # any numbers of rows, images and tokens: the kernels are not told


def _index(layout: int) -> RowIndex:
    ids, sequences = meta(R, dtype=torch.int64), meta(R, dtype=torch.int32)
    return RowIndex(
        None if layout == EVERY_TOKEN else ids, sequences if layout == PACKED else None, 2, 2
    )


def all_cases(capability: int) -> Iterator[Case]:
    """Every case for one capability (80, 90 or 100)."""
    yield from attention_cases(capability)
    yield from _token_cases()
    yield from _embedding_cases(capability)
    yield from _predictor_cases()
    yield from _loss_cases()
    yield from _ema_cases()
    yield from optimizer_cases()


def _token_cases() -> Iterator[Case]:
    """Gather, scatter, its fill's gradient, and sums by place."""
    places = meta(B * N, dtype=torch.int32)
    for layout in (DENSE, PACKED):
        index = _index(layout)
        invert = gather.invert_rows_launch(index, N, places)
        yield Case("invert_rows", {"layout": layout}, (invert,), "reported")
        for dtype in ROW_DTYPES:
            for width in ENCODER_WIDTHS:
                keys = {"dtype": code_of(dtype), "width": width, "layout": layout}
                x, out = meta(B, N, width, dtype=dtype), meta(R, width, dtype=dtype)
                yield Case(
                    "gather_rows", keys, (gather.gather_rows_launch(x, index, out),), "streaming"
                )
                for filled in (False, True):
                    fill = x if filled else None
                    launch = gather.scatter_rows_launch(out, fill, index, places, x)
                    yield Case("scatter_rows", keys | {"filled": filled}, (launch,), "streaming")
                partial = meta(8, N, width)
                launch = gather.fill_gradient_launch(x, index, places, partial)
                yield Case("scatter_fill_gradient", keys, (launch,), "streaming")
    for dtype in ROW_DTYPES:
        for width in ENCODER_WIDTHS:
            values, order = meta(R, width, dtype=dtype), meta(R, dtype=torch.int64)
            for many in (False, True):
                num_places = R // (2 * rows.MANY_ROWS) if many else R
                launch = rows.segmented_sum_launch(
                    values, order, meta(num_places + 1, dtype=torch.int64),
                    meta(num_places, width, dtype=dtype),
                )  # fmt: skip
                keys = {"dtype": code_of(dtype), "width": width, "many": many}
                budget = "streaming_with_tails" if many else "streaming"
                yield Case("sum_rows_by_place", keys, (launch,), budget)


def _embedding_cases(capability: int) -> Iterator[Case]:
    """Patch rows, positions and their backward, and the fused embedding."""
    for geometry in GEOMETRIES:
        patch = (geometry.patch, geometry.patch)
        for image_dtype, dtype in (
            (torch.uint8, BFLOAT16), (torch.uint8, FLOAT16),
            (BFLOAT16, BFLOAT16), (FLOAT16, FLOAT16),
        ):  # fmt: skip
            images = meta(B, 3, geometry.size, geometry.size, dtype=image_dtype)
            # Pixels of bytes are normalised on the way, floats are taken as normalised.
            statistics = meta(3) if image_dtype == torch.uint8 else None
            pixels = embed.padded_pixels(images, patch)
            narrow = (geometry.patch & -geometry.patch) * images.element_size() < 4
            for layout in LAYOUTS:
                keys = {
                    "image_dtype": code_of(image_dtype), "dtype": code_of(dtype),
                    "image_size": geometry.size, "patch_size": geometry.patch, "layout": layout,
                }  # fmt: skip
                index = _index(layout)
                launch = embed.patch_rows_launch(
                    images, statistics, statistics, index, patch, meta(R, pixels, dtype=dtype)
                )
                budget = "narrow_pixels" if narrow else "pixels"
                yield Case("patch_rows", keys, (launch,), budget)
                if image_dtype != torch.uint8 or layout == DENSE:
                    continue
                for width in geometry.widths:
                    launch = embed.fused_patch_embed_launch(
                        images, statistics, statistics, meta(width, pixels, dtype=dtype),
                        meta(width, dtype=dtype), meta(N, width), index, patch,
                        meta(R, width, dtype=dtype), capability,
                    )  # fmt: skip
                    budget = "narrow_pixels_matmul" if narrow else "matmul"
                    yield Case("embed_visible_patches", keys | {"width": width}, (launch,), budget)
    for width in ENCODER_WIDTHS:
        for dtype in ROW_DTYPES:
            for layout in LAYOUTS:
                keys = {"dtype": code_of(dtype), "width": width, "layout": layout}
                x, index = meta(R, width, dtype=dtype), _index(layout)
                for bias_dtype in {dtype, FLOAT32}:
                    launch = embed.add_position_launch(
                        x, meta(width, dtype=bias_dtype), meta(N, width), index, N, x
                    )
                    bias_keys = keys | {"bias_dtype": code_of(bias_dtype)}
                    yield Case("add_position", bias_keys, (launch,), "streaming")
                launch = embed.add_position_backward_launch(x, index, N, x, meta(64, width))
                yield Case("add_position_backward", keys, (launch,), "streaming")


def _predictor_cases() -> Iterator[Case]:
    ids = meta(R, dtype=torch.int64)
    for width in PREDICTOR_WIDTHS:
        for dtype in ROW_DTYPES:
            x, partial = meta(R, width, dtype=dtype), meta(64, width)
            keys = {"dtype": code_of(dtype), "width": width}
            for mask_dtype in ROW_DTYPES if dtype == FLOAT32 else {dtype, FLOAT32}:
                launch = predictor_tokens.assemble_launch(
                    x, meta(width, dtype=mask_dtype), meta(N, width), ids, ids, ids, x
                )
                mask_keys = keys | {"mask_dtype": code_of(mask_dtype)}
                yield Case("assemble_predictor_tokens", mask_keys, (launch,), "streaming")
            for copies in TARGET_BLOCKS:
                launch = predictor_tokens.assemble_backward_launch(
                    x, meta(R, copies, dtype=torch.int64), ids, x, partial
                )
                yield Case(
                    "assemble_predictor_tokens_backward", keys | {"copies": copies}, (launch,),
                    "streaming",
                )  # fmt: skip


def _loss_cases() -> Iterator[Case]:
    ids, vector, pair = meta(R, dtype=torch.int64), meta(R), meta(2)
    pairs = {(dtype, feature) for dtype in ROW_DTYPES for feature in (dtype, FLOAT32)}
    for dtype, feature_dtype in sorted(pairs, key=str):
        for width in ENCODER_WIDTHS:
            for kind_code, kind in enumerate(prediction_loss.KINDS):
                keys = {
                    "dtype": code_of(dtype), "feature_dtype": code_of(feature_dtype),
                    "width": width, "kind": kind_code,
                }  # fmt: skip
                x, features = meta(R, width, dtype=dtype), meta(R, width, dtype=feature_dtype)
                launch = prediction_loss.loss_forward_launch(
                    x, features, ids, vector, vector, meta(2, 2048), kind
                )
                yield Case("prediction_loss", keys, (launch,), "streaming")
                launch = prediction_loss.loss_backward_launch(
                    meta(), pair, x, features, ids, vector, vector, x, kind
                )
                yield Case("prediction_loss_backward", keys, (launch,), "streaming")
    yield from _loss_finish_cases(pair)


def _loss_finish_cases(out: Tensor) -> Iterator[Case]:
    """By the number of partial sums, a power of two up to what `loss_programs` ever gives."""
    for denominator_code, denominator in (
        (-1, None), (code_of(FLOAT32), meta()), (code_of(torch.int64), meta(dtype=torch.int64)),
    ):  # fmt: skip
        by_block: dict[object, tuple[int, KernelLaunch]] = {}
        for num_programs in [2**k for k in range(12)]:
            assert prediction_loss.loss_programs(num_programs) == num_programs
            launch = prediction_loss.loss_finish_launch(meta(2, num_programs), denominator, 1, out)
            by_block[launch.arguments["BLOCK"]] = num_programs, launch
        for bound, launch in by_block.values():
            keys = {"denominator_dtype": denominator_code, "max_programs": bound}
            yield Case("loss_finish", keys, (launch,), "reported")


def _ema_cases() -> Iterator[Case]:
    tiles, table = meta(64, 2, dtype=torch.int32), meta(8, 4, dtype=torch.int64)
    for dtype in ROW_DTYPES:
        for on_device in (False, True):
            momentum = meta() if on_device else 0.996
            keys = {"source_dtype": code_of(dtype), "momentum_on_device": on_device}
            launch = ema.ema_launch(tiles, table, momentum, dtype)
            yield Case("ema_update", keys, (launch,), "streaming_with_tails")

"""The token ops' cases: gather and scatter, sums by place, embedding, predictor tokens, loss.

Ids are int64, `cu_seqlens` and maps int32. `CORE_WIDTH` in bfloat16 stands for all widths in the
core.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from masked_vit_kernels.catalogue.case import Case, Keys, meta
from masked_vit_kernels.catalogue.sizes import (
    ENCODER_WIDTHS,
    GEOMETRIES,
    PREDICTOR_WIDTHS,
    TARGET_BLOCKS,
)
from masked_vit_kernels.launch import KernelLaunch
from masked_vit_kernels.tokens import gather_kernels as gather
from masked_vit_kernels.tokens import image_statistics, predictor_tokens, sum_by_place
from masked_vit_kernels.tokens import patch_embed_kernels as embed
from masked_vit_kernels.tokens import prediction_loss_kernels as loss_kernels
from masked_vit_kernels.tokens.rows import RowIndex

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
ROW_DTYPES = (BFLOAT16, FLOAT16, FLOAT32)
CORE_WIDTH = 1280
LIBRARY_LOSSES = ("smooth_l1", "l2")  # kinds that the C library has

# How rows find their image and token (`rows.py`): the values of the key `layout`.
EVERY_TOKEN, DENSE, PACKED = "every_token", "dense", "packed"

R, B, N = 4096, 32, 256  # any numbers of rows, images and tokens: the kernels are not told


def token_cases(capability: int) -> Iterator[Case]:
    """All of them; `capability` matters to the fused embedding alone."""
    yield from _gather_cases()
    yield from _sum_cases()
    yield from _patch_cases(capability)
    yield from _position_cases()
    yield from _predictor_cases()
    yield from _loss_cases()


def _one(
    op: str,
    keys: Keys,
    launch: KernelLaunch,
    budget: str,
    core: bool = False,
    in_library: bool = True,
) -> Case:
    return Case(op, keys, (launch,), (budget,), core=core, in_library=in_library)


def _index(layout: str) -> RowIndex:
    ids, sequences = meta(R, dtype=torch.int64), meta(R, dtype=torch.int32)
    return RowIndex(
        None if layout == EVERY_TOKEN else ids, sequences if layout == PACKED else None, 2, 2
    )


def _is_core(dtype: torch.dtype, width: int) -> bool:
    return dtype == BFLOAT16 and width == CORE_WIDTH


def _with_float32(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """What a parameter beside rows of `dtype` may be: the same, or float32."""
    return (FLOAT32,) if dtype == FLOAT32 else (FLOAT32, dtype)


# ----------------------------------------------------------------------------- rows


def _gather_cases() -> Iterator[Case]:
    """Gather, scatter and its fill's gradient."""
    places = meta(B * N, dtype=torch.int32)
    for layout in (DENSE, PACKED):
        index = _index(layout)
        invert = gather.invert_rows_launch(index, N, places)
        yield _one("invert_rows", {"layout": layout}, invert, "reported", layout == PACKED)
        for dtype in ROW_DTYPES:
            for width in ENCODER_WIDTHS:
                keys: Keys = {"dtype": dtype, "width": width, "layout": layout}
                x, out = meta(B, N, width, dtype=dtype), meta(R, width, dtype=dtype)
                core = _is_core(dtype, width)
                launch = gather.gather_rows_launch(x, index, out)
                yield _one("gather_rows", keys, launch, "streaming", core)
                core = core and layout == PACKED
                for filled in (0, 1):
                    fill = x if filled else None
                    launch = gather.scatter_rows_launch(out, fill, index, places, x)
                    fill_keys = keys | {"filled": filled}
                    yield _one("scatter_rows", fill_keys, launch, "streaming", core)
                launch = gather.fill_gradient_launch(x, index, places, meta(8, N, width))
                yield _one("scatter_fill_gradient", keys, launch, "streaming", core)


def _sum_cases() -> Iterator[Case]:
    """Sums over places with few rows each and with many."""
    for dtype in ROW_DTYPES:
        for width in ENCODER_WIDTHS:
            values, order = meta(R, width, dtype=dtype), meta(R, dtype=torch.int64)
            for many in (0, 1):
                num_places = R // (2 * sum_by_place.MANY_ROWS) if many else R
                launch = sum_by_place.segmented_sum_launch(
                    values, order, meta(num_places + 1, dtype=torch.int64),
                    meta(num_places, width, dtype=dtype),
                )  # fmt: skip
                keys: Keys = {"dtype": dtype, "width": width, "many": many}
                # One row is stored for many read: its store may be narrow.
                budget = "streaming_with_tails" if many else "streaming"
                yield _one("sum_rows_by_place", keys, launch, budget, _is_core(dtype, width))


# ----------------------------------------------------------------------------- embedding


@dataclass(frozen=True)
class _Pixels:
    """Images of one kind and the patches they are cut into."""

    size: int
    patch: int
    image_dtype: torch.dtype
    dtype: torch.dtype
    normalized: bool  # by mean and std, on the way
    tubelet: int = 0  # frames of a patch, of clips of sixteen

    @property
    def images(self) -> Tensor:
        if self.tubelet:
            return meta(B, 3, 16, self.size, self.size, dtype=self.image_dtype)
        return meta(B, 3, self.size, self.size, dtype=self.image_dtype)

    @property
    def statistics(self) -> Tensor | None:
        return meta(3) if self.normalized else None

    @property
    def patch_sides(self) -> tuple[int, ...]:
        sides = self.patch, self.patch
        return (self.tubelet, *sides) if self.tubelet else sides

    @property
    def narrow(self) -> bool:
        """Rows of a patch start where fewer than 4 bytes can be read at once."""
        return (self.patch & -self.patch) * self.image_dtype.itemsize < 4

    def keys(self, layout: str) -> Keys:
        return {
            "image_dtype": self.image_dtype, "dtype": self.dtype,
            "image_size": self.size, "patch_size": self.patch, "layout": layout,
        }  # fmt: skip

    def rows_launch(self, layout: str) -> KernelLaunch:
        out = meta(R, embed.padded_pixels(self.images, self.patch_sides), dtype=self.dtype)
        return embed.patch_rows_launch(
            self.images, self.statistics, self.statistics, _index(layout), self.patch_sides, out
        )

    def fused_launch(
        self, layout: str, width: int, capability: int, *, with_bias: bool = True
    ) -> KernelLaunch:
        pixels = embed.padded_pixels(self.images, self.patch_sides)
        return embed.fused_patch_embed_launch(
            self.images, self.statistics, self.statistics, meta(width, pixels, dtype=self.dtype),
            meta(width, dtype=self.dtype) if with_bias else None,
            meta(N, width) if with_bias else None,
            _index(layout), self.patch_sides, meta(R, width, dtype=self.dtype), capability,
        )  # fmt: skip


def _patch_cases(capability: int) -> Iterator[Case]:
    """Patch rows and the fused embedding: bytes are normalised, floats taken as normalised."""
    for geometry in GEOMETRIES:
        for image_dtype, dtype in (
            (torch.uint8, BFLOAT16), (torch.uint8, FLOAT16),
            (BFLOAT16, BFLOAT16), (FLOAT16, FLOAT16),
        ):  # fmt: skip
            from_bytes = image_dtype == torch.uint8
            pixels = _Pixels(geometry.size, geometry.patch, image_dtype, dtype, from_bytes)
            for layout in (EVERY_TOKEN, DENSE, PACKED):
                core = layout == PACKED and geometry.size == 224
                core = core and (image_dtype, dtype) == (torch.uint8, BFLOAT16)
                yield _one(
                    "patch_rows", pixels.keys(layout), pixels.rows_launch(layout),
                    "narrow_pixels" if pixels.narrow else "pixels", core,
                )  # fmt: skip
                if not from_bytes or layout == DENSE:
                    continue
                for width in geometry.widths:
                    yield _one(
                        "embed_visible_patches", pixels.keys(layout) | {"width": width},
                        pixels.fused_launch(layout, width, capability),
                        "narrow_pixels_matmul" if pixels.narrow else "matmul",
                        core and width == 768,
                    )  # fmt: skip
    yield from _other_patch_cases(capability)
    yield from _clip_cases(capability)


def _other_patch_cases(capability: int) -> Iterator[Case]:
    """Not in the library: other patches, and float images that are normalised on the way."""
    width = 768
    in_rows = {geometry.patch for geometry in GEOMETRIES}
    in_fused = {geometry.patch for geometry in GEOMETRIES if width in geometry.widths}
    for patch, size in ((8, 32), (12, 96), (14, 224), (16, 224), (32, 224)):
        for image_dtype in (torch.uint8, BFLOAT16, FLOAT32):
            pixels = _Pixels(size, patch, image_dtype, BFLOAT16, normalized=True)
            keys = pixels.keys(PACKED) | {"normalized": 1}
            if image_dtype != torch.uint8 or patch not in in_rows:
                yield _one(
                    "patch_rows", keys, pixels.rows_launch(PACKED),
                    "narrow_pixels" if pixels.narrow else "pixels", in_library=False,
                )  # fmt: skip
            if image_dtype != torch.uint8 or patch not in in_fused:
                yield _one(
                    "embed_visible_patches", keys | {"width": width},
                    pixels.fused_launch(PACKED, width, capability),
                    "narrow_pixels_matmul" if pixels.narrow else "matmul",
                    core=image_dtype == torch.uint8 and patch == 14, in_library=False,
                )  # fmt: skip
    pixels = _Pixels(224, 32, FLOAT32, FLOAT32, normalized=True)
    yield _one(
        "embed_visible_patches", pixels.keys(PACKED) | {"normalized": 1, "width": width},
        pixels.fused_launch(PACKED, width, capability, with_bias=False), "reported",
        in_library=False,
    )  # fmt: skip


def _clip_cases(capability: int) -> Iterator[Case]:
    """Tubelets of two frames, audited only: bytes as a decoder gives them."""
    for patch, width in ((16, 768), (14, 1280)):
        pixels = _Pixels(224, patch, torch.uint8, BFLOAT16, normalized=True, tubelet=2)
        keys = pixels.keys(PACKED) | {"tubelet": 2}
        yield _one(
            "patch_rows", keys, pixels.rows_launch(PACKED),
            "narrow_pixels" if pixels.narrow else "pixels", core=patch == 16, in_library=False,
        )  # fmt: skip
        yield _one(
            "embed_visible_patches", keys | {"width": width},
            pixels.fused_launch(PACKED, width, capability),
            "narrow_pixels_matmul" if pixels.narrow else "matmul", in_library=False,
        )  # fmt: skip


def _position_cases() -> Iterator[Case]:
    for width in ENCODER_WIDTHS:
        for dtype in ROW_DTYPES:
            for layout in (EVERY_TOKEN, DENSE, PACKED):
                keys: Keys = {"dtype": dtype, "width": width, "layout": layout}
                core = dtype == BFLOAT16 and width == 768 and layout == PACKED
                x, index = meta(R, width, dtype=dtype), _index(layout)
                for bias_dtype in _with_float32(dtype):
                    launch = embed.add_position_launch(
                        x, meta(width, dtype=bias_dtype), meta(N, width), index, N, x
                    )
                    yield _one(
                        "add_position", keys | {"bias_dtype": bias_dtype}, launch, "streaming",
                        core and bias_dtype == dtype,
                    )  # fmt: skip
                launch = embed.add_position_backward_launch(x, index, N, x, meta(64, width))
                yield _one("add_position_backward", keys, launch, "streaming", core)


# ----------------------------------------------------------------------------- predictor and loss


def _predictor_cases() -> Iterator[Case]:
    """Assembly and its backward at the predictors' widths, and audited only, at a wide one."""
    ids = meta(R, dtype=torch.int64)
    for width in (*PREDICTOR_WIDTHS, 1024):
        in_library = width in PREDICTOR_WIDTHS
        for dtype in ROW_DTYPES:
            x, partial = meta(R, width, dtype=dtype), meta(64, width)
            keys: Keys = {"dtype": dtype, "width": width}
            core = dtype == BFLOAT16 and width == 384
            for mask_dtype in ROW_DTYPES if dtype == FLOAT32 else _with_float32(dtype):
                launch = predictor_tokens.assemble_launch(
                    x, meta(width, dtype=mask_dtype), meta(N, width), ids, ids, ids, x
                )
                yield _one(
                    "assemble_predictor_tokens", keys | {"mask_dtype": mask_dtype}, launch,
                    "streaming", core and mask_dtype == FLOAT32, in_library,
                )  # fmt: skip
            for copies in TARGET_BLOCKS:
                launch = predictor_tokens.assemble_backward_launch(
                    x, meta(R, copies, dtype=torch.int64), ids, x, partial
                )
                yield _one(
                    "assemble_predictor_tokens_backward", keys | {"copies": copies}, launch,
                    "streaming", core and copies == 4, in_library,
                )  # fmt: skip


def _loss_cases() -> Iterator[Case]:
    ids, vector, pair = meta(R, dtype=torch.int64), meta(R), meta(2)
    for dtype in ROW_DTYPES:
        for feature_dtype in _with_float32(dtype):
            for width in ENCODER_WIDTHS:
                for kind in LIBRARY_LOSSES:
                    keys: Keys = {
                        "dtype": dtype, "feature_dtype": feature_dtype, "width": width,
                        "kind": kind,
                    }  # fmt: skip
                    core = _is_core(feature_dtype, width) and kind == "smooth_l1"
                    x, features = meta(R, width, dtype=dtype), meta(R, width, dtype=feature_dtype)
                    launch = loss_kernels.loss_forward_launch(
                        x, features, ids, vector, vector, meta(2, 2048), kind
                    )
                    yield _one("prediction_loss", keys, launch, "streaming", core)
                    launch = loss_kernels.loss_backward_launch(
                        meta(), pair, x, features, ids, vector, vector, x, kind
                    )
                    yield _one("prediction_loss_backward", keys, launch, "streaming", core)
    yield from _loss_finish_cases(pair)
    yield from _other_norm_cases(ids, vector, pair)
    yield from _other_kind_cases(ids, vector, pair)


def _other_norm_cases(ids: Tensor, vector: Tensor, pair: Tensor) -> Iterator[Case]:
    """Targets normalised over an image's patches or not at all, audited only: at one width."""
    width, kind = CORE_WIDTH, "smooth_l1"
    statistics = meta(2, B, width)
    for dtype in ROW_DTYPES:
        core = dtype == BFLOAT16
        x, images = meta(R, width, dtype=dtype), meta(B, N, width, dtype=dtype)
        launch = image_statistics.image_statistics_launch(images, statistics)
        keys: Keys = {"dtype": dtype, "width": width}
        yield _one("image_statistics", keys, launch, "streaming", core, in_library=False)
        features = images.flatten(0, 1)
        for norm in ("instance", "none"):
            mean, rstd = statistics if norm == "instance" else (vector, vector)
            keys = {"dtype": dtype, "width": width, "kind": kind, "norm": norm}
            core = core and norm == "instance"
            launch = loss_kernels.loss_forward_launch(
                x, features, ids, mean, rstd, meta(2, 2048), kind, norm, N
            )
            yield _one("prediction_loss", keys, launch, "streaming", core, in_library=False)
            launch = loss_kernels.loss_backward_launch(
                meta(), pair, x, features, ids, mean, rstd, x, kind, norm, N
            )
            yield _one(
                "prediction_loss_backward", keys, launch, "streaming", core, in_library=False
            )


def _other_kind_cases(ids: Tensor, vector: Tensor, pair: Tensor) -> Iterator[Case]:
    """Distances that the C library does not have, audited at one width."""
    width, cosines = CORE_WIDTH, meta(2, R)
    for dtype, kind in itertools.product(ROW_DTYPES, ("l1", "cosine")):
        x = meta(R, width, dtype=dtype)
        rows = cosines if kind == "cosine" else None
        keys: Keys = {"dtype": dtype, "width": width, "kind": kind}
        core = dtype == BFLOAT16 and kind == "cosine"
        launch = loss_kernels.loss_forward_launch(
            x, x, ids, vector, vector, meta(2, 2048), kind, cosines=rows
        )
        yield _one("prediction_loss", keys, launch, "streaming", core, in_library=False)
        launch = loss_kernels.loss_backward_launch(
            meta(), pair, x, x, ids, vector, vector, x, kind, cosines=rows
        )
        yield _one("prediction_loss_backward", keys, launch, "streaming", core, in_library=False)


def _loss_finish_cases(out: Tensor) -> Iterator[Case]:
    """By the number of partial sums, a power of two up to what `loss_programs` ever gives."""
    for denominator in (None, meta(), meta(dtype=torch.int64)):
        by_block: dict[object, tuple[int, KernelLaunch]] = {}
        for num_programs in [2**k for k in range(12)]:
            if loss_kernels.loss_programs(num_programs) != num_programs:
                raise AssertionError(f"no loss has {num_programs} partial sums")
            launch = loss_kernels.loss_finish_launch(meta(2, num_programs), denominator, 1, out)
            by_block[launch.arguments["BLOCK"]] = num_programs, launch
        for bound, launch in by_block.values():
            keys: Keys = {
                "denominator_dtype": None if denominator is None else denominator.dtype,
                "max_programs": bound,
            }
            core = denominator is None and bound == loss_kernels.MOST_PROGRAMS
            yield _one("loss_finish", keys, launch, "reported", core)

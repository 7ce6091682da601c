"""The optimiser step on a GPU: three launches, whatever the number of tensors.

(a) one program a tile sums the squares of its gradients;
(b) one program adds those sums in a fixed order, decides on clipping and skipping, advances the
    step counts and works out every coefficient in float64 (in float32, 1 - momentum is 1.3 % off at
    momentum .999999);
(c) one program a tile updates p, m, v, the target and the rounded copies of p and target.

A launch reads the address of everything from tables (`multi_tensor.py`). Tiles that lie wholly
inside aligned tensors are read and written 16 bytes at a time without masks; the last tile of a
tensor and misaligned tensors take the masked branch. Tensors of different dtypes fall into buckets
with a launch of (a) and (c) each; a model in one precision has a single bucket.

Bytes a parameter: (a) 2 and (c) 38 with bfloat16 weights and gradients, 4 and 36 with float32.
"""

from __future__ import annotations

from masked_vit_kernels.kernel_language import tl, triton
from masked_vit_kernels.optimizer.multi_tensor import lerp

# Columns of the pointer table (P, TABLE_COLUMNS) int64, P slots: addresses of master, shadow (the
# rounded copy), exp_avg, exp_avg_sq, target, target shadow, then numel; 0 stands for "has none".
TABLE_COLUMNS = tl.constexpr(8)

# Columns of the coefficients (P, COEFFICIENTS) float32: 1 - beta1, beta2, 1 - beta2, 1 - lr * wd,
# lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t), eps.
COEFFICIENTS = tl.constexpr(8)

# Values of one parameter group: lr, beta1, beta2, eps, weight_decay.
GROUP_VALUES = tl.constexpr(5)


@triton.jit
def _locate(tiles_ptr, table_ptr, gradients_ptr, first_tile, TILE: tl.constexpr):
    """The program's tile, its slot, row of the table, gradient address, first element and size."""
    tile = first_tile + tl.program_id(0)
    slot = tl.load(tiles_ptr + 2 * tile).to(tl.int64)
    start = tl.load(tiles_ptr + 2 * tile + 1).to(tl.int64) * TILE
    row_ptr = table_ptr + slot * TABLE_COLUMNS
    return tile, slot, row_ptr, tl.load(gradients_ptr + slot), start, tl.load(row_ptr + 6)


@triton.jit
def _rest(start, numel, TILE: tl.constexpr):
    """Elements of the tile that starts at `start`."""
    return tl.minimum(numel - start, TILE).to(tl.int32)


@triton.jit
def _load_run(address, start, numel, DTYPE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """(BLOCK,) float32: elements start ... of the tensor at `address`."""
    lanes = start + tl.arange(0, BLOCK)  # [BLOCK] int64
    if FULL:
        pointer = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
        return tl.load(pointer + lanes).to(tl.float32)
    else:
        pointer = address.to(tl.pointer_type(DTYPE))
        return tl.load(pointer + lanes, mask=lanes < numel, other=0.0).to(tl.float32)


@triton.jit
def _store_run(
    address, start, numel, values, DTYPE: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr
):
    """Write (BLOCK,) values, rounded to DTYPE, as elements start ... of the tensor."""
    lanes = start + tl.arange(0, BLOCK)  # [BLOCK] int64
    if FULL:
        pointer = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
        tl.store(pointer + lanes, values.to(DTYPE))
    else:
        pointer = address.to(tl.pointer_type(DTYPE))
        tl.store(pointer + lanes, values.to(DTYPE), mask=lanes < numel)


@triton.jit(do_not_specialize=["first_tile"])
def gradient_norm_kernel(
    tiles_ptr,  # (number of tiles, 2) int32: slot, tile within it
    table_ptr,  # (P, TABLE_COLUMNS) int64
    gradients_ptr,  # (P,) int64 addresses, 0 without a gradient
    partials_ptr,  # (number of tiles,) float32
    first_tile,
    GRADIENT_DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile, _, _, gradient, start, numel = _locate(
        tiles_ptr, table_ptr, gradients_ptr, first_tile, TILE
    )
    total = tl.zeros((BLOCK,), tl.float32)  # [BLOCK]
    if gradient > 0:
        if (start + TILE <= numel) & (gradient % 16 == 0):
            for offset in range(0, TILE, BLOCK):
                g = _load_run(gradient, start + offset, numel, GRADIENT_DTYPE, BLOCK, True)
                total += g * g
        else:
            for offset in range(0, _rest(start, numel, TILE), BLOCK):
                g = _load_run(gradient, start + offset, numel, GRADIENT_DTYPE, BLOCK, False)
                total += g * g
    tl.store(partials_ptr + tile, tl.sum(total, axis=0))


@triton.jit(
    do_not_specialize=["num_partials", "num_slots"], do_not_specialize_on_alignment=["loss_ptr"]
)
def decide_kernel(
    partials_ptr,  # (num_partials,) float32 or float64 sums of squares
    num_partials,
    loss_ptr,  # 0-d, any floating dtype; the partials again where there is no loss
    hyper_ptr,  # (2 + groups * GROUP_VALUES,) float64: momentum, max_grad_norm, then the groups
    groups_ptr,  # (P,) int32, -1 for an untrained source
    gradients_ptr,  # (P,) int64
    steps_ptr,  # (P,) float32, advanced here
    num_slots,
    coefficients_ptr,  # (P, COEFFICIENTS) float32
    scalars_ptr,  # (4,) float32: go, clip, momentum, 1 - momentum
    grad_norm_ptr,
    skipped_ptr,  # uint8
    skip_count_ptr,  # int64
    HAS_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)  # [BLOCK]
    for first in range(0, num_partials, BLOCK):
        inside = first + lanes < num_partials
        sums += tl.load(partials_ptr + first + lanes, mask=inside, other=0.0).to(tl.float64)
    norm = tl.sqrt(tl.sum(sums, axis=0))
    go = norm < float("inf")  # false for NaN
    if HAS_LOSS:
        loss = tl.load(loss_ptr).to(tl.float64)
        go = go & (loss - loss == 0.0)  # false for NaN and infinity
    for first in range(0, num_slots, BLOCK):
        address = tl.load(gradients_ptr + first + lanes, mask=first + lanes < num_slots, other=0)
        go = go & (tl.min(address, axis=0) >= 0)

    momentum = tl.load(hyper_ptr)
    clip = tl.minimum(tl.load(hyper_ptr + 1) / (norm + 1e-6), 1.0)
    tl.store(scalars_ptr, go.to(tl.float32))
    tl.store(scalars_ptr + 1, clip.to(tl.float32))
    tl.store(scalars_ptr + 2, momentum.to(tl.float32))
    tl.store(scalars_ptr + 3, (1.0 - momentum).to(tl.float32))
    tl.store(grad_norm_ptr, norm.to(tl.float32))
    tl.store(skipped_ptr, 1 - go.to(tl.uint8))
    tl.store(skip_count_ptr, tl.load(skip_count_ptr) + 1 - go.to(tl.int64))

    for first in range(0, num_slots, BLOCK):
        slot = first + lanes
        inside = slot < num_slots
        group = tl.load(groups_ptr + slot, mask=inside, other=-1)
        trained = inside & (group >= 0)
        values_ptr = hyper_ptr + 2 + group * GROUP_VALUES
        lr = tl.load(values_ptr, mask=trained, other=0.0)
        beta1 = tl.load(values_ptr + 1, mask=trained, other=0.5)
        beta2 = tl.load(values_ptr + 2, mask=trained, other=0.5)
        eps = tl.load(values_ptr + 3, mask=trained, other=0.0)
        weight_decay = tl.load(values_ptr + 4, mask=trained, other=0.0)
        gradient = tl.load(gradients_ptr + slot, mask=inside, other=0)
        step = tl.load(steps_ptr + slot, mask=inside, other=0.0)
        step += tl.where(gradient > 0, go.to(tl.float32), 0.0)
        tl.store(steps_ptr + slot, step, mask=trained)

        t = tl.maximum(step, 1.0).to(tl.float64)
        bias1 = 1.0 - tl.exp(t * tl.log(beta1))  # 1 - beta1^t
        bias2 = 1.0 - tl.exp(t * tl.log(beta2))
        row_ptr = coefficients_ptr + slot * COEFFICIENTS
        tl.store(row_ptr, (1.0 - beta1).to(tl.float32), mask=inside)
        tl.store(row_ptr + 1, beta2.to(tl.float32), mask=inside)
        tl.store(row_ptr + 2, (1.0 - beta2).to(tl.float32), mask=inside)
        tl.store(row_ptr + 3, (1.0 - lr * weight_decay).to(tl.float32), mask=inside)
        tl.store(row_ptr + 4, (lr / bias1).to(tl.float32), mask=inside)
        tl.store(row_ptr + 5, (1.0 / tl.sqrt(bias2)).to(tl.float32), mask=inside)
        tl.store(row_ptr + 6, eps.to(tl.float32), mask=inside)


@triton.jit
def _average_run(
    target,
    target_shadow,
    keep,
    rate,
    start,
    numel,
    weight,
    TARGET_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """target <- lerp(target, weight, rate), in the form that is exact at both ends."""
    if target > 0:
        old = _load_run(target, start, numel, tl.float32, BLOCK, FULL)
        new = lerp(old, weight, keep, rate)
        _store_run(target, start, numel, new, tl.float32, BLOCK, FULL)
        if tl.float32 != TARGET_DTYPE:
            _store_run(target_shadow, start, numel, new, TARGET_DTYPE, BLOCK, FULL)


@triton.jit
def _update_tile(
    row_ptr,
    coefficients_ptr,
    scalars_ptr,
    gradient,
    first,
    numel,
    SOURCE_DTYPE: tl.constexpr,
    GRADIENT_DTYPE: tl.constexpr,
    TARGET_DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    FULL: tl.constexpr,
):
    """AdamW on a tile, its moving average and the rounded copies of both."""
    master = tl.load(row_ptr)
    shadow = tl.load(row_ptr + 1)
    exp_avg = tl.load(row_ptr + 2)
    exp_avg_sq = tl.load(row_ptr + 3)
    target = tl.load(row_ptr + 4)
    target_shadow = tl.load(row_ptr + 5)
    clip = tl.load(scalars_ptr + 1)
    keep = tl.load(scalars_ptr + 2)
    rate = tl.load(scalars_ptr + 3)
    rate1 = tl.load(coefficients_ptr)
    beta2 = tl.load(coefficients_ptr + 1)
    rate2 = tl.load(coefficients_ptr + 2)
    decay = tl.load(coefficients_ptr + 3)
    step_size = tl.load(coefficients_ptr + 4)
    correction = tl.load(coefficients_ptr + 5)
    eps = tl.load(coefficients_ptr + 6)
    count = TILE if FULL else _rest(first, numel, TILE)
    for offset in range(0, count, BLOCK):
        start = first + offset
        g = _load_run(gradient, start, numel, GRADIENT_DTYPE, BLOCK, FULL)
        m = _load_run(exp_avg, start, numel, tl.float32, BLOCK, FULL)
        v = _load_run(exp_avg_sq, start, numel, tl.float32, BLOCK, FULL)
        p = _load_run(master, start, numel, tl.float32, BLOCK, FULL)

        g = g * clip
        m = m + rate1 * (g - m)
        v = v * beta2 + rate2 * g * g
        p = p * decay - step_size * m / (tl.sqrt(v) * correction + eps)

        _store_run(exp_avg, start, numel, m, tl.float32, BLOCK, FULL)
        _store_run(exp_avg_sq, start, numel, v, tl.float32, BLOCK, FULL)
        _store_run(master, start, numel, p, tl.float32, BLOCK, FULL)
        if tl.float32 != SOURCE_DTYPE:
            _store_run(shadow, start, numel, p, SOURCE_DTYPE, BLOCK, FULL)
        _average_run(target, target_shadow, keep, rate, start, numel, p, TARGET_DTYPE, BLOCK, FULL)


@triton.jit
def _average_tile(
    row_ptr,
    scalars_ptr,
    first,
    numel,
    SOURCE_DTYPE: tl.constexpr,
    TARGET_DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The moving average alone, of a source that has no gradient in this step."""
    master = tl.load(row_ptr)
    source = tl.load(row_ptr + 1)
    target = tl.load(row_ptr + 4)
    target_shadow = tl.load(row_ptr + 5)
    keep = tl.load(scalars_ptr + 2)
    rate = tl.load(scalars_ptr + 3)
    for offset in range(0, _rest(first, numel, TILE), BLOCK):
        start = first + offset
        p = tl.zeros((BLOCK,), tl.float32)
        if master > 0:
            p = _load_run(master, start, numel, tl.float32, BLOCK, False)
        else:
            p = _load_run(source, start, numel, SOURCE_DTYPE, BLOCK, False)
        _average_run(target, target_shadow, keep, rate, start, numel, p, TARGET_DTYPE, BLOCK, False)


@triton.jit(do_not_specialize=["first_tile"])
def update_kernel(
    tiles_ptr,  # (number of tiles, 2) int32
    table_ptr,  # (P, TABLE_COLUMNS) int64
    gradients_ptr,  # (P,) int64
    coefficients_ptr,  # (P, COEFFICIENTS) float32
    scalars_ptr,  # (4,) float32
    first_tile,
    SOURCE_DTYPE: tl.constexpr,
    GRADIENT_DTYPE: tl.constexpr,
    TARGET_DTYPE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _, slot, row_ptr, gradient, start, numel = _locate(
        tiles_ptr, table_ptr, gradients_ptr, first_tile, TILE
    )
    values_ptr = coefficients_ptr + slot * COEFFICIENTS
    go = tl.load(scalars_ptr) != 0.0
    if go & (gradient > 0):
        bits = gradient | tl.load(row_ptr) | tl.load(row_ptr + 1) | tl.load(row_ptr + 2)
        bits |= tl.load(row_ptr + 3) | tl.load(row_ptr + 4) | tl.load(row_ptr + 5)
        if (start + TILE <= numel) & (bits % 16 == 0):
            _update_tile(
                row_ptr,
                values_ptr,
                scalars_ptr,
                gradient,
                start,
                numel,
                SOURCE_DTYPE,
                GRADIENT_DTYPE,
                TARGET_DTYPE,
                TILE,
                BLOCK,
                True,
            )
        else:
            _update_tile(
                row_ptr,
                values_ptr,
                scalars_ptr,
                gradient,
                start,
                numel,
                SOURCE_DTYPE,
                GRADIENT_DTYPE,
                TARGET_DTYPE,
                TILE,
                BLOCK,
                False,
            )
    elif go:
        _average_tile(row_ptr, scalars_ptr, start, numel, SOURCE_DTYPE, TARGET_DTYPE, TILE, BLOCK)

"""Mistakes in the attention kernels that its checks must notice."""

import torch
from mutation import Mutation


def _check(modules, **options):
    """The interpreter's attention check, over the mutated modules."""
    checks = modules["attention_checks"]
    torch.manual_seed(0)
    checks.check_attention(checks.AttentionProblem(heads=2, padding=9, **options))


def short(modules):
    _check(modules, head_dim=40, lengths_q=(17, 0, 3), lengths_k=(5, 2, 0), dtype=torch.float16)


def looped(modules):
    _check(modules, head_dim=16, lengths_q=(70,), lengths_k=(66,), dtype=torch.float32)


def packed(modules):
    lengths = (19, 3)
    _check(modules, head_dim=8, lengths_q=lengths, lengths_k=lengths, layout="qkv")


FORWARD, BACKWARD, TILES = (f"attention/{part}.py" for part in ("forward", "backward", "tiles"))

MUTATIONS = [
    Mutation(
        "flipped sign of delta",
        BACKWARD,
        "(p * (dp - delta[None, :]))",
        "(p * (dp + delta[None, :]))",
        short,
    ),
    Mutation(
        "flipped sign of delta in dq",
        BACKWARD,
        "(p * (dp - delta[:, None]))",
        "(p * (dp + delta[:, None]))",
        looped,
    ),
    Mutation(
        "no mask over absent keys",
        FORWARD,
        'scores = tl.where(valid[None, :], scores, -float("inf"))',
        "scores += 0.0",
        short,
    ),
    Mutation(
        "no mask over absent rows",
        TILES,
        (
            "mask = (rows < num_rows - first_row)[:, None]\n"
            "    if COLUMN + WIDTH > HEAD_DIM:\n"
            "        mask = mask & (columns < HEAD_DIM)[None, :]\n"
            "    tile_ptr = ptr + tl.full((), first_row, tl.int64) * stride_t\n"
            "    return"
        ),
        (
            "mask = (rows < 128)[:, None]\n"
            "    tile_ptr = ptr + tl.full((), first_row, tl.int64) * stride_t\n"
            "    return"
        ),
        short,
    ),
    Mutation(
        "wrong stride of v",
        FORWARD,
        "v_ptr += start_k * stride_vt + key_head * STRIDE_VH",
        "v_ptr += start_k * stride_ot + key_head * STRIDE_VH",
        packed,
    ),
    Mutation(
        "wrong head stride of dk",
        BACKWARD,
        "dk_ptr += head * STRIDE_DKH",
        "dk_ptr += head * HEAD_DIM * 2",
        short,
    ),
    Mutation(
        "tail of dv not zeroed",
        BACKWARD,
        "dv_ptr, end_k, rows_k, stride_dvt, part",
        "dv_ptr, rows_k, rows_k, stride_dvt, part",
        short,
    ),
    Mutation(
        "running sum not rescaled",
        FORWARD,
        "row_sum = row_sum * shrink + tl.sum(weights, 1)",
        "row_sum = row_sum + tl.sum(weights, 1)",
        looped,
    ),
    Mutation(
        "scale missing from dk",
        BACKWARD,
        "dk_ptr, dk_main * scale,",
        "dk_ptr, dk_main,",
        short,
    ),
    Mutation(
        "lse in base 2",
        FORWARD,
        "lse = (row_max * scale_log2 + tl.log2(total)) * LN_2",
        "lse = row_max * scale_log2 + tl.log2(total)",
        short,
    ),
    Mutation(
        "second piece of the head dropped",
        FORWARD,
        "scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)",
        "scores = scores",
        short,
    ),
    Mutation(
        "queries without keys unguarded",
        BACKWARD,
        "p = tl.where(valid[:, None], p, 0.0)",
        "p = p * 1.0",
        short,
    ),
]

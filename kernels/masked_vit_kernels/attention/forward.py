"""Forward of variable-length attention: out = softmax(q k^T * scale) v, sequence by sequence.

A program owns one head and one tile of queries of one sequence:

    s = q k^T * scale * log2(e)          [BLOCK_Q, BLOCK_K]
    p = exp2(s - m),  m = max s,  l = sum p
    out = p v / l,  lse = (m + log2 l) * ln 2

in one pass where all the keys of the longest sequence fit BLOCK_K, with running m and l beyond
(Milakov and Gimelshein 2018; Dao et al. 2022). Bytes moved: q, k, v once from memory, further key
tiles of the same sequence from L2, and out: 8 bytes an element in half precision.

Grid: heads vary fastest, so that neighbouring programs read neighbouring bytes (a head of width 24
is 48 bytes); tiles come longest sequences first. The last programs zero the padding rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masked_vit_kernels.attention.config import AttentionConfig, forward_config
from masked_vit_kernels.attention.sequences import Sequences
from masked_vit_kernels.attention.tiles import (
    CLEARING_PROGRAMS,
    CLEARING_ROWS,
    attention_grid,
    clear_rows,
    head_dim_pieces,
    load_tile,
    per_run,
    store_tile,
    stride_arguments,
)
from masked_vit_kernels.kernel_language import tl, triton
from masked_vit_kernels.launch import (
    KernelLaunch,
    round_up_to_power_of_two,
    table_capability,
)
from masked_vit_kernels.packing import WIDE_TILE

LOG2_E = 1.4426950408889634


@triton.jit
def _attend_to_keys(
    q_main, q_rest, k_ptr, v_ptr, first_key, num_keys, stride_kt, stride_vt, scale_log2,
    out_main, out_rest, row_max, row_sum,
    BLOCK_K: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: fold BLOCK_K keys into the running output, max and sum."""
    # [BLOCK_K, MAIN]
    k_main = load_tile(k_ptr, first_key, num_keys, stride_kt, BLOCK_K, 0, MAIN, HEAD_DIM)
    v_main = load_tile(v_ptr, first_key, num_keys, stride_vt, BLOCK_K, 0, MAIN, HEAD_DIM)
    # [BLOCK_Q, MAIN] @ [MAIN, BLOCK_K] -> [BLOCK_Q, BLOCK_K]
    scores = tl.dot(q_main, tl.trans(k_main), input_precision=PRECISION)
    if REST > 0:
        k_rest = load_tile(k_ptr, first_key, num_keys, stride_kt, BLOCK_K, MAIN, REST, HEAD_DIM)
        v_rest = load_tile(v_ptr, first_key, num_keys, stride_vt, BLOCK_K, MAIN, REST, HEAD_DIM)
        scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)
    if first_key + BLOCK_K > num_keys:
        valid = tl.arange(0, BLOCK_K) < num_keys - first_key
        scores = tl.where(valid[None, :], scores, -float("inf"))
    if FIRST:
        new_max = tl.max(scores, 1)
    else:
        new_max = tl.maximum(row_max, tl.max(scores, 1))
    weights = tl.exp2(scores * scale_log2 - (new_max * scale_log2)[:, None])
    if FIRST:
        row_sum = tl.sum(weights, 1)
    else:
        shrink = tl.exp2((row_max - new_max) * scale_log2)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        out_main = out_main * shrink[:, None]
        if REST > 0:
            out_rest = out_rest * shrink[:, None]
    weights = weights.to(v_main.dtype)
    # [BLOCK_Q, BLOCK_K] @ [BLOCK_K, MAIN] -> [BLOCK_Q, MAIN]
    out_main = tl.dot(weights, v_main, out_main, input_precision=PRECISION)
    if REST > 0:
        out_rest = tl.dot(weights, v_rest, out_rest, input_precision=PRECISION)
    return out_main, out_rest, new_max, row_sum


@triton.jit(
    do_not_specialize=per_run(
        "num_rows", "num_sequences", "num_tiles", "tiles_per_sequence", strides="q k v o"
    )
)
def _varlen_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, tile_map_ptr,
    stride_qt_by_8, stride_kt_by_8, stride_vt_by_8, stride_ot_by_8,
    num_rows, num_sequences, num_tiles, tiles_per_sequence, scale_log2,
    STRIDE_QH: tl.constexpr, STRIDE_KH: tl.constexpr, STRIDE_VH: tl.constexpr,
    STRIDE_OH: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ONE_PASS: tl.constexpr, PRECISION: tl.constexpr, CLEAR_PARTS: tl.constexpr,
    CLEAR_ROWS: tl.constexpr, CLEAR_WIDTH: tl.constexpr,
):  # fmt: skip
    LN_2: tl.constexpr = 0.6931471805599453
    head = tl.program_id(0)
    tile = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    stride_qt, stride_kt = stride_qt_by_8 * 8, stride_kt_by_8 * 8
    stride_vt, stride_ot = stride_vt_by_8 * 8, stride_ot_by_8 * 8
    lse_ptr += head.to(tl.int64) * num_rows
    out_ptr += head * STRIDE_OH

    if tile >= num_tiles:
        end = tl.load(cu_seqlens_q_ptr + num_sequences)
        part = tile - num_tiles
        clear_rows(
            out_ptr, end, num_rows, stride_ot, part, CLEAR_PARTS, CLEAR_ROWS, HEAD_DIM, CLEAR_WIDTH
        )
        offsets = tl.arange(0, CLEAR_ROWS)
        nothing = tl.full((CLEAR_ROWS,), -float("inf"), tl.float32)
        for row in range(end + part * CLEAR_ROWS, num_rows, CLEAR_PARTS * CLEAR_ROWS):
            tl.store(lse_ptr + row + offsets, nothing, mask=offsets < num_rows - row)
        return

    if tile_map_ptr is None:
        # Unsigned division needs a register less, without which D=80 spills on Ampere.
        sequence = (tile.to(tl.uint32) // tiles_per_sequence.to(tl.uint32)).to(tl.int32)
        first_query = (tile - sequence * tiles_per_sequence) * BLOCK_Q
    else:
        sequence = tl.load(tile_map_ptr + 2 * tile)
        first_query = tl.load(tile_map_ptr + 2 * tile + 1)
        if sequence < 0:
            return
    start_q = tl.load(cu_seqlens_q_ptr + sequence).to(tl.int64)
    start_k = tl.load(cu_seqlens_k_ptr + sequence).to(tl.int64)
    num_queries = (tl.load(cu_seqlens_q_ptr + sequence + 1) - start_q).to(tl.int32)
    num_keys = (tl.load(cu_seqlens_k_ptr + sequence + 1) - start_k).to(tl.int32)
    if first_query >= num_queries:
        return

    key_head = head
    if GROUP > 1:  # heads of queries that share one of keys and values
        key_head = head // GROUP
    q_ptr += start_q * stride_qt + head * STRIDE_QH
    k_ptr += start_k * stride_kt + key_head * STRIDE_KH
    v_ptr += start_k * stride_vt + key_head * STRIDE_VH
    out_ptr += start_q * stride_ot
    q_main = load_tile(q_ptr, first_query, num_queries, stride_qt, BLOCK_Q, 0, MAIN, HEAD_DIM)
    q_rest = q_main
    out_main = tl.zeros((BLOCK_Q, MAIN), tl.float32)
    out_rest = tl.zeros((BLOCK_Q, 16), tl.float32)
    if REST > 0:
        q_rest = load_tile(
            q_ptr, first_query, num_queries, stride_qt, BLOCK_Q, MAIN, REST, HEAD_DIM
        )
        out_rest = tl.zeros((BLOCK_Q, REST), tl.float32)
    row_max = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_Q,), tl.float32)
    if ONE_PASS:
        if num_keys > 0:
            out_main, out_rest, row_max, row_sum = _attend_to_keys(
                q_main, q_rest, k_ptr, v_ptr, 0, num_keys, stride_kt, stride_vt, scale_log2,
                out_main, out_rest, row_max, row_sum,
                BLOCK_K, MAIN, REST, HEAD_DIM, PRECISION, FIRST=True,
            )  # fmt: skip
    else:
        for first_key in range(0, num_keys, BLOCK_K):
            out_main, out_rest, row_max, row_sum = _attend_to_keys(
                q_main, q_rest, k_ptr, v_ptr, first_key, num_keys, stride_kt, stride_vt, scale_log2,
                out_main, out_rest, row_max, row_sum,
                BLOCK_K, MAIN, REST, HEAD_DIM, PRECISION, FIRST=False,
            )  # fmt: skip

    # Without keys row_sum is 0 and row_max -inf: the output is 0 and the lse -inf.
    total = tl.where(row_sum > 0, row_sum, 1.0)
    inverse = 1.0 / total
    store_tile(
        out_ptr, out_main * inverse[:, None], first_query, num_queries, stride_ot,
        BLOCK_Q, 0, MAIN, HEAD_DIM,
    )  # fmt: skip
    if REST > 0:
        store_tile(
            out_ptr, out_rest * inverse[:, None], first_query, num_queries, stride_ot,
            BLOCK_Q, MAIN, REST, HEAD_DIM,
        )  # fmt: skip
    rows = tl.arange(0, BLOCK_Q)
    lse = (row_max * scale_log2 + tl.log2(total)) * LN_2
    tl.store(lse_ptr + start_q + first_query + rows, lse, mask=rows < num_queries - first_query)


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 products take three tf32 products; half precision has but one way."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def forward_launch(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    queries: Sequences,
    keys: Sequences,
    softmax_scale: float,
    config: AttentionConfig | None = None,
    capability: int | None = None,
) -> KernelLaunch:
    """Describe the forward.

    Args:
        q: (Tq, H, D), k and v (Tk, Hk, D), H a multiple of Hk: strided views, see
            `tiles.readable`.
        out: (Tq, H, D) to write, lse (H, Tq) fp32 to write.
        queries, keys: the sequences of both sides; of the keys only bounds are read.
        config: tiles; default: `forward_config`.
        capability: entry of the launch table; default: the device's.
    """
    num_rows, num_heads, head_dim = q.shape
    config = config or forward_config(
        head_dim, queries.max_seqlen, keys.max_seqlen, q.dtype,
        capability or table_capability(q.device),
    )  # fmt: skip
    main, rest = head_dim_pieces(head_dim)
    tile_map = queries.wide_tile_map if config.block_q == WIDE_TILE else queries.tile_map
    tiles_per_sequence = -(-queries.max_seqlen // config.block_q)
    num_tiles = queries.count * tiles_per_sequence if tile_map is None else tile_map.shape[0]
    return KernelLaunch(
        kernel=_varlen_attention_forward_kernel,
        grid=attention_grid(num_heads, num_tiles + CLEARING_PROGRAMS),
        arguments={
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "out_ptr": out,
            "lse_ptr": lse,
            "cu_seqlens_q_ptr": queries.cu_seqlens,
            "cu_seqlens_k_ptr": keys.cu_seqlens,
            "tile_map_ptr": tile_map,
            **stride_arguments("q", q),
            **stride_arguments("k", k),
            **stride_arguments("v", v),
            **stride_arguments("o", out),
            "num_rows": num_rows,
            "num_sequences": queries.count,
            "num_tiles": num_tiles,
            "tiles_per_sequence": max(tiles_per_sequence, 1),
            "scale_log2": softmax_scale * LOG2_E,
            "GROUP": num_heads // k.shape[1],
            "HEAD_DIM": head_dim,
            "MAIN": main,
            "REST": rest,
            "BLOCK_Q": config.block_q,
            "BLOCK_K": config.block_k,
            "ONE_PASS": keys.max_seqlen <= config.block_k,
            "PRECISION": dot_precision(q.dtype),
            "CLEAR_PARTS": CLEARING_PROGRAMS,
            "CLEAR_ROWS": CLEARING_ROWS,
            "CLEAR_WIDTH": round_up_to_power_of_two(head_dim),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        max_registers=config.max_registers,
    )

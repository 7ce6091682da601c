"""EXPERIMENT"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from masked_vit_kernels.attention.tiles import *
from masked_vit_kernels.attention.tiles import CLEARING_PROGRAMS, CLEARING_ROWS
from masked_vit_kernels.attention.forward import dot_precision, LOG2_E
from masked_vit_kernels.launch import KernelLaunch, round_up_to_power_of_two


@triton.jit
def _fold(
    q_main, q_rest, k_main, k_rest, v_main, v_rest, first_key, num_keys, scale_log2,
    out_main, out_rest, row_max, row_sum,
    KEYS: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):
    scores = tl.dot(q_main, tl.trans(k_main), input_precision=PRECISION)
    if REST > 0:
        scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)
    if LAST:
        valid = tl.arange(0, KEYS) < num_keys - first_key
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
    out_main = tl.dot(weights, v_main, out_main, input_precision=PRECISION)
    if REST > 0:
        out_rest = tl.dot(weights, v_rest, out_rest, input_precision=PRECISION)
    return out_main, out_rest, new_max, row_sum


@triton.jit
def _rows(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stride_qt, stride_kt, stride_vt, stride_ot, num_queries, num_keys, scale_log2,
          HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_Q: tl.constexpr, PIECE: tl.constexpr,
          PIECES: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):
    LN_2: tl.constexpr = 0.6931471805599453
    ks = ()
    kr = ()
    vs = ()
    vr = ()
    for piece in tl.static_range(PIECES):
        ks = ks + (load_tile(k_ptr, piece * PIECE, num_keys, stride_kt, PIECE, 0, MAIN, HEAD_DIM),)
        vs = vs + (load_tile(v_ptr, piece * PIECE, num_keys, stride_vt, PIECE, 0, MAIN, HEAD_DIM),)
        if REST > 0:
            kr = kr + (load_tile(k_ptr, piece * PIECE, num_keys, stride_kt, PIECE, MAIN, REST, HEAD_DIM),)
            vr = vr + (load_tile(v_ptr, piece * PIECE, num_keys, stride_vt, PIECE, MAIN, REST, HEAD_DIM),)
        else:
            kr = ks
            vr = vs
    for first_query in tl.range(0, num_queries, BLOCK_Q, num_stages=STAGES):
        q_main = load_tile(q_ptr, first_query, num_queries, stride_qt, BLOCK_Q, 0, MAIN, HEAD_DIM)
        q_rest = q_main
        out_main = tl.zeros((BLOCK_Q, MAIN), tl.float32)
        out_rest = tl.zeros((BLOCK_Q, 16), tl.float32)
        if REST > 0:
            q_rest = load_tile(q_ptr, first_query, num_queries, stride_qt, BLOCK_Q, MAIN, REST, HEAD_DIM)
            out_rest = tl.zeros((BLOCK_Q, REST), tl.float32)
        row_max = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
        row_sum = tl.zeros((BLOCK_Q,), tl.float32)
        out_main, out_rest, row_max, row_sum = _fold(
            q_main, q_rest, ks[0], kr[0], vs[0], vr[0], 0, num_keys, scale_log2,
            out_main, out_rest, row_max, row_sum, PIECE, REST, PRECISION, True, PIECES == 1)
        for piece in tl.static_range(1, PIECES):
            out_main, out_rest, row_max, row_sum = _fold(
                    q_main, q_rest, ks[piece], kr[piece], vs[piece], vr[piece], piece * PIECE, num_keys, scale_log2,
                    out_main, out_rest, row_max, row_sum, PIECE, REST, PRECISION, False, piece == PIECES - 1)
        total = tl.where(row_sum > 0, row_sum, 1.0)
        inverse = 1.0 / total
        store_tile(
            out_ptr, out_main * inverse[:, None], first_query, num_queries, stride_ot,
            BLOCK_Q, 0, MAIN, HEAD_DIM,
        )
        if REST > 0:
            store_tile(
                out_ptr, out_rest * inverse[:, None], first_query, num_queries, stride_ot,
                BLOCK_Q, MAIN, REST, HEAD_DIM,
            )
        rows = tl.arange(0, BLOCK_Q)
        lse = (row_max * scale_log2 + tl.log2(total)) * LN_2
        tl.store(lse_ptr + first_query + rows, lse, mask=rows < num_queries - first_query)


@triton.jit(do_not_specialize=per_run("num_rows", "num_sequences", strides="q k v o"))
def _short_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_seqlens_q_ptr, cu_seqlens_k_ptr, order_ptr,
    stride_qt_by_8, stride_kt_by_8, stride_vt_by_8, stride_ot_by_8,
    num_rows, num_sequences, scale_log2,
    STRIDE_QH: tl.constexpr, STRIDE_KH: tl.constexpr, STRIDE_VH: tl.constexpr,
    STRIDE_OH: tl.constexpr, HEAD_DIM: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_Q: tl.constexpr, PIECE: tl.constexpr,
    PIECES: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):
    LN_2: tl.constexpr = 0.6931471805599453
    head = tl.program_id(0)
    work = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    stride_qt, stride_kt = stride_qt_by_8 * 8, stride_kt_by_8 * 8
    stride_vt, stride_ot = stride_vt_by_8 * 8, stride_ot_by_8 * 8
    lse_ptr += head.to(tl.int64) * num_rows
    out_ptr += head * STRIDE_OH
    if order_ptr is None:
        sequence = work
    else:
        sequence = tl.load(order_ptr + work)
    start_q = tl.load(cu_seqlens_q_ptr + sequence).to(tl.int64)
    start_k = tl.load(cu_seqlens_k_ptr + sequence).to(tl.int64)
    num_queries = (tl.load(cu_seqlens_q_ptr + sequence + 1) - start_q).to(tl.int32)
    num_keys = (tl.load(cu_seqlens_k_ptr + sequence + 1) - start_k).to(tl.int32)
    q_ptr += start_q * stride_qt + head * STRIDE_QH
    k_ptr += start_k * stride_kt + head * STRIDE_KH
    v_ptr += start_k * stride_vt + head * STRIDE_VH
    out_ptr += start_q * stride_ot
    lse_ptr += start_q
    if num_keys <= PIECE:
        _rows(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stride_qt, stride_kt, stride_vt, stride_ot, num_queries, num_keys, scale_log2,
              HEAD_DIM, MAIN, REST, BLOCK_Q, PIECE, 1, PRECISION, STAGES)
    elif num_keys <= 2 * PIECE:
        _rows(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stride_qt, stride_kt, stride_vt, stride_ot, num_queries, num_keys, scale_log2,
              HEAD_DIM, MAIN, REST, BLOCK_Q, PIECE, 2, PRECISION, STAGES)
    elif num_keys <= 3 * PIECE:
        _rows(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stride_qt, stride_kt, stride_vt, stride_ot, num_queries, num_keys, scale_log2,
              HEAD_DIM, MAIN, REST, BLOCK_Q, PIECE, 3, PRECISION, STAGES)
    elif PIECES == 4:
        _rows(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, stride_qt, stride_kt, stride_vt, stride_ot, num_queries, num_keys, scale_log2,
              HEAD_DIM, MAIN, REST, BLOCK_Q, PIECE, 4, PRECISION, STAGES)


def short_launch(*, q, k, v, out, lse, queries, keys, softmax_scale, block_q, piece, pieces, warps, stages, cap=None):
    num_rows, num_heads, head_dim = q.shape
    main, rest = head_dim_pieces(head_dim)
    return KernelLaunch(
        kernel=_short_kernel, grid=attention_grid(num_heads, queries.count),
        arguments={
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": out, "lse_ptr": lse,
            "cu_seqlens_q_ptr": queries.cu_seqlens, "cu_seqlens_k_ptr": keys.cu_seqlens, "order_ptr": keys.order,
            **stride_arguments("q", q), **stride_arguments("k", k), **stride_arguments("v", v), **stride_arguments("o", out),
            "num_rows": num_rows, "num_sequences": queries.count, "scale_log2": softmax_scale * LOG2_E,
            "HEAD_DIM": head_dim, "MAIN": main, "REST": rest, "BLOCK_Q": block_q, "PIECE": piece, "PIECES": pieces,
            "PRECISION": dot_precision(q.dtype), "STAGES": stages,
        }, num_warps=warps, num_stages=stages, max_registers=cap)

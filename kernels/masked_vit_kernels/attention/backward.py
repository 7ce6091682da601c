"""Backward of variable-length attention, deterministic and without atomics.

With p = exp2(s - lse * log2(e)), from s = q k^T * scale * log2(e), and the gradient dout:

    dv = p^T dout
    dp = dout v^T,  delta_i = sum_j p_ij dp_ij = dout_i . out_i,  ds = p * (dp - delta)
    dq = ds k * scale,  dk = ds^T q * scale

Three ways, by how many keys a sequence has:

resident   one program per (sequence, head) holds all keys and loops over tiles of queries: five
           matrix products. delta comes from p and dp, so `out` is not read: q, k, v, dout in,
           dq, dk, dv out, 14 bytes an element in half precision.
two_phase  one program per (sequence, head): dq tile by tile (and delta, to a scratch row), then
           dk and dv tile by tile: seven products, inputs of the second phase from cache.
flash      the same phases as two launches with one program per (tile, head).

The first launch of a backward also zeroes the rows of dq, dk and dv after the last sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masked_vit_kernels.attention.config import BackwardStep, backward_plan
from masked_vit_kernels.attention.forward import dot_precision
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
from masked_vit_kernels.packing import TILE, WIDE_TILE


@triton.jit
def _load_log2_lse(lse_ptr, first_query, num_queries, BLOCK_Q: tl.constexpr):
    """[BLOCK_Q] lse in base 2, 0 past the last query; -inf without keys, which have no weights."""
    rows = tl.arange(0, BLOCK_Q)
    mask = rows < num_queries - first_query
    return tl.load(lse_ptr + first_query + rows, mask=mask, other=0.0) * 1.4426950408889634


@triton.jit
def _query_tile_gradient(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
    first_query, num_queries, num_keys,
    stride_qt, stride_kt, stride_vt, stride_ot, stride_dot, stride_dqt, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, looping over keys; writes dq and delta."""
    # [BLOCK_Q, MAIN]
    q_main = load_tile(q_ptr, first_query, num_queries, stride_qt, BLOCK_Q, 0, MAIN, HEAD_DIM)
    dout_main = load_tile(
        dout_ptr, first_query, num_queries, stride_dot, BLOCK_Q, 0, MAIN, HEAD_DIM
    )
    out = load_tile(out_ptr, first_query, num_queries, stride_ot, BLOCK_Q, 0, MAIN, HEAD_DIM)
    delta = tl.sum(out.to(tl.float32) * dout_main.to(tl.float32), 1)
    dq_main = tl.zeros((BLOCK_Q, MAIN), tl.float32)
    if REST > 0:
        q_rest = load_tile(
            q_ptr, first_query, num_queries, stride_qt, BLOCK_Q, MAIN, REST, HEAD_DIM
        )
        dout_rest = load_tile(
            dout_ptr, first_query, num_queries, stride_dot, BLOCK_Q, MAIN, REST, HEAD_DIM
        )
        out = load_tile(out_ptr, first_query, num_queries, stride_ot, BLOCK_Q, MAIN, REST, HEAD_DIM)
        delta += tl.sum(out.to(tl.float32) * dout_rest.to(tl.float32), 1)
        dq_rest = tl.zeros((BLOCK_Q, REST), tl.float32)
    lse = _load_log2_lse(lse_ptr, first_query, num_queries, BLOCK_Q)
    rows = tl.arange(0, BLOCK_Q)
    tl.store(delta_ptr + first_query + rows, delta, mask=rows < num_queries - first_query)

    for first_key in range(0, num_keys, BLOCK_K):
        k_main = load_tile(k_ptr, first_key, num_keys, stride_kt, BLOCK_K, 0, MAIN, HEAD_DIM)
        v_main = load_tile(v_ptr, first_key, num_keys, stride_vt, BLOCK_K, 0, MAIN, HEAD_DIM)
        # [BLOCK_Q, MAIN] @ [MAIN, BLOCK_K] -> [BLOCK_Q, BLOCK_K]
        s = tl.dot(q_main, tl.trans(k_main), input_precision=PRECISION)
        dp = tl.dot(dout_main, tl.trans(v_main), input_precision=PRECISION)
        if REST > 0:
            k_rest = load_tile(k_ptr, first_key, num_keys, stride_kt, BLOCK_K, MAIN, REST, HEAD_DIM)
            v_rest = load_tile(v_ptr, first_key, num_keys, stride_vt, BLOCK_K, MAIN, REST, HEAD_DIM)
            s = tl.dot(q_rest, tl.trans(k_rest), s, input_precision=PRECISION)
            dp = tl.dot(dout_rest, tl.trans(v_rest), dp, input_precision=PRECISION)
        if first_key + BLOCK_K > num_keys:
            valid = tl.arange(0, BLOCK_K) < num_keys - first_key
            s = tl.where(valid[None, :], s, -float("inf"))
        p = tl.exp2(s * (scale * 1.4426950408889634) - lse[:, None])
        ds = (p * (dp - delta[:, None])).to(k_main.dtype)
        # [BLOCK_Q, BLOCK_K] @ [BLOCK_K, MAIN] -> [BLOCK_Q, MAIN]
        dq_main = tl.dot(ds, k_main, dq_main, input_precision=PRECISION)
        if REST > 0:
            dq_rest = tl.dot(ds, k_rest, dq_rest, input_precision=PRECISION)

    store_tile(
        dq_ptr, dq_main * scale, first_query, num_queries, stride_dqt, BLOCK_Q, 0, MAIN, HEAD_DIM
    )
    if REST > 0:
        store_tile(
            dq_ptr, dq_rest * scale, first_query, num_queries, stride_dqt,
            BLOCK_Q, MAIN, REST, HEAD_DIM,
        )  # fmt: skip


@triton.jit
def _key_tile_gradients(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
    first_key, num_queries, num_keys,
    stride_qt, stride_kt, stride_vt, stride_dot, stride_dqt, stride_dkt, stride_dvt, scale,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr, ALL_KEYS: tl.constexpr,
    ONE_QUERY_TILE: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, looping over queries.

    With ALL_KEYS the tile holds every key of the sequence: delta is summed from p and dp, and dq
    is complete and written as well.
    """
    # [BLOCK_K, MAIN]
    k_main = load_tile(k_ptr, first_key, num_keys, stride_kt, BLOCK_K, 0, MAIN, HEAD_DIM)
    v_main = load_tile(v_ptr, first_key, num_keys, stride_vt, BLOCK_K, 0, MAIN, HEAD_DIM)
    dk_main = tl.zeros((BLOCK_K, MAIN), tl.float32)
    dv_main = tl.zeros((BLOCK_K, MAIN), tl.float32)
    if REST > 0:
        k_rest = load_tile(k_ptr, first_key, num_keys, stride_kt, BLOCK_K, MAIN, REST, HEAD_DIM)
        v_rest = load_tile(v_ptr, first_key, num_keys, stride_vt, BLOCK_K, MAIN, REST, HEAD_DIM)
        dk_rest = tl.zeros((BLOCK_K, REST), tl.float32)
        dv_rest = tl.zeros((BLOCK_K, REST), tl.float32)
    valid = tl.arange(0, BLOCK_K) < num_keys - first_key

    # With constant bounds the compiler drops the loop, and with it the accumulators' long lives.
    for first_query in range(0, BLOCK_Q if ONE_QUERY_TILE else num_queries, BLOCK_Q):
        q_main = load_tile(q_ptr, first_query, num_queries, stride_qt, BLOCK_Q, 0, MAIN, HEAD_DIM)
        dout_main = load_tile(
            dout_ptr, first_query, num_queries, stride_dot, BLOCK_Q, 0, MAIN, HEAD_DIM
        )
        # [BLOCK_K, MAIN] @ [MAIN, BLOCK_Q] -> [BLOCK_K, BLOCK_Q]
        s = tl.dot(k_main, tl.trans(q_main), input_precision=PRECISION)
        if REST > 0:
            q_rest = load_tile(
                q_ptr, first_query, num_queries, stride_qt, BLOCK_Q, MAIN, REST, HEAD_DIM
            )
            dout_rest = load_tile(
                dout_ptr, first_query, num_queries, stride_dot, BLOCK_Q, MAIN, REST, HEAD_DIM
            )
            s = tl.dot(k_rest, tl.trans(q_rest), s, input_precision=PRECISION)
        lse = _load_log2_lse(lse_ptr, first_query, num_queries, BLOCK_Q)
        p = tl.exp2(s * (scale * 1.4426950408889634) - lse[None, :])
        # Keys past the last: zero in sums over keys; the rest of what comes of them is not stored.
        if ALL_KEYS:
            p = tl.where(valid[:, None], p, 0.0)
        # dv before dp: the tiles s and dp never live together, which is what keeps D=88 on chip.
        weights = p.to(q_main.dtype)
        # [BLOCK_K, BLOCK_Q] @ [BLOCK_Q, MAIN] -> [BLOCK_K, MAIN]
        dv_main = tl.dot(weights, dout_main, dv_main, input_precision=PRECISION)
        if REST > 0:
            dv_rest = tl.dot(weights, dout_rest, dv_rest, input_precision=PRECISION)
        dp = tl.dot(v_main, tl.trans(dout_main), input_precision=PRECISION)
        if REST > 0:
            dp = tl.dot(v_rest, tl.trans(dout_rest), dp, input_precision=PRECISION)
        if ALL_KEYS:
            delta = tl.sum(p * dp, 0)
        else:
            rows = tl.arange(0, BLOCK_Q)
            delta = tl.load(
                delta_ptr + first_query + rows, mask=rows < num_queries - first_query, other=0.0
            )
        ds = (p * (dp - delta[None, :])).to(q_main.dtype)
        dk_main = tl.dot(ds, q_main, dk_main, input_precision=PRECISION)
        if REST > 0:
            dk_rest = tl.dot(ds, q_rest, dk_rest, input_precision=PRECISION)
        if ALL_KEYS:
            # [BLOCK_Q, BLOCK_K] @ [BLOCK_K, MAIN] -> [BLOCK_Q, MAIN]
            dq = tl.dot(tl.trans(ds), k_main, input_precision=PRECISION) * scale
            store_tile(dq_ptr, dq, first_query, num_queries, stride_dqt, BLOCK_Q, 0, MAIN, HEAD_DIM)
            if REST > 0:
                dq = tl.dot(tl.trans(ds), k_rest, input_precision=PRECISION) * scale
                store_tile(
                    dq_ptr, dq, first_query, num_queries, stride_dqt, BLOCK_Q, MAIN, REST, HEAD_DIM
                )

    store_tile(dv_ptr, dv_main, first_key, num_keys, stride_dvt, BLOCK_K, 0, MAIN, HEAD_DIM)
    store_tile(dk_ptr, dk_main * scale, first_key, num_keys, stride_dkt, BLOCK_K, 0, MAIN, HEAD_DIM)
    if REST > 0:
        store_tile(dv_ptr, dv_rest, first_key, num_keys, stride_dvt, BLOCK_K, MAIN, REST, HEAD_DIM)
        store_tile(
            dk_ptr, dk_rest * scale, first_key, num_keys, stride_dkt, BLOCK_K, MAIN, REST, HEAD_DIM
        )


@triton.jit(
    do_not_specialize=per_run(
        "rows_q", "rows_k", "num_sequences", "num_work", "tiles_per_sequence", "keys_over",
        "keys_up_to", strides="q k v o do dq dk dv",
    )
)  # fmt: skip
def _varlen_attention_backward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
    cu_seqlens_q_ptr, cu_seqlens_k_ptr, order_ptr,
    stride_qt_by_8, stride_kt_by_8, stride_vt_by_8, stride_ot_by_8, stride_dot_by_8,
    stride_dqt_by_8, stride_dkt_by_8, stride_dvt_by_8,
    rows_q, rows_k, num_sequences, num_work, tiles_per_sequence, keys_over, keys_up_to,
    scale,
    STRIDE_QH: tl.constexpr, STRIDE_KH: tl.constexpr, STRIDE_VH: tl.constexpr,
    STRIDE_OH: tl.constexpr, STRIDE_DOH: tl.constexpr, STRIDE_DQH: tl.constexpr,
    STRIDE_DKH: tl.constexpr, STRIDE_DVH: tl.constexpr,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, KIND: tl.constexpr,
    ONE_QUERY_TILE: tl.constexpr, PRECISION: tl.constexpr,
    CLEAR_PARTS: tl.constexpr, CLEAR_ROWS: tl.constexpr, CLEAR_WIDTH: tl.constexpr,
):  # fmt: skip
    # KIND "resident" and "two_phase": order_ptr holds sequences, or is None (in their own order).
    # KIND "flash_queries" and "flash_keys": it is the tile map of the queries or the keys, or None.
    head = tl.program_id(0)
    work = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    stride_qt, stride_kt = stride_qt_by_8 * 8, stride_kt_by_8 * 8
    stride_vt, stride_ot = stride_vt_by_8 * 8, stride_ot_by_8 * 8
    stride_dot, stride_dqt = stride_dot_by_8 * 8, stride_dqt_by_8 * 8
    stride_dkt, stride_dvt = stride_dkt_by_8 * 8, stride_dvt_by_8 * 8
    dq_ptr += head * STRIDE_DQH
    dk_ptr += head * STRIDE_DKH
    dv_ptr += head * STRIDE_DVH

    if work >= num_work:
        part = work - num_work
        end_q = tl.load(cu_seqlens_q_ptr + num_sequences)
        end_k = tl.load(cu_seqlens_k_ptr + num_sequences)
        clear_rows(
            dq_ptr, end_q, rows_q, stride_dqt, part, CLEAR_PARTS, CLEAR_ROWS, HEAD_DIM, CLEAR_WIDTH
        )
        clear_rows(
            dk_ptr, end_k, rows_k, stride_dkt, part, CLEAR_PARTS, CLEAR_ROWS, HEAD_DIM, CLEAR_WIDTH
        )
        clear_rows(
            dv_ptr, end_k, rows_k, stride_dvt, part, CLEAR_PARTS, CLEAR_ROWS, HEAD_DIM, CLEAR_WIDTH
        )
        return

    if KIND == "resident" or KIND == "two_phase":
        sequence = work
        first_row = 0
        if order_ptr is not None:
            sequence = tl.load(order_ptr + work)
    else:
        if order_ptr is not None:
            sequence = tl.load(order_ptr + 2 * work)
            first_row = tl.load(order_ptr + 2 * work + 1)
            if sequence < 0:
                return
        else:
            BLOCK: tl.constexpr = BLOCK_Q if KIND == "flash_queries" else BLOCK_K
            sequence = work // tiles_per_sequence
            first_row = (work % tiles_per_sequence) * BLOCK
    start_q = tl.load(cu_seqlens_q_ptr + sequence).to(tl.int64)
    start_k = tl.load(cu_seqlens_k_ptr + sequence).to(tl.int64)
    num_queries = (tl.load(cu_seqlens_q_ptr + sequence + 1) - start_q).to(tl.int32)
    num_keys = (tl.load(cu_seqlens_k_ptr + sequence + 1) - start_k).to(tl.int32)
    if (num_keys <= keys_over) | (num_keys > keys_up_to):
        return

    key_head = head
    if GROUP > 1:  # heads of queries that share one of keys and values
        key_head = head // GROUP
    q_ptr += start_q * stride_qt + head * STRIDE_QH
    k_ptr += start_k * stride_kt + key_head * STRIDE_KH
    v_ptr += start_k * stride_vt + key_head * STRIDE_VH
    out_ptr += start_q * stride_ot + head * STRIDE_OH
    dout_ptr += start_q * stride_dot + head * STRIDE_DOH
    lse_ptr += head.to(tl.int64) * rows_q + start_q
    delta_ptr += head.to(tl.int64) * rows_q + start_q
    dq_ptr += start_q * stride_dqt
    dk_ptr += start_k * stride_dkt
    dv_ptr += start_k * stride_dvt

    if KIND == "two_phase":
        for first_query in range(0, num_queries, BLOCK_Q):
            _query_tile_gradient(
                q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
                first_query, num_queries, num_keys,
                stride_qt, stride_kt, stride_vt, stride_ot, stride_dot, stride_dqt, scale,
                BLOCK_Q, BLOCK_K, MAIN, REST, HEAD_DIM, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()  # delta is written by all threads and read by all
        for first_key in range(0, num_keys, BLOCK_K):
            _key_tile_gradients(
                q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
                first_key, num_queries, num_keys,
                stride_qt, stride_kt, stride_vt, stride_dot, stride_dqt, stride_dkt, stride_dvt,
                scale, BLOCK_Q, BLOCK_K, MAIN, REST, HEAD_DIM, PRECISION,
                ALL_KEYS=False, ONE_QUERY_TILE=False,
            )  # fmt: skip
    elif KIND == "flash_queries":
        if first_row < num_queries:
            _query_tile_gradient(
                q_ptr, k_ptr, v_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr,
                first_row, num_queries, num_keys,
                stride_qt, stride_kt, stride_vt, stride_ot, stride_dot, stride_dqt, scale,
                BLOCK_Q, BLOCK_K, MAIN, REST, HEAD_DIM, PRECISION,
            )  # fmt: skip
    else:
        if first_row < num_keys or KIND == "resident":
            _key_tile_gradients(
                q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, dk_ptr, dv_ptr,
                first_row, num_queries, num_keys,
                stride_qt, stride_kt, stride_vt, stride_dot, stride_dqt, stride_dkt, stride_dvt,
                scale, BLOCK_Q, BLOCK_K, MAIN, REST, HEAD_DIM, PRECISION,
                ALL_KEYS=KIND == "resident", ONE_QUERY_TILE=ONE_QUERY_TILE,
            )  # fmt: skip


def backward_launches(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    queries: Sequences,
    keys: Sequences,
    softmax_scale: float,
    plan: tuple[BackwardStep, ...] | None = None,
    capability: int | None = None,
) -> list[KernelLaunch]:
    """Describe the backward, launches in order.

    Args:
        q, out, dout: (Tq, H, D), k and v (Tk, Hk, D), H a multiple of Hk: strided views, see
            `tiles.readable`.
        lse: (H, Tq) fp32 of the forward; delta (H, Tq) fp32 scratch, unused by "resident".
        dq, dk, dv: (T, H, D) views to write: what each head of queries gives to keys and values.
        queries, keys: the sequences of both sides. Programs that own a sequence go by the keys'
            order, which is that of their work.
        plan: default: `backward_plan`.
        capability: entry of the launch table; default: the device's.
    """
    num_heads, head_dim = q.shape[1:]
    num_sequences = queries.count
    plan = plan or backward_plan(
        head_dim, queries.max_seqlen, keys.max_seqlen, q.dtype,
        capability or table_capability(q.device),
    )  # fmt: skip
    main, rest = head_dim_pieces(head_dim)
    launches = []
    for number, step in enumerate(plan):
        config = step.config
        tiles_per_sequence, order, num_work = 1, keys.order, num_sequences
        if step.kind in ("flash_queries", "flash_keys"):
            by_queries = step.kind == "flash_queries"
            side, rows = (queries, config.block_q) if by_queries else (keys, config.block_k)
            tiles_per_sequence = -(-side.max_seqlen // rows)
            # A tile of another height than the map's would do rows twice: no such entry here.
            maps = {TILE: side.tile_map}
            order = (maps if by_queries else {**maps, WIDE_TILE: side.wide_tile_map})[rows]
            num_work = num_sequences * tiles_per_sequence if order is None else order.shape[0]
        clearing = CLEARING_PROGRAMS if number == 0 else 0
        launches.append(
            KernelLaunch(
                kernel=_varlen_attention_backward_kernel,
                grid=attention_grid(num_heads, num_work + clearing),
                arguments={
                    "q_ptr": q,
                    "k_ptr": k,
                    "v_ptr": v,
                    "out_ptr": out,
                    "dout_ptr": dout,
                    "lse_ptr": lse,
                    "delta_ptr": delta,
                    "dq_ptr": dq,
                    "dk_ptr": dk,
                    "dv_ptr": dv,
                    "cu_seqlens_q_ptr": queries.cu_seqlens,
                    "cu_seqlens_k_ptr": keys.cu_seqlens,
                    "order_ptr": order,
                    **stride_arguments("q", q),
                    **stride_arguments("k", k),
                    **stride_arguments("v", v),
                    **stride_arguments("o", out),
                    **stride_arguments("do", dout),
                    **stride_arguments("dq", dq),
                    **stride_arguments("dk", dk),
                    **stride_arguments("dv", dv),
                    "rows_q": q.shape[0],
                    "rows_k": k.shape[0],
                    "num_sequences": num_sequences,
                    "num_work": num_work,
                    "tiles_per_sequence": max(tiles_per_sequence, 1),
                    "keys_over": step.keys_over,
                    "keys_up_to": step.keys_up_to,
                    "scale": softmax_scale,
                    "GROUP": num_heads // k.shape[1],
                    "HEAD_DIM": head_dim,
                    "MAIN": main,
                    "REST": rest,
                    "BLOCK_Q": config.block_q,
                    "BLOCK_K": config.block_k,
                    "KIND": step.kind,
                    "ONE_QUERY_TILE": (
                        step.kind == "resident" and queries.max_seqlen <= config.block_q
                    ),
                    "PRECISION": dot_precision(q.dtype),
                    "CLEAR_PARTS": CLEARING_PROGRAMS,
                    "CLEAR_ROWS": CLEARING_ROWS,
                    "CLEAR_WIDTH": round_up_to_power_of_two(head_dim),
                },
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                max_registers=config.max_registers,
            )
        )
    return launches


def backward_scratch(q: Tensor) -> Tensor:
    """The (H, Tq) fp32 scratch of the backward: 4 bytes a row and head."""
    return torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)

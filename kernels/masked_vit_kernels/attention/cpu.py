"""Attention over packed sequences on the CPU: buckets of like length, explicit backward.

Sequences are sorted by length and cut into buckets whose members differ by a few tokens, so that a
bucket is one dense (n, H, P, Dh) problem with little padding. The forward is PyTorch's flash
kernel on each bucket. Its backward is not used: at 30 to 250 tokens plain matrix products are
faster, with P recomputed from the log-sum-exp L and delta_i = o_i * do_i:

    P  = exp(scale * Q K^T - L)
    dV = P^T dO,    dS = P * (dO V^T - delta),    dQ = scale * dS K,    dK = scale * dS^T Q

A bucket's padding repeats the last token of its own sequence, so NaN in rows that belong to no
sequence is never read; the repeated queries and keys have P set to zero, and their results go to a
spare row past the end of every output buffer.

Tokens are read and written one head at a time: a packed tensor, a third of a qkv buffer or any
view whose heads are contiguous is a matrix of (Dh,) rows, and index_select copies those rows
straight into bucket order. No transpose, no copy of a strided view, one buffer for all gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from masked_vit_kernels.attention.arguments import check_bounds

_flash_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

# Scores of a bucket that are in flight at once: P and dP of this many elements stay in the cache.
_BUCKET_SCORES = 1 << 20
# Scores below which a bucket's calls cost more than its arithmetic, so that padding is cheaper.
_LITTLE_WORK = 1 << 17


@dataclass(frozen=True)
class _Side:
    """The queries or the keys of a bucket.

    Attributes:
        length: P, the longest sequence.
        shortest: tokens before the first padding of any sequence.
        rows: (n, P) int64 packed rows to read; padding repeats the sequence's last row.
        places: (n, P) int64 packed rows to write; padding goes to row T, the spare one.
        valid: (n, P) bool, or None where nothing is padded.
    """

    length: int
    shortest: int
    rows: np.ndarray
    places: np.ndarray
    valid: Tensor | None
    _indices: dict = field(default_factory=dict)

    def read_index(self, heads: int, row_stride: int) -> Tensor:
        """(n * H * P,) rows of a (T * row_stride, Dh) matrix, in bucket order (n, H, P)."""
        return self._head_index("read", self.rows, heads, row_stride)

    def write_index(self, heads: int, row_stride: int) -> Tensor:
        """As `read_index`, with the padding sent to the spare row."""
        return self._head_index("write", self.places, heads, row_stride)

    def _head_index(self, use: str, rows: np.ndarray, heads: int, row_stride: int) -> Tensor:
        key = (use, heads, row_stride)
        if key not in self._indices:
            index = rows[:, None, :] * row_stride + np.arange(heads)[:, None]  # (n, H, P)
            self._indices[key] = torch.from_numpy(index.reshape(-1))
        return self._indices[key]

    @functools.cached_property
    def token_places(self) -> Tensor:
        """(n * P,) packed rows to write, in the order (n, P)."""
        return torch.from_numpy(self.places.reshape(-1))


@dataclass(frozen=True)
class _Bucket:
    count: int  # n sequences
    queries: _Side
    keys: _Side

    def key_bias(self, dtype: torch.dtype) -> Tensor | None:
        """(n, 1, 1, Pk): -inf on padded keys, or None where no key is padded."""
        if self.keys.valid is None:
            return None
        bias = torch.zeros(self.keys.valid.shape, dtype=dtype)
        return bias.masked_fill_(~self.keys.valid, -torch.inf)[:, None, None, :]

    def zero_padding(self, scores: Tensor) -> None:
        """Zero the padded queries and keys of (n, H, Pq, Pk) scores, in place."""
        if self.queries.valid is not None:
            first = self.queries.shortest
            scores[:, :, first:].mul_(self.queries.valid[:, None, first:, None])
        if self.keys.valid is not None:
            first = self.keys.shortest
            scores[..., first:].mul_(self.keys.valid[:, None, None, first:])


@dataclass(frozen=True)
class _Plan:
    buckets: tuple[_Bucket, ...]
    covers_queries: bool  # every query row is in a bucket: buffers need no zeros
    covers_keys: bool
    uniform: bool  # self-attention of sequences of one length, without padding


@functools.lru_cache(maxsize=16)
def _plan(
    bounds_q: tuple[int, ...], bounds_k: tuple[int, ...], rows_q: int, rows_k: int, heads: int
) -> _Plan:
    """Cut sequences into buckets. Those without queries or without keys are in none."""
    check_bounds("cu_seqlens_q", bounds_q, rows_q)  # of a compiled graph nobody else has looked
    check_bounds("cu_seqlens_k", bounds_k, rows_k)
    starts_q, lengths_q = np.array(bounds_q[:-1], np.int64), np.diff(bounds_q)
    starts_k, lengths_k = np.array(bounds_k[:-1], np.int64), np.diff(bounds_k)
    order = np.lexsort((lengths_k, lengths_q))
    order = order[(lengths_q[order] > 0) & (lengths_k[order] > 0)]
    shared = bounds_q == bounds_k and rows_q == rows_k  # self-attention: build the indices once
    buckets, first = [], 0
    while first < len(order):
        last = _bucket_end(lengths_q[order], lengths_k[order], first, heads)
        chosen = order[first:last]
        queries = _side(starts_q[chosen], lengths_q[chosen], rows_q)
        keys = queries if shared else _side(starts_k[chosen], lengths_k[chosen], rows_k)
        buckets.append(_Bucket(len(chosen), queries, keys))
        first = last
    return _Plan(
        tuple(buckets),
        covers_queries=int(lengths_q[order].sum()) == rows_q,
        covers_keys=int(lengths_k[order].sum()) == rows_k,
        uniform=shared and len(order) > 0 and bool((lengths_q * len(lengths_q) == rows_q).all()),
    )


def _bucket_end(lengths_q: np.ndarray, lengths_k: np.ndarray, first: int, heads: int) -> int:
    """End of the bucket that starts at `first` of the sorted lengths.

    Lengths may exceed the shortest by a sixteenth (three tokens at least): that padding costs less
    than another round of small calls would. A bucket with little work takes in more.
    """
    shortest_q, shortest_k = int(lengths_q[first]), int(lengths_k[first])
    last = first + 1
    while last < len(lengths_q):
        work = (last - first) * heads * shortest_q * shortest_k
        slack = 15 if work < _LITTLE_WORK else 3
        limit_q = shortest_q + max(slack, shortest_q // 16)
        limit_k = shortest_k + max(slack, shortest_k // 16)
        scores = (last + 1 - first) * heads * int(lengths_q[last]) * limit_k
        fits = lengths_q[last] <= limit_q and shortest_k <= lengths_k[last] <= limit_k
        if not fits or scores > _BUCKET_SCORES:
            break
        last += 1
    return last


def _side(starts: np.ndarray, lengths: np.ndarray, spare_row: int) -> _Side:
    longest, shortest = int(lengths.max()), int(lengths.min())
    column = np.arange(longest)
    rows = starts[:, None] + np.minimum(column, lengths[:, None] - 1)
    valid = column < lengths[:, None]
    return _Side(
        length=longest,
        shortest=shortest,
        rows=rows,
        places=np.where(valid, rows, spare_row),
        valid=None if longest == shortest else torch.from_numpy(valid),
    )


def _head_rows(x: Tensor) -> tuple[Tensor, int]:
    """(T, H, Dh) -> a matrix of (Dh,) rows on the same memory, and its rows from token to token.

    Row t * stride + h is head h of token t. A view whose heads are not contiguous is copied.
    """
    tokens, heads, head_dim = x.shape
    if x.stride(2) != 1 or x.stride(1) != head_dim or x.stride(0) % head_dim:
        x = x.contiguous()
    row_stride = x.stride(0) // head_dim if tokens > 1 else heads
    rows = (tokens - 1) * row_stride + heads if tokens else 0
    return x.as_strided((rows, head_dim), (head_dim, 1)), row_stride


def _read(matrix: Tensor, row_stride: int, side: _Side, count: int, heads: int) -> Tensor:
    """Rows of a head matrix -> (n, H, P, Dh), contiguous."""
    taken = matrix.index_select(0, side.read_index(heads, row_stride))
    return taken.view(count, heads, side.length, matrix.shape[1])


def _split(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """[qkv (T, 3, H, Dh)], [q, kv (Tk, 2, H, Dh)] or [q, k, v] -> views q, k, v (T, H, Dh)."""
    if len(inputs) == 1:
        q, k, v = inputs[0].unbind(1)
    elif len(inputs) == 2:
        q, (k, v) = inputs[0], inputs[1].unbind(1)
    else:
        q, k, v = inputs
    return q, k, v


def _plan_for(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> _Plan:
    bounds_q, bounds_k = tuple(cu_seqlens_q.tolist()), tuple(cu_seqlens_k.tolist())
    return _plan(bounds_q, bounds_k, q.shape[0], k.shape[0], q.shape[1])


@torch.library.custom_op("masked_vit_kernels::cpu_varlen_attention", mutates_args=())
def _attention_forward(
    inputs: Sequence[Tensor], cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """-> out (Tq, H, Dh), lse (Tq, H) in float32, or float64 for float64 inputs."""
    q, k, v = _split(inputs)
    (tokens, heads, head_dim), plan = q.shape, _plan_for(q, k, cu_seqlens_q, cu_seqlens_k)
    if plan.uniform:
        return _uniform_forward(q, k, v, cu_seqlens_q.shape[0] - 1, scale)
    matrices = [_head_rows(x) for x in (q, k, v)]
    allocate = q.new_empty if plan.covers_queries else q.new_zeros
    out = allocate(tokens + 1, heads, head_dim)
    lse = q.new_full((tokens + 1, heads), -torch.inf, dtype=_lse_dtype(q))
    for bucket in plan.buckets:
        query, key, value = (
            _read(*matrix, side, bucket.count, heads)
            for matrix, side in zip(
                matrices, (bucket.queries, bucket.keys, bucket.keys), strict=True
            )
        )
        bucket_out, bucket_lse = _flash_forward(
            query, key, value, attn_mask=bucket.key_bias(q.dtype), scale=scale
        )  # (n, H, Pq, Dh) laid out as (n, Pq, H, Dh); (n, H, Pq)
        places = bucket.queries.token_places
        out.index_copy_(0, places, bucket_out.transpose(1, 2).reshape(-1, heads, head_dim))
        lse.index_copy_(0, places, bucket_lse.transpose(1, 2).reshape(-1, heads))
    return out[:tokens], lse[:tokens]


def _uniform_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Sequences of one length are a dense batch already: nothing is copied into order."""
    dense = (_dense(x, sequences) for x in (q, k, v))
    out, lse = _flash_forward(*dense, scale=scale)  # (S, H, P, Dh), (S, H, P)
    out = out.transpose(1, 2).reshape(q.shape)
    return out, lse.transpose(1, 2).to(_lse_dtype(q)).reshape(q.shape[:2])


def _dense(x: Tensor, sequences: int) -> Tensor:
    """(T, H, ...) of sequences of one length -> a view (S, H, P, ...)."""
    return x.unflatten(0, (sequences, -1)).transpose(1, 2)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


@_attention_forward.register_fake
def _(inputs, cu_seqlens_q, cu_seqlens_k, scale):
    q = _split(inputs)[0]
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=_lse_dtype(q))


@torch.library.custom_op("masked_vit_kernels::cpu_varlen_attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    inputs: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
) -> list[Tensor]:
    """-> one gradient buffer for each of `inputs`."""
    q, k, v = _split(inputs)
    plan = _plan_for(q, k, cu_seqlens_q, cu_seqlens_k)
    delta = (grad_out.to(lse.dtype) * out).sum(-1)  # (Tq, H)
    if plan.uniform:
        return _uniform_backward(plan, grad_out, inputs, lse, delta, scale)
    wide = _matmul_dtype(q.dtype)
    heads = q.shape[1]
    covered = [plan.covers_queries, plan.covers_keys, plan.covers_keys][: len(inputs)]
    if len(inputs) == 1:
        covered = [plan.covers_queries and plan.covers_keys]
    buffers = [
        (x.new_empty if full else x.new_zeros)(x.shape[0] + 1, *x.shape[1:])
        for x, full in zip(inputs, covered, strict=True)
    ]
    sources = [_head_rows(x) for x in (q, k, v, grad_out)]
    sinks = [_head_rows(x) for x in _split(buffers)]
    flat_lse, flat_delta = lse.reshape(-1), delta.view(-1)
    for bucket in plan.buckets:
        sides = (bucket.queries, bucket.keys, bucket.keys)
        query, key, value, grad = (
            _read(*source, side, bucket.count, heads).to(wide).flatten(0, 1)
            for source, side in zip(sources, (*sides, bucket.queries), strict=True)
        )  # (n * H, P, Dh) each
        per_query = bucket.queries.read_index(heads, heads)
        shape = (bucket.count * heads, bucket.queries.length, 1)
        gradients = _bucket_backward(
            bucket, query, key, value, grad, flat_lse[per_query].view(shape),
            flat_delta[per_query].view(shape), scale,
        )  # fmt: skip
        for (matrix, row_stride), side, gradient in zip(sinks, sides, gradients, strict=True):
            rows = gradient.view(-1, gradient.shape[-1]).to(q.dtype)
            matrix.index_copy_(0, side.write_index(heads, row_stride), rows)
    return [buffer[:-1] for buffer in buffers]


def _uniform_backward(
    plan: _Plan,
    grad_out: Tensor,
    inputs: Sequence[Tensor],
    lse: Tensor,
    delta: Tensor,
    scale: float,
) -> list[Tensor]:
    """Sequences of one length lie in the buckets' order: blocks are copied, not single rows."""
    buffers = [x.new_empty(x.shape) for x in inputs]
    wide, first = _matmul_dtype(grad_out.dtype), 0
    for bucket in plan.buckets:
        rows = slice(first, first + bucket.count * bucket.queries.length)
        first = rows.stop
        query, key, value, grad = (
            _dense(x[rows], bucket.count).to(wide).flatten(0, 1)
            for x in (*_split(inputs), grad_out)
        )  # (n * H, P, Dh) each
        bucket_lse, bucket_delta = (
            _dense(x[rows], bucket.count).flatten(0, 1)[..., None] for x in (lse, delta)
        )  # (n * H, Pq, 1) each
        gradients = _bucket_backward(
            bucket, query, key, value, grad, bucket_lse, bucket_delta, scale
        )
        for buffer, gradient in zip(_split(buffers), gradients, strict=True):
            sink = _dense(buffer[rows], bucket.count)
            sink.copy_(gradient.view(sink.shape))
    return buffers


def _bucket_backward(
    bucket: _Bucket,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one dense bucket; tensors (n * H, P, Dh), lse and delta (n * H, Pq, 1)."""
    unused = query.new_empty(1)
    by_sequence = (bucket.count, -1, bucket.queries.length, bucket.keys.length)
    if query.dtype == lse.dtype:
        scores = torch.baddbmm(lse, query, key.transpose(1, 2), beta=-1, alpha=scale)
    else:
        scores = torch.bmm(query, key.transpose(1, 2)).to(lse.dtype).mul_(scale).sub_(lse)
    weights = scores.exp_()  # [n * H, Pq, Pk]
    bucket.zero_padding(weights.view(by_sequence))
    narrow = weights.to(query.dtype)
    grad_value = torch.bmm(narrow.transpose(1, 2), grad)
    grad_scores = torch.bmm(grad, value.transpose(1, 2)).to(lse.dtype).sub_(delta).mul_(weights)
    grad_scores = grad_scores.to(query.dtype)
    grad_query = torch.baddbmm(unused, grad_scores, key, beta=0, alpha=scale)
    grad_key = torch.baddbmm(unused, grad_scores.transpose(1, 2), query, beta=0, alpha=scale)
    return grad_query, grad_key, grad_value


@functools.cache
def _matmul_dtype(dtype: torch.dtype) -> torch.dtype:
    """bfloat16 products where the CPU has them (AMX, AVX512-BF16), float32 ones elsewhere."""
    if dtype == torch.bfloat16 and (
        torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    ):
        return dtype
    return dtype if dtype == torch.float64 else torch.float32


@_attention_backward.register_fake
def _(grad_out, inputs, out, lse, cu_seqlens_q, cu_seqlens_k, scale):
    return [x.new_empty(x.shape) for x in inputs]


def _setup_context(ctx, inputs, output):
    tensors, cu_seqlens_q, cu_seqlens_k, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, _grad_lse):
    *tensors, out, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    gradients = _attention_backward(
        grad_out.contiguous(), tensors, out, lse, cu_seqlens_q, cu_seqlens_k, ctx.scale
    )
    return gradients, None, None, None


_attention_forward.register_autograd(_backward, setup_context=_setup_context)


def _of_equal_heads(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Keys and values repeated for the queries' heads that share them; autograd adds them up."""
    q, k, v = _split(inputs)
    if q.shape[1] == k.shape[1]:
        return list(inputs)
    group = q.shape[1] // k.shape[1]
    return [q, *(x.repeat_interleave(group, dim=1) for x in (k, v))]


def attend(
    inputs: Sequence[Tensor], cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of checked inputs: (qkv,), (q, kv) or (q, k, v), each (T, ..., H, Dh).

    Returns:
        (Tq, H, Dh) in the inputs' dtype, or the one that autocast asks for, and the LSE (H, Tq) in
        float32; see `varlen_attention`.

    Raises:
        ValueError: bounds that do not rise from 0 to at most the number of rows.
    """
    if torch.is_autocast_enabled("cpu") and inputs[0].dtype != torch.float64:
        inputs = [x.to(torch.get_autocast_dtype("cpu")) for x in inputs]
    out, lse = _attention_forward(_of_equal_heads(inputs), cu_seqlens_q, cu_seqlens_k, scale)
    return out, lse.t().float()

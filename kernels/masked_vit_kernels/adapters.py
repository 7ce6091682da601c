"""The ops under the conventions of other libraries, for code that is written for those.

    flash_attn_varlen_func and its packed variants     flash-attn's argument order and results
    memory_efficient_attention                          xformers' (1, T, H, D) and list of lengths
    restore_tokens                                      MAE's ids_restore

Each is a few views and one op: what differs is names, order and shapes. MAE's `ids_keep` needs no
adapter: `gather_tokens(x, ids_keep)` takes the kept tokens, `scatter_tokens(x, ids_keep,
mask_token, N)` puts them back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from masked_vit_kernels.attention.flash_keywords import check_flash_attn_keywords
from masked_vit_kernels.attention.varlen import (
    varlen_attention,
    varlen_attention_kvpacked,
    varlen_attention_qkvpacked,
)
from masked_vit_kernels.checks import check_shape
from masked_vit_kernels.packing import Packing, pack_lengths
from masked_vit_kernels.tokens.gather import scatter_tokens

Attended = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Attended:
    """`varlen_attention` as flash-attn 2 calls it: q (Tq, H, D), k and v (Tk, Hk, D).

    Returns:
        (Tq, H, D); with `return_attn_probs` also the LSE (H, Tq) and None in place of the
        probabilities, which flash-attn returns for tests of its dropout alone.

    Raises:
        ValueError: what asks for more than attention within each sequence, in words, and what
        `varlen_attention` refuses.
    """
    attended = varlen_attention(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=softmax_scale, return_lse=return_attn_probs, causal=causal,
        dropout_p=dropout_p, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        deterministic=deterministic, block_table=block_table,
    )  # fmt: skip
    return _as_flash_attn(attended)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attended:
    """`flash_attn_varlen_func` of qkv (T, 3, H, D)."""
    attended = varlen_attention_qkvpacked(
        qkv, cu_seqlens, max_seqlen, softmax_scale=softmax_scale, return_lse=return_attn_probs,
        causal=causal, dropout_p=dropout_p, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, deterministic=deterministic,
    )  # fmt: skip
    return _as_flash_attn(attended)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attended:
    """`flash_attn_varlen_func` of q (Tq, H, D) and kv (Tk, 2, Hk, D)."""
    attended = varlen_attention_kvpacked(
        q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        softmax_scale=softmax_scale, return_lse=return_attn_probs, causal=causal,
        dropout_p=dropout_p, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes,
        deterministic=deterministic,
    )  # fmt: skip
    return _as_flash_attn(attended)


def _as_flash_attn(attended: Tensor | tuple[Tensor, Tensor]) -> Attended:
    return attended if isinstance(attended, Tensor) else (*attended, None)


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_seqlens: Sequence[int] | Packing,
    kv_seqlens: Sequence[int] | Packing | None = None,
    *,
    p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Attention within the blocks of a diagonal, as xformers' with a `BlockDiagonalMask`.

    Args:
        query: (1, Tq, H, D); key, value: (1, Tk, Hk, D).
        q_seqlens, kv_seqlens: what `BlockDiagonalMask.from_seqlens` takes, lengths on the host; the
            keys' are the queries' where they are not given. They are described anew in every call:
            layers that share them do better with one `Packing`.
        p: dropout, which must be 0.
        scale: default D ** -0.5.

    Returns:
        (1, Tq, H, D).

    Raises:
        ValueError: shapes that do not fit, lengths that do not add up to the tokens.
    """
    check_flash_attn_keywords({"dropout_p": p})
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_shape(name, x, (1, None, None, None), "(1, T, H, D)")
    queries = _packing("q_seqlens", q_seqlens, query)
    keys = queries if kv_seqlens is None else _packing("kv_seqlens", kv_seqlens, key)
    out = varlen_attention(
        query[0], key[0], value[0], queries.cu_seqlens, keys.cu_seqlens, queries.max_seqlen,
        keys.max_seqlen, packing_q=queries, packing_k=keys, softmax_scale=scale,
    )  # fmt: skip
    assert isinstance(out, Tensor)  # no LSE was asked for
    return out[None]


def _packing(name: str, seqlens: Sequence[int] | Packing, x: Tensor) -> Packing:
    packing = seqlens if isinstance(seqlens, Packing) else pack_lengths(seqlens).to(x.device)
    if packing.capacity != x.shape[1]:
        raise ValueError(
            f"{name} must add up to the {x.shape[1]} tokens, got {packing.capacity}"
        )
    return packing


def restore_tokens(x: Tensor, ids_restore: Tensor, mask_token: Tensor) -> Tensor:
    """Kept tokens back in the image's order with mask tokens between, as MAE's decoder does.

    Place n gets x[ids_restore[n]], and the mask token where that is K or more.

    Args:
        x: (B, K, D), the tokens that `ids_keep` took: those whose place in the shuffle is below K.
        ids_restore: (B, N) int64, each image's permutation back from the shuffle.
        mask_token: as `scatter_tokens` takes it: (D,), (1, 1, D), ...

    Returns:
        (B, N, D) in x's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_shape("x", x, (None, None, None), "(B, K, D)")
    check_shape("ids_restore", ids_restore, (x.shape[0], None), f"({x.shape[0]}, N)")
    num_kept, num_tokens = x.shape[1], ids_restore.shape[1]
    if num_kept > num_tokens:
        raise ValueError(f"{num_kept} kept tokens do not fit the {num_tokens} of ids_restore")
    ids_keep = torch.argsort(ids_restore, dim=1)[:, :num_kept]
    return scatter_tokens(x, ids_keep, mask_token, num_tokens)

"""The CPU takes of attention's arguments what a GPU takes: the rules stand before the dispatch."""

import pytest
import torch
from masked_vit_kernels import (
    pack_lengths,
    varlen_attention,
    varlen_attention_kvpacked,
    varlen_attention_qkvpacked,
)
from masked_vit_kernels.attention.arguments import Side, check_attention, reads_values

LENGTHS = [5, 0, 12]
BOUNDS = [0, 5, 5, 17]


def call(kind, *, bounds=BOUNDS, max_seqlen=12, packing=None, head_dim=24, scale=None, rows=17,
         dtype=torch.float32, heads=2):  # fmt: skip
    """One of the three public functions on zeros; `bounds` may be those of q alone."""
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    shape = heads, head_dim
    q, kv, qkv = (torch.zeros(rows, *parts, *shape, dtype=dtype) for parts in ((), (2,), (3,)))
    if kind == "qkv":
        return varlen_attention_qkvpacked(
            qkv, cu_seqlens, max_seqlen, packing=packing, softmax_scale=scale
        )
    sides = {"packing_q": packing, "packing_k": packing, "softmax_scale": scale}
    if kind == "kv":
        return varlen_attention_kvpacked(
            q, kv, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **sides
        )
    return varlen_attention(q, q, q, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **sides)


@pytest.mark.parametrize("kind", ["qkv", "kv", "q, k, v"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_seqlen": 11}, r"max_seqlen\w* must be at least the longest sequence, 12, got 11"),
        ({"packing": pack_lengths([12, 0, 5])},
         r"packing\w* describes other sequences.*\[0, 12, 12, 17\] there and \[0, 5, 5, 17\] here"),
        ({"scale": -0.5}, "softmax_scale must be positive and finite, got -0.5"),
        ({"scale": 0.0}, "softmax_scale must be positive and finite, got 0.0"),
        ({"scale": float("nan")}, "softmax_scale must be positive and finite, got nan"),
        ({"scale": float("inf")}, "softmax_scale must be positive and finite, got inf"),
        ({"head_dim": 20}, "D must be a multiple of 8 up to 128, got 20: choose another number"),
        ({"head_dim": 256}, "D must be a multiple of 8 up to 128, got 256"),
        ({"rows": 16}, r"end within the 16 rows, got \[0, 5, 5, 17\]"),
        ({"bounds": [0, 5, 4, 17]}, r"not decrease.*got \[0, 5, 4, 17\]"),
        ({"bounds": [1, 5, 5, 17]}, "must start at 0"),
    ],
)  # fmt: skip
def test_what_no_kernel_could_take_is_refused_on_the_cpu(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(kind, **arguments)


@pytest.mark.parametrize("kind", ["qkv", "kv", "q, k, v"])
def test_no_heads_and_no_features_are_refused(kind):
    """Without heads the CPU's attention once ended the process by a signal."""
    with pytest.raises(ValueError, match="H must be at least 1, got 0"):
        call(kind, heads=0)
    with pytest.raises(ValueError, match="D must be a multiple of 8 up to 128, got 0"):
        call(kind, head_dim=0)


@pytest.mark.parametrize("kind", ["qkv", "kv", "q, k, v"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_seqlen": 12.0}, r"max_seqlen\w* must be an int, got float"),
        ({"max_seqlen": None}, r"max_seqlen\w* must be an int, got NoneType"),
        ({"max_seqlen": None, "packing": pack_lengths(LENGTHS)}, "must be an int, got NoneType"),
        ({"packing": 5}, r"packing\w* must be a Packing, got int"),
        ({"scale": "x"}, "softmax_scale must be a float, got str"),
    ],
)
def test_arguments_of_other_kinds_are_named(kind, arguments, message):
    with pytest.raises(TypeError, match=message):
        call(kind, **arguments)


def test_what_is_no_tensor_is_named():
    q, bounds = torch.zeros(17, 2, 24), torch.tensor(BOUNDS)
    with pytest.raises(TypeError, match="q must be a tensor, got list"):
        varlen_attention(q.tolist(), q, q, bounds, bounds, 12, 12)
    with pytest.raises(TypeError, match="cu_seqlens_k must be a tensor, got list"):
        varlen_attention(q, q, q, bounds, BOUNDS, 12, 12)


@pytest.mark.parametrize("kind", ["qkv", "kv", "q, k, v"])
def test_what_a_kernel_takes_is_taken(kind):
    """Float64 besides: in it the CPU path is held to the reference."""
    for arguments in ({}, {"max_seqlen": 500}, {"packing": pack_lengths(LENGTHS)}, {"rows": 20},
                      {"scale": 0.1}, {"dtype": torch.float64}, {"head_dim": 128}):  # fmt: skip
        assert not call(kind, **arguments).any()


def test_a_gpu_is_looked_at_on_request(monkeypatch):
    class OnGpu(torch.Tensor):
        is_cpu, is_cuda = False, True

    on_gpu = torch.tensor(BOUNDS).as_subclass(OnGpu)
    monkeypatch.setattr("masked_vit_kernels.attention.arguments.Tensor", OnGpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    side = Side("k", 17, on_gpu, 11, None)
    monkeypatch.delenv("MASKED_VIT_KERNELS_CHECK", raising=False)
    assert not reads_values(on_gpu)
    check_attention(24, None, side)
    monkeypatch.setenv("MASKED_VIT_KERNELS_CHECK", "1")
    assert reads_values(on_gpu)
    with pytest.raises(ValueError, match="max_seqlen_k must be at least the longest"):
        check_attention(24, None, side)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not reads_values(on_gpu)


def test_nothing_is_read_while_a_graph_is_traced():
    packing = pack_lengths(LENGTHS)

    def attend(qkv):
        return varlen_attention_qkvpacked(qkv, packing.cu_seqlens, 12, packing=packing)

    qkv = torch.randn(17, 3, 2, 8)
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(qkv), attend(qkv))

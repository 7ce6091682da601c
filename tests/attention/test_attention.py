"""Attention on a GPU: every dtype, head dim and length list against float64.

    pytest -m gpu tests/attention/test_attention.py
    compute-sanitizer --tool memcheck --error-exitcode 1 \
        python -m pytest -m gpu tests/attention/test_attention.py -k lengths

The argument checks below need no GPU.
"""

import pytest
import torch
from attention_checks import LENGTHS, AttentionProblem, check_attention, problem
from masked_vit_kernels import (
    pack_lengths,
    packing_from_cu_seqlens,
    varlen_attention,
    varlen_attention_kvpacked,
    varlen_attention_qkvpacked,
)
from masked_vit_kernels.attention import varlen as attention
from masked_vit_kernels.attention.config import backward_plan
from masked_vit_kernels.attention.tiles import readable
from masked_vit_kernels.catalogue.sizes import HEAD_DIMS
from masked_vit_kernels.launch import KernelLaunch, table_capability

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("separate", "qkv", "kv", "transposed", "narrowed")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("longest", LENGTHS)
@pytest.mark.parametrize("head_dim", range(8, 129, 8))
def test_lengths_against_float64(head_dim, longest, dtype):
    torch.manual_seed(head_dim + longest)
    layout = LAYOUTS[(head_dim // 8 + longest) % 5]
    check_attention(problem(head_dim, longest, dtype, layout, device="cuda", maps=longest != 128))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_thousand_tokens_and_many_sequences(head_dim, dtype):
    torch.manual_seed(head_dim)
    check_attention(AttentionProblem(head_dim, (1024, 1), (1000, 7), dtype, device="cuda"))
    lengths = tuple(torch.randint(38, 200, (40,)).tolist())
    check_attention(AttentionProblem(head_dim, lengths, lengths, dtype, "qkv", device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("longest", LENGTHS)
@pytest.mark.parametrize("head_dim", [24, 80])
def test_repeated_backwards_are_bitwise_equal(head_dim, longest):
    case = problem(head_dim, longest, torch.bfloat16, "qkv", device="cuda")
    torch.manual_seed(1)
    first = check_attention(case)
    for _ in range(5):
        torch.manual_seed(1)
        for name, result in check_attention(case).items():
            assert torch.equal(result, first[name]), name


def _qkv(lengths, device="cuda", dtype=torch.bfloat16, head_dim=32, heads=3):
    packing = pack_lengths(lengths, capacity=sum(lengths) + 30).to(device)
    torch.manual_seed(0)
    qkv = torch.randn(packing.capacity, 3, heads, head_dim, device=device).to(dtype)
    return packing, qkv.requires_grad_()


def _attend(qkv, packing):
    return varlen_attention_qkvpacked(qkv, packing.cu_seqlens, packing.max_seqlen, packing=packing)


@pytest.mark.gpu
def test_compiles_without_graph_breaks():
    packing, qkv = _qkv([5, 100, 0, 190])
    compiled = torch.compile(lambda x: _attend(x * 2, packing) + 1, fullgraph=True)
    expected, found = _attend(qkv * 2, packing) + 1, compiled(qkv)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(found, qkv, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, qkv, upstream)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.gpu
def test_one_captured_graph_serves_other_lengths():
    packing, qkv = _qkv([5, 100, 0, 190])
    packing = pack_lengths([5, 100, 0, 190], max_seqlen=256, capacity=packing.capacity).to("cuda")
    upstream = torch.randn(packing.capacity, 3, 32, device="cuda", dtype=torch.bfloat16)

    def step():
        out = _attend(qkv, packing)
        return out, *torch.autograd.grad(out, qkv, upstream)

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    other = pack_lengths([190, 3, 77, 40], max_seqlen=256, capacity=packing.capacity).to("cuda")
    for name in ("cu_seqlens", "sequence_ids", "tile_map", "wide_tile_map", "sequence_order"):
        getattr(packing, name).copy_(getattr(other, name))
    for tensor in captured:
        tensor.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    for found, expected in zip(captured, step(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.gpu
def test_no_synchronisation_and_autocast():
    packing, qkv = _qkv([5, 100, 0, 190], dtype=torch.float32)
    _attend(qkv, packing).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = _attend(qkv, packing)
        out.float().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.dtype == torch.bfloat16 and qkv.grad.dtype == torch.float32


@pytest.mark.gpu
def test_opcheck():
    packing, qkv = _qkv([5, 100, 0, 190])
    maps = (packing.tile_map, packing.wide_tile_map) * 2 + (packing.sequence_order,)
    bounds = (packing.cu_seqlens, packing.cu_seqlens)
    torch.library.opcheck(
        attention._attention, (qkv, None, None, *bounds, *maps, 190, 190, 32**-0.5)
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("lengths", "on_hopper"), [([60, 3], 1), ([100, 3], 2), ([190, 3], 2)])
def test_launches_of_a_backward(monkeypatch, lengths, on_hopper):
    packing, qkv = _qkv(lengths, head_dim=64)
    out, kinds, original = _attend(qkv, packing), [], KernelLaunch.run

    def run(self):
        kinds.append(self.arguments["KIND"])
        original(self)

    monkeypatch.setattr(KernelLaunch, "run", run)
    out.sum().backward()
    capability = table_capability(qkv.device)
    plan = backward_plan(64, max(lengths), max(lengths), qkv.dtype, capability)
    assert kinds == [step.kind for step in plan]
    assert len(kinds) == on_hopper or capability != 90


@pytest.mark.gpu
def test_the_running_kernel_is_the_audited_one():
    """Registers, stack and shared memory of what runs are those the compile audit measured."""
    from masked_vit_kernels.attention.forward import forward_launch
    from masked_vit_kernels.attention.sequences import Sequences
    from masked_vit_kernels.compile import compile_launch

    packing, qkv = _qkv([100, 90], head_dim=80, heads=16)
    q, k, v = qkv.detach().unbind(1)
    out, lse = torch.empty_like(q), torch.empty(16, q.shape[0], device="cuda")
    both = Sequences.of(packing.cu_seqlens, 100, packing)
    launch = forward_launch(
        q=q, k=k, v=v, out=out, lse=lse, queries=both, keys=both, softmax_scale=80**-0.5
    )
    running = launch.kernel[launch.grid](**launch.arguments, **launch.options)
    major, minor = torch.cuda.get_device_capability()
    assert running.asm["cubin"] == compile_launch(launch, major * 10 + minor).asm["cubin"]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_runs_on_the_device_of_its_tensors():
    packing, qkv = _qkv([5, 100], device="cuda:1")
    out = _attend(qkv, packing)
    out.sum().backward()
    assert out.device.index == 1 and out.isfinite().all()


@pytest.mark.gpu
def test_plain_tensors_and_packings_agree():
    packing, qkv = _qkv([5, 100, 0, 190])
    device_packing = packing_from_cu_seqlens(packing.cu_seqlens, 190, packing.capacity)
    plain = varlen_attention_qkvpacked(qkv, packing.cu_seqlens, 190)
    for other in (packing, device_packing):
        assert torch.equal(plain, _attend(qkv, other))
    q, k, v = qkv.unbind(1)
    bounds = (packing.cu_seqlens, packing.cu_seqlens, 190, 190)
    assert torch.equal(plain, varlen_attention(q, k, v, *bounds))
    assert torch.equal(plain, varlen_attention_kvpacked(q, qkv[:, 1:], *bounds))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (10, 2, 20)}, "D must be a multiple of 8"),
        ({"q": (10, 2, 136)}, "D must be a multiple of 8"),
        ({"scale": -1.0}, "softmax_scale must be positive"),
        ({"dtype": torch.float64}, "must be one of"),
        ({"cu": (1, 4)}, r"cu_seqlens_q must have shape \(S \+ 1,\)"),
        ({"max": -1}, "must not be negative"),
        ({"packing": pack_lengths([11])}, "packing_q describes 11 rows"),
    ],
)
def test_bad_arguments_raise(change, message):
    shape = change.get("q", (10, 2, 24))
    x = torch.empty(shape, dtype=change.get("dtype", torch.float32), device="meta")
    bounds = torch.empty(change.get("cu", (4,)), dtype=torch.int32, device="meta")
    longest = change.get("max", 20)
    with pytest.raises(ValueError, match=message):
        varlen_attention(
            x, x, x, bounds, bounds, longest, longest,
            softmax_scale=change.get("scale"), packing_q=change.get("packing"),
        )  # fmt: skip


def test_shapes_that_do_not_match_raise():
    q, wide = torch.empty(10, 2, 24, device="meta"), torch.empty(10, 2, 32, device="meta")
    bounds = torch.empty(4, dtype=torch.int32, device="meta")
    with pytest.raises(ValueError, match=r"k must have shape \(Tk, Hk, 24\), got \(10, 2, 32\)"):
        varlen_attention(q, wide, q, bounds, bounds, 10, 10)
    with pytest.raises(ValueError, match=r"qkv must have shape \(T, 3, H, D\)"):
        varlen_attention_qkvpacked(q, bounds, 10)
    with pytest.raises(ValueError, match="kv must have shape"):
        varlen_attention_kvpacked(q, wide, bounds, bounds, 10, 10)


def test_views_are_read_in_place_where_their_strides_allow():
    qkv = torch.empty(10, 3, 2, 24)
    for view in (qkv[:, 1], qkv.transpose(1, 2)[:, :, 0], torch.empty(2, 10, 24).transpose(0, 1)):
        assert readable(view) is view
    for view in (torch.empty(10, 2, 25)[..., 1:], torch.empty(24, 2, 10).permute(2, 1, 0)):
        assert readable(view).is_contiguous()

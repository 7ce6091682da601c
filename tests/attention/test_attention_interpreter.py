"""The attention kernels in Triton's interpreter against float64 (see `attention_checks`)."""

import pytest
import torch
from attention_checks import LENGTHS, AttentionProblem, check_attention, problem
from masked_vit_kernels import (
    pack_lengths,
    reference,
    varlen_attention,
    varlen_attention_kvpacked,
    varlen_attention_qkvpacked,
)
from masked_vit_kernels.attention import varlen as attention
from masked_vit_kernels.attention.config import AttentionConfig, backward_plan
from masked_vit_kernels.attention.tiles import head_dim_pieces
from masked_vit_kernels.catalogue.attention import launches_of
from masked_vit_kernels.catalogue.sizes import HEAD_DIMS as TUNED

pytestmark = pytest.mark.interpreter

HEAD_DIMS = tuple(range(8, 129, 8))
LAYOUTS = ("separate", "qkv", "kv", "transposed", "narrowed")


def _pairwise_cases():
    """Each head dim with each length set where it is tuned, with one elsewhere; dtype, layout, the
    presence of tile maps and the GPU whose tiles are taken take turns."""
    count = 0
    for head_dim in HEAD_DIMS:
        sets = tuple(LENGTHS) if head_dim in TUNED else (tuple(LENGTHS)[head_dim // 8 % 4],)
        for longest in sets:
            dtype = torch.float32 if count % 3 == 0 else torch.float16
            capability = (90, 100, 90, 80)[count % 7 % 4]
            yield head_dim, longest, dtype, LAYOUTS[count % 5], count % 2 == 0, capability
            count += 1


@pytest.mark.parametrize(
    ("head_dim", "longest", "dtype", "layout", "maps", "capability"), list(_pairwise_cases())
)
def test_forward_lse_and_gradients(head_dim, longest, dtype, layout, maps, capability):
    torch.manual_seed(head_dim + longest)
    check_attention(problem(head_dim, longest, dtype, layout, maps=maps), capability=capability)


def test_sequences_without_keys_or_queries():
    torch.manual_seed(0)
    check_attention(AttentionProblem(24, (5, 0, 3, 0), (0, 7, 4, 0), torch.float16))
    check_attention(AttentionProblem(16, (3, 70), (0, 0), maps=False))
    check_attention(AttentionProblem(16, (0, 0), (3, 70)))


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("longest_key", [64, 128, 200, 300])
def test_many_queries_on_few_keys(longest_key, capability):
    """Pruned blocks: queries longer than any backward tile, keys within one."""
    torch.manual_seed(longest_key)
    case = AttentionProblem(32, (150, 1), (longest_key, 9), torch.float16, heads=1)
    check_attention(case, capability=capability)


def test_scores_far_below_zero_give_no_nan():
    """exp2(-lse) overflows where every score is very negative: masked keys must not see it."""
    torch.manual_seed(3)
    q = torch.full((5, 1, 16), 40.0, dtype=torch.float32, requires_grad=True)
    k = torch.full((5, 1, 16), -40.0, dtype=torch.float32, requires_grad=True)
    v = torch.randn(5, 1, 16, requires_grad=True)
    packing = pack_lengths([5])
    bounds = packing.cu_seqlens, packing.cu_seqlens
    out = varlen_attention(
        q, k, v, *bounds, 5, 5, packing_q=packing, packing_k=packing, softmax_scale=1.0
    )
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert gradient.isfinite().all()


def test_padding_smaller_and_larger_than_a_clearing_block():
    for padding in (0, 1, 63, 65, 700):
        check_attention(
            AttentionProblem(8, (3, 2), (3, 2), torch.float16, padding=padding, heads=1)
        )


@pytest.mark.parametrize("key_heads", [1, 2])
@pytest.mark.parametrize("longest", [64, 128, 256, 300])  # resident, two phases, flash
def test_grouped_heads(longest, key_heads):
    case = problem(24, longest, torch.float32, "kv", heads=4, key_heads=key_heads)
    check_attention(case)


def test_grouped_heads_in_one_gradient_buffer():
    packing = pack_lengths([3, 17, 0, 9], capacity=40)
    q = torch.randn(40, 6, 24, requires_grad=True)
    kv = torch.randn(40, 2, 2, 24, requires_grad=True)
    bounds = (packing.cu_seqlens, packing.cu_seqlens)
    out = varlen_attention_kvpacked(q, kv, *bounds, 17, 17, packing_q=packing, packing_k=packing)
    exact_q, exact_kv = (x.detach().double().requires_grad_() for x in (q, kv))
    exact, _ = reference.varlen_attention(exact_q, *exact_kv.unbind(1), *bounds)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, kv), upstream)
    expected = torch.autograd.grad(exact, (exact_q, exact_kv), upstream.double())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", ["q, k, v", "qkv", "q, kv"])
def test_op_gives_one_gradient_buffer(packed):
    torch.manual_seed(1)
    packing = pack_lengths([3, 17, 0, 9], capacity=40)
    qkv = torch.randn(40, 3, 2, 24)
    exact = qkv.double().requires_grad_()
    expected, expected_lse = reference.varlen_attention(
        *exact.unbind(1), packing.cu_seqlens, packing.cu_seqlens
    )
    expected.sum().backward()
    sides = {"packing_q": packing, "packing_k": packing, "return_lse": True}
    bounds = (packing.cu_seqlens, packing.cu_seqlens, 17, 17)
    if packed == "qkv":
        inputs = (qkv.requires_grad_(),)
        out, lse = varlen_attention_qkvpacked(
            *inputs, packing.cu_seqlens, 17, packing=packing, return_lse=True
        )
    elif packed == "q, kv":
        inputs = (qkv[:, 0].clone().requires_grad_(), qkv[:, 1:].clone().requires_grad_())
        out, lse = varlen_attention_kvpacked(*inputs, *bounds, **sides)
    else:
        inputs = tuple(part.clone().requires_grad_() for part in qkv.unbind(1))
        out, lse = varlen_attention(*inputs, *bounds, **sides)
    assert not lse.requires_grad
    out.sum().backward()
    gradient = torch.cat([x.grad.reshape(40, -1, 2, 24) for x in inputs], dim=1)
    torch.testing.assert_close(gradient.double(), exact.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


def _op_arguments(maps: bool):
    packing = pack_lengths([3, 17, 0, 9], capacity=40)
    bounds = (packing.cu_seqlens, packing.cu_seqlens)
    tiles = (packing.tile_map, packing.wide_tile_map) * 2 + (packing.sequence_order,)
    return (*bounds, *(tiles if maps else [None] * 5), 17, 17, 0.2)


@pytest.mark.parametrize("maps", [True, False])
def test_opcheck(maps):
    qkv = torch.randn(40, 3, 2, 24, requires_grad=True)
    arguments = _op_arguments(maps)
    torch.library.opcheck(attention._attention, (qkv, None, None, *arguments))
    q, k, v = (part.detach().clone().requires_grad_() for part in qkv.unbind(1))
    torch.library.opcheck(attention._attention, (q, k, v, *arguments))
    out, lse = attention._attention(qkv.detach(), None, None, *arguments)
    bounds, numbers = arguments[:2], arguments[7:]
    torch.library.opcheck(
        attention._attention_backward,
        (out, out, lse, qkv.detach(), None, None, *bounds, *[None] * 4, *numbers),
    )


def test_compiles_without_graph_breaks_and_casts_under_autocast():
    packing = pack_lengths([3, 17, 0, 9], capacity=40)
    qkv = torch.randn(40, 3, 2, 24, requires_grad=True)

    def attend(x):
        return varlen_attention_qkvpacked(x, packing.cu_seqlens, 17, packing=packing)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected, found = attend(qkv), compiled(qkv)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.square().sum(), qkv)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), qkv)
    torch.testing.assert_close(gradient, expected_gradient)
    with torch.autocast("cpu", dtype=torch.float16):
        for function in (attend, compiled):
            out = function(qkv)
            assert out.dtype == torch.float16
            (gradient,) = torch.autograd.grad(out.float().square().sum(), qkv)
            assert gradient.dtype == torch.float32
            torch.testing.assert_close(gradient, expected_gradient, atol=0.05, rtol=0.05)


def test_repeated_backwards_are_bitwise_equal():
    case = problem(24, 256, torch.float16, "qkv", heads=1)
    torch.manual_seed(5)
    first = check_attention(case)
    torch.manual_seed(5)
    second = check_attention(case)
    for name in first:
        assert torch.equal(first[name], second[name])


def test_head_dim_pieces_cover_every_width():
    for head_dim in HEAD_DIMS:
        main, rest = head_dim_pieces(head_dim)
        assert main + rest >= head_dim and main >= 16 and rest in (0, 16, 32, 64)
        assert main & (main - 1) == 0
    assert [head_dim_pieces(d) for d in TUNED] == [(32, 0), (32, 0), (64, 0), (64, 16), (64, 32)]


def test_backward_plan_takes_every_length_once():
    for longest in (1, 64, 65, 128, 129, 256, 257, 1024):
        for capability in (80, 90, 100):
            for head_dim in TUNED:
                plan = backward_plan(head_dim, longest, longest, torch.bfloat16, capability)
                for keys in range(longest + 1):
                    takers = [s for s in plan if s.keys_over < keys <= s.keys_up_to]
                    if takers[0].kind.startswith("flash"):  # dq and the rest, a launch each
                        assert [s.kind for s in takers] == ["flash_queries", "flash_keys"]
                        continue
                    assert len(takers) == 1
                    assert takers[0].kind != "resident" or keys <= takers[0].config.block_k


@pytest.mark.parametrize("config", [AttentionConfig(128, 64, 8, 2), AttentionConfig(64, 128, 4, 1)])
def test_other_forward_tiles(config):
    check_attention(problem(40, 256, torch.float16, "qkv", heads=1), config=config)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [24, 80, 128])
def test_with_and_without_maps_the_tiles_are_the_same(head_dim, dtype, capability):
    """A map of another tile height than the kernel's would make two programs do the same rows."""
    for longest in (64, 128, 256, 1000):
        for launch in launches_of(dtype, head_dim, longest, capability):
            arguments = launch.arguments
            kind = arguments.get("KIND", "forward")
            entries = arguments.get("tile_map_ptr", arguments.get("order_ptr"))
            if kind in ("forward", "flash_queries", "flash_keys"):
                rows = arguments["BLOCK_K" if kind == "flash_keys" else "BLOCK_Q"]
                assert entries.shape == (1024 // rows + 32, 2), kind
            else:
                assert entries.shape == (32,), kind

"""gather_tokens and scatter_tokens: kernels in the interpreter and on a GPU, dispatch, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_vit_kernels import gather_tokens, reference, scatter_tokens
from masked_vit_kernels.packing import pack_lengths
from masked_vit_kernels.tokens import cpu, gather, gather_kernels
from masked_vit_kernels.tokens.rows import RowIndex, row_index
from op_checks import (
    assert_accurate,
    double,
    gradients,
    launches_in_place,
    leaf,
    lengths_strategy,
    packed_ids,
    poison_tail,
    poisoned,
)

LAYOUTS = ("dense", "packed unique", "packed blocks", "flat", "flat unique")
NUM_TOKENS = 9


def gather_case(layout: str, dtype: torch.dtype, device: str, width: int = 40, strided=False):
    """x (twice as wide where a strided view is wanted), ids and their packing."""
    tokens = (23,) if layout.startswith("flat") else (4, NUM_TOKENS)
    x = torch.randn(*tokens, 2 * width if strided else width, dtype=dtype)
    if layout == "dense":  # duplicates and padding in the middle of rows
        ids, packing = torch.randint(-1, NUM_TOKENS, (4, 11)), None
    elif layout == "flat":
        ids, packing = torch.randint(-1, 23, (37,)), None
    elif layout == "flat unique":
        ids = torch.cat([torch.randperm(23)[:14], torch.full((3,), -1)])
        packing = pack_lengths([14], capacity=17)
    else:
        blocks = layout == "packed blocks"
        lengths = [3, 0, 5, 2, 0, 0, 9, 1] if blocks else [3, 0, 9, 2]
        packed = packed_ids(lengths, NUM_TOKENS, unique=not blocks)
        ids, packing = packed.ids, packed.packing
    packing = packing if packing is None else packing.to(device)
    return x.to(device).requires_grad_(), ids.to(device), packing


def view_of(x, strided: bool):
    """The second half of the columns, read in place."""
    return x[..., x.shape[-1] // 2 :] if strided else x


def check_gather(layout, dtype, device, index_dtype=torch.int64, width=40, strided=False):
    x, ids, packing = gather_case(layout, dtype, device, width, strided)
    out = gather_tokens(view_of(x, strided), ids.to(index_dtype), packing)
    on_cpu = None if packing is None else packing.to("cpu")
    x64, x_eager = double(x), leaf(x)
    exact = reference.gather_tokens(view_of(x64, strided), ids.cpu(), on_cpu)
    eager = cpu.gather_tokens(view_of(x_eager, strided), ids.cpu(), on_cpu)
    assert torch.equal(out.double().cpu(), exact)

    upstream = torch.randn(out.shape, dtype=dtype)
    upstream[ids.cpu() < 0] = float("nan")
    (grad,) = gradients(out, [x], upstream.to(device))
    (exact_grad,) = gradients(exact, [x64], upstream)
    (eager_grad,) = gradients(eager, [x_eager], upstream)
    assert grad.dtype == dtype
    assert_accurate("gradient", grad, exact_grad, eager_grad)


def check_scatter(layout, fill_ndim, dtype, device, width=40):
    """Fill gradients too; the packed tail of x and the unused rows of fill hold NaN."""
    if layout == "dense":
        ids = torch.stack([torch.randperm(NUM_TOKENS)[:5] for _ in range(4)])
        ids[1, 2:] = -1
        batch, packing, rows = 4, None, (4, 5)
    elif layout == "flat":
        ids, batch, packing, rows = torch.randperm(NUM_TOKENS)[:6], None, None, (6,)
    else:
        # Over 64 places: the gradient of a fill (D,) takes several partial sums.
        packed = packed_ids([3, 0, 9, 2, 1, 1, 0, 4], NUM_TOKENS)
        ids, batch, packing = packed.ids, 8, packed.packing
        rows = ids.shape
    x = torch.randn(*rows, width, dtype=dtype)
    x[ids < 0] = float("nan")
    shape = (width,) if batch is None else (batch, NUM_TOKENS, width)[3 - fill_ndim :]
    fill = torch.randn(shape, dtype=dtype)
    x, fill = x.to(device).requires_grad_(), fill.to(device).requires_grad_()
    on_device = None if packing is None else packing.to(device)

    out = scatter_tokens(x, ids.to(device), fill, NUM_TOKENS, on_device)
    x64, fill64 = double(x), double(fill)
    exact = reference.scatter_tokens(x64, ids, fill64, NUM_TOKENS, packing)
    assert torch.equal(out.double().cpu(), exact)
    x_eager, fill_eager = leaf(x), leaf(fill)
    eager = cpu.scatter_tokens(x_eager, ids, fill_eager, NUM_TOKENS, packing)
    upstream = torch.randn(out.shape, dtype=dtype)
    found = gradients(out, [x, fill], upstream.to(device))
    expected = gradients(exact, [x64, fill64], upstream)
    plain = gradients(eager, [x_eager, fill_eager], upstream)
    for name, *values in zip(("x", "fill"), found, expected, plain, strict=True):
        assert_accurate(f"gradient of {name}", *values)


def check_fill_shapes(device):
    """Fills as other code has them: MAE's mask token (1, 1, D), positions (1, N, D), a number."""
    ids = torch.stack([torch.randperm(NUM_TOKENS)[:5] for _ in range(4)])
    x = torch.randn(4, 5, 40)
    for shape in ((), (40,), (1, 40), (1, 1, 40), (NUM_TOKENS, 40), (1, NUM_TOKENS, 40),
                  (NUM_TOKENS, 1), (4, 1, 40), (4, 1, 1), (4, NUM_TOKENS, 40)):  # fmt: skip
        fill = torch.randn(shape)
        leaves = [x.to(device).requires_grad_(), fill.to(device).requires_grad_()]
        out = scatter_tokens(leaves[0], ids.to(device), leaves[1], NUM_TOKENS)
        exact_leaves = [double(leaf) for leaf in leaves]
        exact = reference.scatter_tokens(exact_leaves[0], ids, exact_leaves[1], NUM_TOKENS)
        assert torch.equal(out.double().cpu(), exact), shape
        upstream = torch.randn(out.shape)
        found = gradients(out, leaves, upstream.to(device))
        expected = gradients(exact, exact_leaves, upstream)
        for name, *values in zip(("x", f"fill {shape}"), found, expected, strict=True):
            assert_accurate(f"gradient of {name}", *values)
    x, ids = x.to(device), ids.to(device)
    as_tensor = scatter_tokens(x, ids, torch.full((40,), -2.5, device=device), NUM_TOKENS)
    assert torch.equal(scatter_tokens(x, ids, -2.5, NUM_TOKENS), as_tensor)


def test_fill_shapes():
    check_fill_shapes("cpu")


@pytest.mark.parametrize("shape", [(2, 40), (1, 1, 1, 40), (4, 3, 40), (39,), (2, 9, 40)])
def test_fills_that_do_not_broadcast_are_refused(shape):
    x, ids = torch.randn(4, 5, 40), torch.arange(5).expand(4, 5)
    with pytest.raises(ValueError, match="fill must be a number or broadcast"):
        scatter_tokens(x, ids, torch.randn(shape), NUM_TOKENS)


# ----------------------------------------------------------------------------- interpreter


@pytest.mark.interpreter
def test_fill_shapes_in_interpreter():
    check_fill_shapes("cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_in_interpreter(layout, dtype):
    index_dtype = torch.int32 if dtype == torch.float16 else torch.int64
    check_gather(layout, dtype, "cpu", index_dtype, strided=dtype == torch.float16)


@pytest.mark.interpreter
def test_gather_wide_rows_and_transposed_input():
    check_gather("packed unique", torch.float32, "cpu", width=96)
    x = torch.randn(40, 9, requires_grad=True)
    ids = torch.randint(9, (20,))
    out = gather_tokens(x.t(), ids)
    assert torch.equal(out, x.t()[ids])
    (grad,) = gradients(out, [x], torch.ones_like(out))
    assert torch.equal(grad, ids.bincount(minlength=9).float().expand(40, 9))


@pytest.mark.interpreter
@pytest.mark.parametrize("fill_ndim", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scatter_in_interpreter(fill_ndim, dtype):
    check_scatter("packed", fill_ndim, dtype, "cpu")
    check_scatter("dense", fill_ndim, dtype, "cpu")


@pytest.mark.interpreter
def test_scatter_flat_rows():
    check_scatter("flat", 1, torch.float32, "cpu")


@pytest.mark.interpreter
@settings(max_examples=12, deadline=None)
@given(lengths=lengths_strategy(7), padding=st.integers(0, 4), unique=st.booleans())
def test_gather_random_packings(lengths, padding, unique):
    packed = packed_ids(lengths, 7, padding=padding, unique=unique)
    x = torch.randn(len(lengths), 7, 16, requires_grad=True)
    out = gather_tokens(x, packed.ids, packed.packing)
    x64 = double(x)
    exact = reference.gather_tokens(x64, packed.ids, packed.packing)
    assert torch.equal(out.double(), exact)
    upstream = poison_tail(torch.randn(out.shape), packed.total)
    assert_accurate("gradient", *gradients(out, [x], upstream), *gradients(exact, [x64], upstream))


@pytest.mark.interpreter
def test_every_output_is_written_once_and_nothing_else():
    packed = packed_ids([3, 0, 9, 2], NUM_TOKENS, padding=5)
    index = row_index(packed.ids, packed.packing, 4)
    x = torch.randn(4, NUM_TOKENS, 40)
    rows = poisoned(packed.packing.capacity, 40)
    gather_kernels.gather_rows_launch(x, index, rows.tensor).run()
    expected = reference.gather_tokens(x, packed.ids, packed.packing)
    assert torch.equal(rows.check(), expected)

    places, back = torch.empty(4 * NUM_TOKENS, dtype=torch.int32), poisoned(4, NUM_TOKENS, 40)
    gather_kernels.invert_rows_launch(index, NUM_TOKENS, places).run()
    fill = torch.randn(40).expand(4, NUM_TOKENS, 40)
    gather_kernels.scatter_rows_launch(expected, fill, index, places, back.tensor).run()
    expected = reference.scatter_tokens(
        expected, packed.ids, fill[0, 0], NUM_TOKENS, packed.packing
    )
    assert torch.equal(back.check(), expected)

    partial = poisoned(2, NUM_TOKENS, 40)
    gather_kernels.fill_gradient_launch(x, index, places, partial.tensor).run()
    partial.check()


@pytest.mark.interpreter
def test_scatter_trusts_no_stale_entry_of_its_map():
    """The map is never cleared: rows of an earlier batch must not show up again."""
    packed = packed_ids([4, 2], NUM_TOKENS)
    index = row_index(packed.ids, packed.packing, 2)
    x = torch.randn(packed.packing.capacity, 40)
    for stale in (0, 3, packed.total, 2**31 - 1, -5):
        places = torch.full((2 * NUM_TOKENS,), stale, dtype=torch.int32)
        gather_kernels.invert_rows_launch(index, NUM_TOKENS, places).run()
        out = poisoned(2, NUM_TOKENS, 40)
        gather_kernels.scatter_rows_launch(x, None, index, places, out.tensor).run()
        zeros = torch.zeros(40)
        expected = reference.scatter_tokens(x, packed.ids, zeros, NUM_TOKENS, packed.packing)
        assert torch.equal(out.check(), expected)


@pytest.mark.interpreter
def test_batch_without_a_token():
    ids, packing = torch.empty(0, dtype=torch.int64), pack_lengths([0, 0])
    x = torch.randn(2, NUM_TOKENS, 16, requires_grad=True)
    fill = torch.randn(16, requires_grad=True)
    rows = gather_tokens(x, ids, packing)
    back = scatter_tokens(rows, ids, fill, NUM_TOKENS, packing)
    assert torch.equal(back, fill.expand(2, NUM_TOKENS, 16))
    back.sum().backward()
    assert not x.grad.any()
    assert torch.equal(fill.grad, torch.full((16,), 2.0 * NUM_TOKENS))


@pytest.mark.interpreter
def test_ids_out_of_range_are_padding_to_the_kernels():
    x = torch.randn(2, 5, 16)
    ids = torch.tensor([[0, 5, 4], [-7, 1, 2**31 - 1]])
    out = gather_tokens(x, ids)
    expected = reference.gather_tokens(x, torch.tensor([[0, -1, 4], [-1, 1, -1]]))
    assert torch.equal(out, expected)


@pytest.mark.interpreter
def test_offsets_do_not_wrap_at_two_to_the_31():
    """Token 2049 at a stride of 2^20 elements; the buffer is address space, not memory."""
    stride, last = 2**20, 2049
    buffer = torch.empty(stride * last + 16, dtype=torch.float16)
    x = buffer.as_strided((1, last + 1, 16), (stride * last, stride, 1))
    x[0, last] = torch.arange(16)
    out = torch.empty(2, 16, dtype=torch.float16)
    index = RowIndex(torch.tensor([-1, last], dtype=torch.int32), None, 2, 1)
    with launches_in_place():
        gather_kernels.gather_rows_launch(x, index, out).run()
    assert torch.equal(out[1], torch.arange(16.0).half())


@pytest.mark.interpreter
@pytest.mark.parametrize("unique", [True, False])
def test_opcheck(unique):
    packed = packed_ids([3, 0, 5], NUM_TOKENS, unique=unique)
    index = row_index(packed.ids, packed.packing, 3)
    x = torch.randn(3, NUM_TOKENS, 24, requires_grad=True)
    torch.library.opcheck(gather.gather_rows, (x, *index, unique))
    if unique:
        rows = torch.randn(packed.packing.capacity, 24, requires_grad=True)
        fill = torch.randn(24, requires_grad=True)
        torch.library.opcheck(gather.scatter_rows, (rows, fill, *index, 3, NUM_TOKENS))
        torch.library.opcheck(
            gather.scatter_fill_gradient, (x.detach(), *index, [24], torch.float32)
        )


@pytest.mark.interpreter
def test_ops_trace_into_one_graph():
    packed = packed_ids([3, 0, 5], NUM_TOKENS)

    def round_trip(x, fill):
        rows = gather_tokens(x, packed.ids, packed.packing)
        return scatter_tokens(rows, packed.ids, fill, NUM_TOKENS, packed.packing)

    compiled = torch.compile(round_trip, backend="aot_eager", fullgraph=True)
    x, fill = torch.randn(3, NUM_TOKENS, 24, requires_grad=True), torch.randn(24)
    found, expected = compiled(x, fill), round_trip(x, fill)
    assert torch.equal(found, expected)
    upstream = torch.randn_like(found)
    assert torch.equal(*gradients(found, [x], upstream), *gradients(expected, [x], upstream))


# ----------------------------------------------------------------------------- any machine


def test_meta_tensors_give_shapes_and_gradients():
    """What torch.compile sees of the CUDA path."""
    packed = packed_ids([3, 0, 5], NUM_TOKENS).to("meta")
    x = torch.empty(3, NUM_TOKENS, 24, dtype=torch.bfloat16, device="meta", requires_grad=True)
    fill = torch.empty(NUM_TOKENS, 24, device="meta", requires_grad=True)
    rows = gather_tokens(x, packed.ids, packed.packing)
    assert (rows.shape, rows.dtype) == ((11, 24), torch.bfloat16)
    back = scatter_tokens(rows, packed.ids, fill, NUM_TOKENS, packed.packing)
    back.sum().backward()
    assert back.shape == x.shape == x.grad.shape
    assert (fill.grad.shape, fill.grad.dtype) == (fill.shape, fill.dtype)
    assert gather_tokens(x[0], packed.ids).shape == (11, 24)
    assert gather_tokens(x, torch.empty(3, 0, dtype=torch.int32, device="meta")).shape == (3, 0, 24)


def test_wrong_arguments_are_named():
    x, packed = torch.randn(3, NUM_TOKENS, 8), packed_ids([3, 0, 5], NUM_TOKENS)
    with pytest.raises(ValueError, match=r"indices must have shape \(B, K\) with B = 3"):
        gather_tokens(x, torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="int32 or int64"):
        gather_tokens(x, torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"\(capacity,\) with a packing"):
        gather_tokens(x, packed.ids)
    with pytest.raises(ValueError, match="3 sequences cannot be shared by 2 images"):
        gather_tokens(x[:2], packed.ids, packed.packing)
    with pytest.raises(ValueError, match="the capacity"):
        gather_tokens(x, packed.ids[1:], packed.packing)
    with pytest.raises(ValueError, match=r"x must have shape \(B, N, D\) or \(T, D\)"):
        gather_tokens(x[0, 0], packed.ids)
    with pytest.raises(IndexError, match="indices holds 9, expected -1 or 0 to 8"):
        gather_tokens(x, torch.full((3, 1), NUM_TOKENS))
    with pytest.raises(ValueError, match="fill must be a number or broadcast"):
        scatter_tokens(x[:, :3], torch.zeros(3, 3, dtype=torch.long), torch.zeros(7), 4)
    with pytest.raises(ValueError, match="unique within an image"):
        scatter_tokens(x[:, :3], torch.zeros(3, 3, dtype=torch.long), torch.zeros(8), 4)


# ----------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("width", [24, 40, 192, 384, 1280, 1408])
def test_gather_on_gpu(layout, dtype, width):
    check_gather(layout, dtype, "cuda", width=width)
    check_gather(layout, dtype, "cuda", torch.int32, width=width, strided=True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fill_ndim", [1, 2, 3])
def test_scatter_on_gpu(fill_ndim, dtype):
    for width in (40, 512):
        check_scatter("packed", fill_ndim, dtype, "cuda", width)
        check_scatter("dense", fill_ndim, dtype, "cuda", width)
    check_scatter("flat", 1, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("unique", [True, False])
def test_backward_is_bitwise_repeatable_and_capturable(unique):
    packed = packed_ids([111] * 32, 256, unique=unique).to("cuda")
    x = torch.randn(32, 256, 768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(packed.packing.capacity, 768, device="cuda", dtype=torch.bfloat16)

    def run():
        out = gather_tokens(x, packed.ids, packed.packing)
        return gradients(out, [x], upstream)[0]

    first = run()
    assert all(torch.equal(first, run()) for _ in range(5))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(first, captured)


@pytest.mark.gpu
def test_compiled_on_gpu():
    packed = packed_ids([30, 0, 50], 64).to("cuda")
    x = torch.randn(3, 64, 384, device="cuda", requires_grad=True)
    compiled = torch.compile(
        lambda x: gather_tokens(x * 2, packed.ids, packed.packing) + 1, fullgraph=True
    )
    expected = gather_tokens(x * 2, packed.ids, packed.packing) + 1
    found, upstream = compiled(x), torch.randn_like(expected)
    assert torch.equal(found, expected)
    assert torch.equal(*gradients(found, [x], upstream), *gradients(expected, [x], upstream))

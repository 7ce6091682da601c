"""embed_visible_patches: kernels in the interpreter and on a GPU, both forms, compiled accesses."""

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked_vit_kernels import embed_visible_patches, reference
from masked_vit_kernels.catalogue.tokens import token_cases
from masked_vit_kernels.compile import compile_launch
from masked_vit_kernels.tokens import cpu, patch_embed, patch_embed_kernels
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

# C values each; more channels repeat them.
MEAN, STD = (0.485, 0.456, 0.406, 0.5, 0.1), (0.229, 0.224, 0.225, 0.3, 0.7)


# Tubelets with another number along every axis; 70 rows of one clip.
CLIPS = {"patch": (2, 4, 6), "grid": (3, 2, 4)}


def random_images(batch, channels, patch, grid, dtype):
    shape = (batch, channels, *(a * b for a, b in zip(patch, grid, strict=True)))
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype)
    return torch.randn(shape, dtype=dtype)


def check_embed(
    device, image_dtype, weight_dtype, *, patch=(4, 6), grid=(2, 3), channels=3, width=40,
    lengths=(3, 0, 70, 2), fused=False, channels_last=False, with_bias=True, learn_position=True,
    normalize=True,
):  # fmt: skip
    """Packed ids with a padded tail, dense ids with padding, and every patch.

    Over 64 rows by default: the bias gradient takes several partial sums.
    """
    batch, num_tokens = len(lengths), math.prod(grid)
    images = random_images(batch, channels, patch, grid, image_dtype)
    if channels_last:
        images = images.contiguous(
            memory_format=torch.channels_last if len(grid) == 2 else torch.channels_last_3d
        )
    images_grad = image_dtype.is_floating_point
    images = images.to(device).requires_grad_(images_grad)
    scale = (channels * math.prod(patch)) ** -0.5
    weight = (torch.randn(width, channels, *patch) * scale).to(weight_dtype).to(device)
    bias = torch.randn(width, dtype=weight_dtype, device=device) if with_bias else None
    position = torch.randn(1, num_tokens, width, dtype=weight_dtype, device=device)
    trained = [weight, *([bias] if with_bias else []), *([position] if learn_position else [])]
    for parameter in trained:
        parameter.requires_grad_()
    statistics = {"mean": MEAN[:channels], "std": STD[:channels]} if normalize else {}

    packed = packed_ids(lengths, num_tokens, unique=False)
    dense = torch.randint(-1, num_tokens, (batch, 4))
    for ids, packing in ((packed.ids, packed.packing), (dense, None), (None, None)):
        on_device = (
            None if ids is None else ids.to(device), None if packing is None else packing.to(device)
        )  # fmt: skip
        out = embed_visible_patches(
            images, weight, bias, position, *on_device, fused=fused, **statistics
        )
        oracle = [double(x) if x.is_floating_point() else x.cpu() for x in (images, weight)]
        oracle += [double(bias), double(position)]
        exact = reference.embed_visible_patches(*oracle, ids, packing, **statistics)
        plain = [leaf(x) for x in (images, weight, bias, position)]
        eager = cpu.embed_visible_patches(*plain, ids, packing, **statistics)
        assert out.dtype == weight_dtype
        assert_accurate("tokens", out, exact, eager)

        upstream = torch.randn(out.shape, dtype=weight_dtype)
        if ids is not None:
            upstream[ids < 0] = float("nan")
        wanted = [images_grad, True, with_bias, learn_position]

        def chosen(tensors, wanted=wanted):
            return [x for x, want in zip(tensors, wanted, strict=True) if want]

        found = gradients(out, chosen([images, weight, bias, position]), upstream.to(device))
        expected = gradients(exact, chosen(oracle), upstream)
        rough = gradients(eager, chosen(plain), upstream)
        names = chosen(["images", "weight", "bias", "position"])
        for name, *values in zip(names, found, expected, rough, strict=True):
            assert_accurate(f"gradient of {name}", *values)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_tubelets_on_the_cpu(dtype):
    for options in (CLIPS, CLIPS | {"patch": (3, 4, 6)}, CLIPS | {"channels_last": True}):
        check_embed("cpu", dtype, torch.float32, **options)


def test_tubelets_are_a_convolution_over_time():
    clips, weight = torch.randn(2, 3, 6, 8, 12), torch.randn(16, 3, 2, 4, 6)
    expected = torch.nn.functional.conv3d(clips, weight, stride=(2, 4, 6)).flatten(2).mT
    found = embed_visible_patches(clips, weight, None, None)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def check_prefix_rows(device):
    """Rows of pos_embed before the patches' are left out, and get a zero gradient."""
    images, weight = torch.randn(2, 3, 8, 8, device=device), torch.randn(16, 3, 4, 4, device=device)
    position = torch.randn(1, 7, 16, device=device, requires_grad=True)
    found = embed_visible_patches(images, weight, None, position, num_prefix_tokens=3)
    expected = embed_visible_patches(images, weight, None, position[:, 3:])
    assert torch.equal(found, expected)
    (grad,) = gradients(found, [position], torch.ones_like(found))
    assert grad[0].sum(1).tolist() == [0.0] * 3 + [32.0] * 4


def test_positions_with_prefix_rows():
    check_prefix_rows("cpu")
    images, weight = torch.randn(2, 3, 8, 8), torch.randn(16, 3, 4, 4)
    with pytest.raises(ValueError, match=r"\(4, 16\), of 4 patches after 0 prefix tokens"):
        embed_visible_patches(images, weight, None, torch.randn(1, 5, 16))
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, F, Hi, Wi\)"):
        embed_visible_patches(images, torch.randn(16, 3, 2, 4, 4), None, None)
    with pytest.raises(ValueError, match="5x8x8 pixels cannot be cut into 2x4x4 patches"):
        embed_visible_patches(torch.randn(1, 3, 5, 8, 8), torch.randn(16, 3, 2, 4, 4), None, None)


# ----------------------------------------------------------------------------- interpreter


@pytest.mark.interpreter
def test_positions_with_prefix_rows_in_interpreter():
    check_prefix_rows("cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"image_dtype": torch.uint8, "weight_dtype": torch.float32},
        {"image_dtype": torch.uint8, "weight_dtype": torch.float16, "patch": (14, 14)},
        {"image_dtype": torch.float16, "weight_dtype": torch.float32, "learn_position": False},
        {"image_dtype": torch.float32, "weight_dtype": torch.float32, "channels_last": True},
        {"image_dtype": torch.float32, "weight_dtype": torch.float32, "normalize": False},
        {"image_dtype": torch.uint8, "weight_dtype": torch.float32, "with_bias": False},
        {"image_dtype": torch.uint8, "weight_dtype": torch.float32, "channels": 5, "width": 96},
        {"image_dtype": torch.uint8, "weight_dtype": torch.float32, "channels": 1},
        # clips: tubelets of 2 and of 3 frames, and of one
        {"image_dtype": torch.uint8, "weight_dtype": torch.float32, **CLIPS},
        {"image_dtype": torch.float32, "weight_dtype": torch.float32, **CLIPS,
         "channels_last": True},
        {"image_dtype": torch.float16, "weight_dtype": torch.float16, **CLIPS, "patch": (3, 4, 6)},
        {"image_dtype": torch.uint8, "weight_dtype": torch.float16, **CLIPS, "patch": (1, 8, 4)},
    ],
    ids=str,
)
def test_in_interpreter(options, fused):
    check_embed("cpu", **options, fused=fused)


@pytest.mark.interpreter
@pytest.mark.parametrize("patch", [8, 12, 16, 32])
def test_patch_sizes(patch):
    check_embed("cpu", torch.uint8, torch.float32, patch=(patch, patch), grid=(2, 2), lengths=(3,))


@pytest.mark.interpreter
@settings(max_examples=8, deadline=None)
@given(lengths=lengths_strategy(6, 3), fused=st.booleans())
def test_random_packings(lengths, fused):
    packed = packed_ids(lengths, 6)
    images = random_images(len(lengths), 2, (2, 3), (2, 3), torch.uint8)
    weight, position = torch.randn(16, 2, 2, 3, requires_grad=True), torch.randn(6, 16)
    arguments = (packed.ids, packed.packing)
    out = embed_visible_patches(images, weight, None, position, *arguments, fused=fused)
    weight64 = double(weight)
    exact = reference.embed_visible_patches(images, weight64, None, position, *arguments)
    assert_accurate("tokens", out, exact)
    upstream = poison_tail(torch.randn(out.shape), packed.total)
    assert_accurate(
        "gradient", *gradients(out, [weight], upstream), *gradients(exact, [weight64], upstream)
    )


@pytest.mark.interpreter
def test_outputs_are_written_and_nothing_else():
    packed = packed_ids([3, 0, 6], 6, padding=5)
    index = row_index(packed.ids, packed.packing, 3)
    images = random_images(3, 3, (14, 14), (2, 3), torch.uint8)
    rows = poisoned(packed.packing.capacity, 592)
    mean, std = torch.tensor(MEAN[:3]), torch.tensor(STD[:3])
    patch_embed_kernels.patch_rows_launch(images, mean, std, index, (14, 14), rows.tensor).run()
    patches = reference.normalize_images(images, mean, std)
    patches = reference.extract_patches(patches, (14, 14))
    expected = reference.gather_tokens(patches, packed.ids, packed.packing)
    assert_accurate("patch rows", rows.check()[:, :588], expected.double())
    assert not rows.tensor[:, 588:].any(), "columns past the pixels must be zero: K' > K"
    assert not rows.tensor[packed.total :].any()

    weight, out = torch.randn(40, 592), poisoned(packed.packing.capacity, 40)
    patch_embed_kernels.fused_patch_embed_launch(
        images, mean, std, weight, None, None, index, (14, 14), out.tensor, 90
    ).run()
    assert_accurate("fused", out.check(), expected.double() @ weight[:, :588].double().t())

    grad = poison_tail(torch.randn(packed.packing.capacity, 40), packed.total)
    grad_x, partial = poisoned(*grad.shape), poisoned(2, 40)
    patch_embed_kernels.add_position_backward_launch(
        grad, index, 6, grad_x.tensor, partial.tensor
    ).run()
    assert torch.equal(grad_x.check()[: packed.total], grad[: packed.total])
    exact = grad[: packed.total].double().sum(0)
    assert_accurate("bias gradient", partial.check().sum(0), exact)


@pytest.mark.interpreter
@pytest.mark.parametrize("fused", [False, True])
def test_batch_without_a_patch(fused):
    parameters = [torch.randn(*s, requires_grad=True) for s in ((16, 3, 4, 4), (16,), (6, 16))]
    images, nothing = random_images(2, 3, (4, 4), (2, 3), torch.uint8), packed_ids([0, 0], 6)
    out = embed_visible_patches(images, *parameters, nothing.ids, nothing.packing, fused=fused)
    assert not out.any()
    for grad in gradients(out, parameters, torch.full_like(out, float("nan"))):
        assert not grad.any()


@pytest.mark.interpreter
def test_offsets_do_not_wrap_at_two_to_the_31():
    """Image 3 at a stride of 2^30 pixels; the buffer is address space, not memory."""
    stride = 2**30
    buffer = torch.empty(3 * stride + 64, dtype=torch.uint8)
    images = buffer.as_strided((4, 1, 8, 8), (stride, 64, 8, 1))
    images[3] = torch.arange(64).view(1, 8, 8)
    out = torch.empty(1, 64)
    index = RowIndex(torch.zeros(1, dtype=torch.int32), torch.tensor([3], dtype=torch.int32), 1, 1)
    with launches_in_place():
        patch_embed_kernels.patch_rows_launch(images, None, None, index, (8, 8), out).run()
    assert_accurate("pixels", out[0], torch.arange(64).double() / 255)


@pytest.mark.interpreter
def test_opcheck():
    packed = packed_ids([3, 0, 4], 6)
    index = row_index(packed.ids, packed.packing, 3)
    images = random_images(3, 2, (4, 4), (2, 3), torch.float32).requires_grad_()
    statistics = (torch.tensor([0.4, 0.5]), torch.tensor([0.2, 0.3]))
    weight, bias, position = (
        torch.randn(*shape, requires_grad=True) for shape in ((24, 32), (24,), (6, 24))
    )
    opcheck = torch.library.opcheck
    opcheck(patch_embed.patch_rows, (images, *statistics, *index, [4, 4], torch.float32))
    rows = torch.randn(packed.packing.capacity, 24, requires_grad=True)
    opcheck(patch_embed.add_position, (rows, bias, position, *index, 6))
    opcheck(
        patch_embed.fused_patch_embed,
        (images, *statistics, weight, bias, position, *index, [4, 4]),
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("fused", [False, True])
def test_traces_into_one_graph_under_autocast(fused):
    packed = packed_ids([3, 0, 4], 6)
    images = random_images(3, 2, (4, 4), (2, 3), torch.uint8)
    weight = torch.randn(24, 2, 4, 4, requires_grad=True)

    def embed(weight):
        with torch.autocast("cpu", dtype=torch.float16):
            return embed_visible_patches(
                images, weight, None, None, packed.ids, packed.packing, mean=[0.4, 0.5],
                std=torch.tensor([0.2, 0.3]), fused=fused,
            )  # fmt: skip

    found = torch.compile(embed, backend="aot_eager", fullgraph=True)(weight)
    expected = embed(weight)
    assert found.dtype == torch.float16
    assert torch.equal(found, expected)
    upstream = torch.randn_like(found)
    assert torch.equal(
        *gradients(found, [weight], upstream), *gradients(expected, [weight], upstream)
    )


# ----------------------------------------------------------------------------- any machine


@pytest.mark.parametrize("fused", [False, True])
def test_meta_tensors_give_shapes_and_gradients(fused):
    packed = packed_ids([30, 0, 50], 64).to("meta")
    images = torch.empty(3, 3, 112, 112, dtype=torch.uint8, device="meta")
    weight, bias, position = (
        torch.empty(*shape, device="meta", requires_grad=True)
        for shape in ((384, 3, 14, 14), (384,), (1, 64, 384))
    )
    out = embed_visible_patches(
        images, weight, bias, position, packed.ids, packed.packing, fused=fused
    )
    assert (out.shape, out.dtype) == ((83, 384), torch.float32)
    out.sum().backward()
    assert [x.grad.shape for x in (weight, bias, position)] == [
        x.shape for x in (weight, bias, position)
    ]
    assert embed_visible_patches(images, weight, None, None).shape == (3, 64, 384)


def test_wrong_arguments_are_named():
    images = torch.zeros(2, 3, 28, 28)
    weight, position = torch.zeros(8, 3, 14, 14), torch.zeros(4, 8)
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, Hi, Wi\)"):
        embed_visible_patches(images[:, :1], weight, None, position)
    with pytest.raises(ValueError, match="28x20 pixels cannot be cut into 14x14 patches"):
        embed_visible_patches(images[..., :20], weight, None, position)
    with pytest.raises(ValueError, match=r"weight must have shape \(D, C, ph, pw\)"):
        embed_visible_patches(images, weight.flatten(1), None, position)
    with pytest.raises(ValueError, match=r"pos_embed must have shape \(4, 8\)"):
        embed_visible_patches(images, weight, None, position[:3])
    with pytest.raises(IndexError, match="indices holds 4"):
        embed_visible_patches(images, weight, None, position, torch.full((2, 1), 4))
    for device in ("cpu", "meta"):
        arguments = images.to(device), weight.to(device), None, None
        with pytest.raises(ValueError, match="mean must have 3 values, got 2"):
            embed_visible_patches(*arguments, mean=[0.1, 0.2])
        with pytest.raises(ValueError, match="std must have 3 values, got 1"):
            embed_visible_patches(*arguments, std=torch.ones(1))


# ----------------------------------------------------------------------------- compile audit


@pytest.mark.audit
@pytest.mark.parametrize(
    ("patch", "dtype", "widest"),
    [
        (8, torch.uint8, 8),
        (12, torch.uint8, 4),
        (14, torch.uint8, 2),
        (16, torch.uint8, 16),
        (14, torch.bfloat16, 4),
        (16, torch.bfloat16, 16),
        (14, torch.float32, 8),
    ],
)
def test_pixels_are_read_as_wide_as_the_patch_allows(patch, dtype, widest):
    """A row of `patch` pixels starts at a multiple of its own size: that bounds the access."""
    wanted = {"image_dtype": dtype, "dtype": torch.bfloat16, "patch_size": patch,
              "layout": "packed"}  # fmt: skip
    case = next(
        case
        for library_case in token_cases(90)
        if library_case.op == "patch_rows" and wanted.items() <= library_case.keys.items()
        for case in library_case.audit_cases()
    )
    blocks = case.launch.arguments
    loads = re.findall(
        r"ld\.global\S*?((?:\.v\d)?)\.[bus](\d+)", compile_launch(case.launch, 90).asm["ptx"]
    )
    sizes = [int(vector[2:] or 1) * int(bits) // 8 for vector, bits in loads]
    pixel_bytes = blocks["BLOCK_ROWS"] * blocks["BLOCK_K"] * dtype.itemsize // 128  # a thread
    assert sizes.count(widest) >= pixel_bytes // widest, sizes
    assert min(sizes) >= min(widest, 4), sizes


# ----------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("image_dtype", patch_embed_kernels.IMAGE_DTYPES)
@pytest.mark.parametrize("patch", [8, 12, 14, 16, 32])
def test_on_gpu(patch, image_dtype, weight_dtype, fused):
    for width, channels_last in ((384, False), (1280, True)):
        check_embed(
            "cuda", image_dtype, weight_dtype, patch=(patch, patch), grid=(3, 4), width=width,
            lengths=(5, 0, 12, 7), fused=fused, channels_last=channels_last,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("image_dtype", patch_embed_kernels.IMAGE_DTYPES)
def test_clips_on_gpu(image_dtype, fused):
    for patch, channels_last in (((2, 16, 16), False), ((2, 14, 14), True)):
        check_embed(
            "cuda", image_dtype, torch.bfloat16, patch=patch, grid=(4, 3, 2), width=384,
            lengths=(5, 0, 24, 7), fused=fused, channels_last=channels_last,
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True])
def test_backward_is_bitwise_repeatable(fused):
    packed = packed_ids([100] * 32, 256).to("cuda")
    images = random_images(32, 3, (14, 14), (16, 16), torch.uint8).cuda()
    parameters = [
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for shape in ((768, 3, 14, 14), (768,), (256, 768))
    ]
    out = embed_visible_patches(images, *parameters, packed.ids, packed.packing, fused=fused)
    upstream = torch.randn_like(out)

    def run():
        return torch.autograd.grad(out, parameters, upstream, retain_graph=True)

    first = run()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))

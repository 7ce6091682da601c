"""Embedding the context's patches from uint8 images, forward and forward plus backward.

    pytest bench/ops/bench_patch_embed.py -s

The stock provider is what the released code does: normalise every image, convolve, add positions,
then gather. The fused form is ours alone on a GPU; on the CPU both forms are one path.
"""

import pytest
import torch
import torch.nn.functional as F
from masked_vit_kernels import embed_visible_patches

from bench.sizes import DTYPES, EVERY_SHAPE
from bench.timing import backward_of, compare

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def convolve_then_gather(images, weight, bias, position, rows, mean, std):
    x = images.to(weight.dtype).div(255).sub(mean.view(1, 3, 1, 1)).div(std.view(1, 3, 1, 1))
    x = F.conv2d(x.to(weight.dtype), weight, bias, stride=weight.shape[2:])
    x = x.flatten(2).transpose(1, 2) + position
    return x.reshape(-1, x.shape[-1]).index_select(0, rows)


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize(("device", "shape"), EVERY_SHAPE, ids=str)
def test_context(device, shape, kind):
    masks, dtype = shape.masks(), DTYPES[device]
    total = int(masks.context_packing.cu_seqlens[-1])
    ids, packing = masks.context[:total].to(device), masks.context_packing.to(device)
    rows = packing.sequence_ids.long() * shape.num_patches + ids
    mean, std = (torch.tensor(values, device=device, dtype=dtype) for values in (MEAN, STD))
    sides = [n * shape.patch for n in shape.grid]

    def make_inputs():
        parameters = [
            torch.randn(*size, device=device).mul_(0.02).to(dtype).requires_grad_()
            for size in (
                (shape.width, 3, shape.patch, shape.patch),
                (shape.width,),
            )
        ]
        images = torch.randint(0, 256, (shape.batch, 3, *sides), dtype=torch.uint8, device=device)
        position = torch.randn(shape.num_patches, shape.width, device=device, dtype=dtype)
        return {"images": images, "parameters": parameters, "position": position}

    def provider(op):
        def call(inputs):
            def function(weight, bias):
                return op(inputs["images"], weight, bias, inputs["position"])

            if kind == "forward":
                return lambda: function(*inputs["parameters"])
            return backward_of(function, inputs["parameters"])

        return call

    def ours(fused):
        return provider(
            lambda images, weight, bias, position: embed_visible_patches(
                images, weight, bias, position, ids, packing, mean=mean, std=std, fused=fused
            )
        )

    def stock(function):
        return lambda images, weight, bias, position: function(
            images, weight, bias, position, rows, mean, std
        )

    providers = {
        "embed_visible_patches": ours(False),
        "conv2d, then index_select": provider(stock(convolve_then_gather)),
        "the same, compiled": provider(stock(torch.compile(convolve_then_gather))),
    }
    if device == "cuda":
        providers["embed_visible_patches, fused"] = ours(True)
    pixels, token_bytes = 3 * shape.patch**2, shape.width * dtype.itemsize
    ideal = total * (pixels + token_bytes) + pixels * token_bytes
    compare(f"embed {kind} {shape.name}", providers, make_inputs, ideal, device)

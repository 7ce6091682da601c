"""Assembling the predictor's input, forward and backward.

    pytest bench/ops/bench_predictor_tokens.py -s

With truncated masks, where every context and every block of the batch has one length, so that the
released code's repeat and `torch.cat` compute the same rows (in its order: by block, then image).
"""

import pytest
import torch
from masked_vit_kernels import assemble_predictor_tokens

from bench.sizes import DTYPES, EVERY_SHAPE
from bench.timing import backward_of, compare


def repeat_and_cat(context, mask_token, position, context_ids, target_ids, blocks):
    """context (B * Kc, P), ids (B, Kc) and (B, M, Kt) -> (B * M * (Kc + Kt), P)."""
    batch, kept = context_ids.shape
    x = context.view(batch, kept, -1) + position[context_ids]
    mask_tokens = mask_token + position[target_ids.reshape(batch * blocks, -1)]
    x = x.repeat_interleave(blocks, dim=0)
    return torch.cat([x, mask_tokens], dim=1).flatten(0, 1)


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize(("device", "shape"), EVERY_SHAPE, ids=str)
def test_assembly(device, shape, kind):
    masks, dtype = shape.masks("truncate").to(device), DTYPES[device]
    packing, blocks = masks.predictor_packing, masks.num_targets
    width = shape.predictor_width
    dense_ids = masks.context.view(shape.batch, -1), masks.targets.view(shape.batch, blocks, -1)
    position = torch.randn(shape.num_patches, width, device=device, dtype=dtype)

    def make_inputs():
        return [
            torch.randn(*size, device=device).to(dtype).requires_grad_()
            for size in ((masks.context.shape[0], width), (width,))
        ]

    def provider(op, *ids):
        def call(inputs):
            def function(context, mask_token):
                return op(context, mask_token, position, *ids)

            return (
                (lambda: function(*inputs)) if kind == "forward" else backward_of(function, inputs)
            )

        return call

    providers = {
        "assemble_predictor_tokens": provider(
            assemble_predictor_tokens, masks.context, masks.targets, packing
        ),
        "repeat and torch.cat": provider(repeat_and_cat, *dense_ids, blocks),
        "the same, compiled": provider(torch.compile(repeat_and_cat), *dense_ids, blocks),
    }
    out_bytes = packing.capacity * width * dtype.itemsize
    context_bytes = masks.context.shape[0] * width * dtype.itemsize
    compare(
        f"predictor tokens {kind} {shape.name}",
        providers,
        make_inputs,
        out_bytes + context_bytes,
        device,
    )

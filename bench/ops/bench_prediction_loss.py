"""LayerNorm of the targets, gather and smooth L1, forward and backward.

    pytest bench/ops/bench_prediction_loss.py -s

The stock provider is the released chain: normalise every patch's features, gather the targets'
rows, average the smooth L1 distance.
"""

import pytest
import torch
import torch.nn.functional as F
from masked_vit_kernels import latent_prediction_loss

from bench.sizes import DTYPES, EVERY_SHAPE
from bench.timing import backward_of, compare


def released_chain(predictions, features, rows):
    with torch.no_grad():
        targets = F.layer_norm(features, features.shape[-1:])
        targets = targets.reshape(-1, features.shape[-1]).index_select(0, rows)
    return F.smooth_l1_loss(predictions.float(), targets.float())


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize(("device", "shape"), EVERY_SHAPE, ids=str)
def test_loss(device, shape, kind):
    masks, dtype = shape.masks(), DTYPES[device]
    total = int(masks.target_packing.cu_seqlens[-1])
    rows = masks.target_rows[:total].to(device)

    def make_inputs():
        sizes = (total, shape.width), (shape.batch, shape.num_patches, shape.width)
        predictions, features = (torch.randn(*s, device=device).to(dtype) for s in sizes)
        return [predictions.requires_grad_(), features]

    def provider(op):
        def call(inputs):
            predictions, features = inputs
            if kind == "forward":
                return lambda: op(predictions, features, rows)
            return backward_of(lambda x: op(x, features, rows), [predictions])

        return call

    providers = {
        "latent_prediction_loss": provider(latent_prediction_loss),
        "layer_norm, index, smooth_l1": provider(released_chain),
        "the same, compiled": provider(torch.compile(released_chain)),
    }
    passes = 2 if kind == "forward" else 3
    ideal = passes * total * shape.width * dtype.itemsize
    facts = {"op": "loss", "direction": kind, "shape": shape.name}
    compare(f"loss {kind} {shape.name}", providers, make_inputs, ideal, device, facts=facts)

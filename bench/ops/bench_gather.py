"""Gathering the context's tokens, forward and backward, at the masks the sampler draws.

    pytest bench/ops/bench_gather.py -s

Packed: each image keeps its own context. Truncated: one length for the batch, as the released code
has it, where `torch.gather` with an expanded index is what it calls (`apply_masks`).
"""

import pytest
import torch
from masked_vit_kernels import gather_tokens

from bench.sizes import DTYPES, EVERY_SHAPE
from bench.timing import backward_of, compare


def expanded_gather(x, ids):
    return torch.gather(x, 1, ids[..., None].expand(-1, -1, x.shape[2]))


def select_rows(x, rows):
    return x.reshape(-1, x.shape[-1]).index_select(0, rows)


def index_rows(x, rows):
    return x.reshape(-1, x.shape[-1])[rows]


def forward(op, *names):
    return lambda s: lambda: op(s["x"], *(s[n] for n in names))


def backward(op, *names):
    return lambda s: backward_of(lambda x: op(x, *(s[n] for n in names)), [s["x"]])


@pytest.mark.parametrize("batching", ["packed", "truncate"])
@pytest.mark.parametrize(("device", "shape"), EVERY_SHAPE, ids=str)
def test_context(device, shape, batching):
    masks, dtype = shape.masks(batching), DTYPES[device]
    total = int(masks.context_packing.cu_seqlens[-1])
    ids = masks.context[:total].to(device)
    packing = masks.context_packing.to(device)
    rows = packing.sequence_ids.long() * shape.num_patches + ids
    dense = batching == "truncate"

    def make_inputs():
        x = torch.randn(shape.batch, shape.num_patches, shape.width, device=device, dtype=dtype)
        inputs = {"x": x.requires_grad_(), "ids": ids, "packing": packing, "rows": rows}
        return inputs | ({"dense ids": ids.view(shape.batch, -1)} if dense else {})

    compiled = torch.compile(select_rows)
    row_bytes = shape.width * dtype.itemsize
    every_bytes = shape.batch * shape.num_patches * row_bytes
    for kind, direction, ideal in (
        ("forward", forward, 2 * total * row_bytes),
        ("backward", backward, total * row_bytes + every_bytes),
    ):
        if dense:
            providers = {
                "gather_tokens": direction(gather_tokens, "dense ids"),
                "torch.gather, expanded index": direction(expanded_gather, "dense ids"),
                "the same, compiled": direction(torch.compile(expanded_gather), "dense ids"),
            }
        else:
            providers = {
                "gather_tokens": direction(gather_tokens, "ids", "packing"),
                "gather_tokens, rows may repeat": direction(
                    lambda x, rows: gather_tokens(x.reshape(-1, x.shape[-1]), rows), "rows"
                ),
                "index_select": direction(select_rows, "rows"),
                "index_select, compiled": direction(compiled, "rows"),
                "x[rows]": direction(index_rows, "rows"),
            }
        facts = {"op": "gather", "direction": kind, "shape": shape.name, "batching": batching}
        title = f"gather {kind} {shape.name} {batching}"
        compare(title, providers, make_inputs, ideal, device, facts=facts)

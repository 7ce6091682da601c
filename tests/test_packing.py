"""Packings: what lengths are taken for."""

import numpy as np
import pytest
import torch
from masked_vit_kernels import pack_lengths, packing_from_cu_seqlens


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([2.0, 3.0], "lengths must be integers, got float64"),
        (torch.tensor([2.5]), "lengths must be integers, got float32"),
        ([True, False], "lengths must be integers, got bool"),
        (["2"], "lengths must be integers, got <U1"),
        (torch.tensor([2, 3], device="meta"), "read on the host, got a tensor on meta: move it"),
        ([2**31], "numbered in int32, got capacity=2147483648"),
    ],
)
def test_lengths_that_are_none_are_refused_in_words(lengths, message):
    """Floats were once cut to integers in silence."""
    with pytest.raises(ValueError, match=message):
        pack_lengths(lengths)


@pytest.mark.parametrize(
    "lengths", [[2, 0, 3], (2, 0, 3), np.array([2, 0, 3], np.uint8), torch.tensor([2, 0, 3])]
)
def test_integers_of_any_kind_are_lengths(lengths):
    assert pack_lengths(lengths).cu_seqlens.tolist() == [0, 2, 2, 5]
    assert pack_lengths([]).num_sequences == 0


def test_cu_seqlens_must_be_integers():
    with pytest.raises(ValueError, match=r"cu_seqlens must be int32 or int64, got torch\.float32"):
        packing_from_cu_seqlens(torch.tensor([0.0, 2.0]), 2, 2)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([0, 3, 2], r"must start at 0 and not decrease, got \[0, 3, 2\]"),
        ([1, 3], r"must start at 0 and not decrease, got \[1, 3\]"),
        ([0, 3, 9], "9 tokens do not fit capacity=8"),
        ([0, 6], "a sequence has 6 tokens, over max_seqlen=4"),
    ],
)
def test_bounds_that_are_none_are_refused_on_the_cpu(bounds, message):
    with pytest.raises(ValueError, match=message):
        packing_from_cu_seqlens(torch.tensor(bounds), 4, 8)
    with pytest.raises(TypeError, match="cu_seqlens must be a tensor, got list"):
        packing_from_cu_seqlens(bounds, 4, 8)

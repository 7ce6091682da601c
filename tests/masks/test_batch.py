"""Masks given as tensors or lists are checked."""

import pytest
import torch

from ijepa.masks.batch import MaskBatch


@pytest.mark.parametrize(
    ("context", "targets", "error", "message"),
    [
        ([0, 1], [[[2]]], ValueError, r"context must have shape \(B, K\), got \(2,\)"),
        ([[0, 1]], [[2, 3]], ValueError, r"targets must have shape \(B, M, K'\) with B=1"),
        ([[0, 1]], [[[2]], [[3]]], ValueError, r"with B=1, got \(2, 1, 1\)"),
        ([[0, 6]], [[[2]]], IndexError, r"context holds patch 6, outside 0..5"),
        ([[0, -2]], [[[2]]], IndexError, r"context holds patch -2, outside 0..5"),
        ([[0, 1]], [[[2, 7]]], IndexError, r"targets holds patch 7, outside 0..5"),
        ([[0, 1], [4, 4]], [[[2]], [[2]]], ValueError, "context holds patch 4 twice in sequence 1"),
        ([[0, 1]], [[[2, 3], [5, 5]]], ValueError, "targets holds patch 5 twice in sequence 1"),
    ],
)
def test_from_dense_checks_ids(context, targets, error, message):
    with pytest.raises(error, match=message):
        MaskBatch.from_dense(torch.tensor(context), torch.tensor(targets), (2, 3))


def test_from_lists_checks_counts():
    with pytest.raises(ValueError, match="2 contexts but targets of 1 images"):
        MaskBatch.from_lists([[0], [1]], [[[2]]], (2, 3))
    with pytest.raises(ValueError, match=r"as many target blocks, got \[1, 2\]"):
        MaskBatch.from_lists([[0], [1]], [[[2]], [[2], [3]]], (2, 3))
    with pytest.raises(ValueError, match="at least one image and one block"):
        MaskBatch.from_lists([[0]], [[]], (2, 3))

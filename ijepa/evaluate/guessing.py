"""What a classifier that never looks at an image scores."""

from __future__ import annotations

from torch import Tensor


def commonest_class_accuracy(fitted_labels: Tensor, test_labels: Tensor) -> float:
    """Accuracy on the test labels, in [0, 1], of always guessing the commonest fitted class.

    The test labels have no say in what is guessed. Of equally common classes the first is taken.

    Args:
        fitted_labels, test_labels: (n,) and (m,) int64, from 0.

    Raises:
        ValueError: no labels to fit or none to test.
    """
    if not (fitted_labels.numel() and test_labels.numel()):
        raise ValueError(
            f"labels must not be empty, got {fitted_labels.numel()} fitted and "
            f"{test_labels.numel()} test labels"
        )
    guess = fitted_labels.bincount().argmax()
    return (test_labels == guess).double().mean().item()

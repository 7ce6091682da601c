"""Frozen features and what they are good for: kNN and linear probes on the target encoder."""

from ijepa.evaluate.features import Features, encoder_features, pixel_features
from ijepa.evaluate.knn import knn_accuracy
from ijepa.evaluate.linear import linear_probe_accuracy

__all__ = [
    "Features",
    "encoder_features",
    "knn_accuracy",
    "linear_probe_accuracy",
    "pixel_features",
]

"""Some images of a source."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ijepa.data.sources import ImageSource, OpenedImage


class SourceSubset:
    """Some images of a source under their own numbers."""

    def __init__(self, source: ImageSource, indices: np.ndarray):
        self.source, self.indices = source, np.asarray(indices, dtype=np.int64)
        self.channels = source.channels
        self.labels: Mapping[str, np.ndarray] = {
            task: values[self.indices] for task, values in source.labels.items()
        }
        self.class_names = source.class_names

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def open(self, index: int) -> OpenedImage:
        return self.source.open(int(self.indices[index]))

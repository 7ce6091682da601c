"""Every image of a source once and in order, the unreadable ones left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch.utils.data

from ijepa.data.batch import ImageBatch
from ijepa.data.decode import ImageError
from ijepa.data.loader import signals_blocked, start_worker
from ijepa.data.sources import ImageSource
from ijepa.data.views import Transform, render_view
from ijepa.data.worker_deaths import WorkerDied, deaths_seen_while_waiting, is_death_of_a_worker

_PREFETCHED = 2  # batches a worker prepares ahead


def readable_batch(source: ImageSource, indices: np.ndarray, transform: Transform) -> ImageBatch:
    """Images `indices` (B,), those that cannot be read left out of `images` and `indices`."""
    images = torch.empty(len(indices), source.channels, *transform.size, dtype=torch.uint8)
    read: list[int] = []
    unreadable: dict[int, str] = {}
    key = np.zeros(1, dtype=np.uint64)
    for index in np.asarray(indices).tolist():
        try:
            image = source.open(index)
            (view,) = transform.views(np.array([(image.height, image.width)]), key)
            render_view(image, view, images[len(read)], transform.interpolation)
        except ImageError as error:
            unreadable[index] = str(error)
        else:
            read.append(index)
    return ImageBatch(images[: len(read)], np.array(read, dtype=np.int64), unreadable)


def batches_in_order(
    source: ImageSource,
    transform: Transform,
    ranges: Sequence[range],
    num_workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[ImageBatch]:
    """One batch for each range of image numbers.

    Args:
        num_workers: processes that decode; 0 does it in this one.
        pin_memory: hand out page-locked memory, for asynchronous copies to a GPU.

    Raises:
        WorkerDied: one of the processes was killed.
    """
    loader = torch.utils.data.DataLoader(
        _Batches(source, transform, ranges),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=_PREFETCHED if num_workers else None,
        worker_init_fn=start_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # without one it draws from, and so changes, the global state
    )
    try:
        with signals_blocked(), deaths_seen_while_waiting():
            batches = iter(loader)
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        if not num_workers or not is_death_of_a_worker(error):
            raise
        raise WorkerDied(
            f"a data worker died ({error}): killed for want of memory, or by an image? Try fewer "
            "workers, or 0"
        ) from error


class _Batches(torch.utils.data.Dataset):
    def __init__(self, source: ImageSource, transform: Transform, ranges: Sequence[range]):
        self._source, self._transform, self._ranges = source, transform, ranges

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, item: int) -> ImageBatch:
        numbers = self._ranges[item]
        return readable_batch(self._source, np.arange(numbers.start, numbers.stop), self._transform)

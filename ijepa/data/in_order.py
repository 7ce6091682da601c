"""Images of a source in the order that is asked for, the unreadable ones left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch.utils.data

from ijepa.data.batch import ImageBatch
from ijepa.data.decode import ImageError
from ijepa.data.loader import signals_blocked, start_worker
from ijepa.data.sources import ImageSource
from ijepa.data.views import Transform, render_view
from ijepa.data.worker_deaths import WorkerDied, deaths_seen_while_waiting, is_death_of_a_worker

_PREFETCHED = 2  # batches a worker prepares ahead
Asked = Sequence[tuple[np.ndarray, np.ndarray]]  # image numbers (b,), uint64 keys (b,) of a batch
Augment = Callable[[torch.Tensor, int], None]  # (C, H, W) uint8, changed in place; a key


def readable_batch(
    source: ImageSource,
    indices: np.ndarray,
    transform: Transform,
    keys: np.ndarray,
    augment: Augment | None = None,
) -> ImageBatch:
    """Images `indices` (B,), those that cannot be read left out of `images` and `indices`.

    Args:
        keys: (B,) uint64 that random views are drawn with.
        augment: changes each view in place.
    """
    images = torch.empty(len(indices), source.channels, *transform.size, dtype=torch.uint8)
    read: list[int] = []
    unreadable: dict[int, str] = {}
    for position, index in enumerate(np.asarray(indices).tolist()):
        try:
            image = source.open(index)
            size = np.array([(image.height, image.width)])
            (view,) = transform.views(size, keys[position : position + 1])
            render_view(image, view, images[len(read)], transform.interpolation)
            if augment is not None:
                augment(images[len(read)], int(keys[position]))
        except ImageError as error:
            unreadable[index] = str(error)
        else:
            read.append(index)
    return ImageBatch(images[: len(read)], np.array(read, dtype=np.int64), unreadable)


def batches_in_order(
    source: ImageSource,
    transform: Transform,
    batches: Asked,
    num_workers: int = 0,
    pin_memory: bool = False,
    augment: Augment | None = None,
) -> Iterator[ImageBatch]:
    """One batch for each entry of `batches`.

    Args:
        batches: image numbers (b,) and keys (b,) of each; may make them as they are asked for.
        augment: changes each view in place.
        num_workers: processes that decode; 0 does it in this one.
        pin_memory: hand out page-locked memory, for asynchronous copies to a GPU.

    Raises:
        WorkerDied: one of the processes was killed.
    """
    loader = torch.utils.data.DataLoader(
        _Batches(source, transform, batches, augment),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=_PREFETCHED if num_workers else None,
        worker_init_fn=start_worker,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # without one it draws from, and so changes, the global state
    )
    try:
        with signals_blocked(), deaths_seen_while_waiting():
            made = iter(loader)
        yield from made
    except (RuntimeError, OSError, EOFError) as error:
        if not num_workers or not is_death_of_a_worker(error):
            raise
        raise WorkerDied(
            f"a data worker died ({error}): killed for want of memory, or by an image? Try fewer "
            "workers, or 0"
        ) from error


def without_keys(batches: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Image numbers of each batch, for transforms that draw nothing."""
    return [(numbers, np.zeros(len(numbers), dtype=np.uint64)) for numbers in batches]


class _Batches(torch.utils.data.Dataset):
    def __init__(
        self,
        source: ImageSource,
        transform: Transform,
        batches: Asked,
        augment: Augment | None,
    ):
        self._source, self._transform = source, transform
        self._batches, self._augment = batches, augment

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, item: int) -> ImageBatch:
        numbers, keys = self._batches[item]
        return readable_batch(self._source, numbers, self._transform, keys, self._augment)

"""CIFAR-10 and CIFAR-100 in their binary form: a label (two of CIFAR-100), then 3072 bytes.

The pixels of an image are three planes of 32 x 32, row by row. The pickled form is not read:
unpickling runs whatever a file says.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ijepa.evaluate.tasks.task import Split, Task, TaskDataError, array_split, read_text

_PIXELS = 3 * 32 * 32


class _Form(NamedTuple):
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    label_bytes: int


_BATCHES = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
_FORMS = {
    "cifar10": _Form(_BATCHES, ("test_batch.bin",), "batches.meta.txt", 1),
    "cifar100": _Form(("train.bin",), ("test.bin",), "fine_label_names.txt", 2),
}
LAYOUT = """\
expected the binary version, unpacked:
  PATH/train.bin  test.bin  fine_label_names.txt                      for cifar100
  PATH/data_batch_1.bin ... data_batch_5.bin  test_batch.bin  batches.meta.txt   for cifar10
(cifar-100-binary.tar.gz, cifar-10-binary.tar.gz; the python version, pickles, is not read)"""


def cifar(path: Path, name: str) -> Task:
    """`name` is "cifar10" or "cifar100", whose fine labels are taken.

    Raises:
        TaskDataError: another layout, or files of another length.
    """
    form = _FORMS[name]
    names = tuple(read_text(path / form.names, LAYOUT).split())
    return Task(name, _split(path, form.train, form), _split(path, form.test, form), names)


def _split(path: Path, files: tuple[str, ...], form: _Form) -> Split:
    record = form.label_bytes + _PIXELS
    parts = []
    for file in files:
        try:
            data = np.fromfile(path / file, dtype=np.uint8)
        except OSError as error:
            raise TaskDataError(f"{path / file}: {error.strerror}\n{LAYOUT}") from None
        if len(data) == 0 or len(data) % record:
            raise TaskDataError(
                f"{path / file} has {len(data)} bytes, which is no multiple of {record}: cut off, "
                f"or of the other CIFAR\n{LAYOUT}"
            )
        parts.append(data.reshape(-1, record))
    rows = np.concatenate(parts)
    images = rows[:, form.label_bytes :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return array_split(np.ascontiguousarray(images), rows[:, form.label_bytes - 1])

"""A folder a class, as ImageNet is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ijepa.data.folder import folder_source
from ijepa.evaluate.tasks.task import Split, Task, TaskDataError, some, split_in_two

LAYOUT = """\
expected:
  PATH/train/CLASS/*.jpg      or PATH/CLASS/*.jpg, of which a fifth of each class is held out
  PATH/val/CLASS/*.jpg        (val or test)"""


def class_folders(path: Path, channels: int) -> Task:
    """Folders of classes with a split, or one set that is split here.

    Raises:
        TaskDataError: another layout, or other classes to test than to fit.
    """
    tests = [path / name for name in ("val", "test") if (path / name).is_dir()]
    if (path / "train").is_dir() and tests:
        train, names = _labelled(path / "train", channels)
        test, tested = _labelled(tests[0], channels)
        unknown = sorted(set(tested) - set(names))
        if unknown:
            raise TaskDataError(
                f"{tests[0]}: {some(unknown)} of it is not in {path / 'train'}: the classes to "
                f"test must be among those that are fitted\n{LAYOUT}"
            )
        number = np.array([names.index(name) for name in tested])
        return Task(path.name, train, Split(test.source, number[test.labels]), names)
    both, names = _labelled(path, channels)
    return split_in_two(both, names, path.name)


def _labelled(path: Path, channels: int) -> tuple[Split, tuple[str, ...]]:
    try:
        source = folder_source(path, channels=channels, cache_bytes=0)
    except ValueError as error:
        raise TaskDataError(f"{error}\n{LAYOUT}") from None
    if "class" not in source.labels:
        raise TaskDataError(f"{path} holds images, but no two folders of classes\n{LAYOUT}")
    return Split(source, source.labels["class"]), tuple(source.class_names["class"])

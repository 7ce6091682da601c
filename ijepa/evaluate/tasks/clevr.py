"""Clevr/Count and Clevr/Dist, with VTAB's labels.

Count is the number of objects less 3, the fewest there are: 8 classes. Dist is the bin of the
nearest object's depth, `bisect_left([8, 8.5, 9, 9.5, 10, 100], min of pixel_coords[2])`: 6 classes.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ijepa.data.procedural.scene_layout import CLASS_NAMES, DISTANCE_EDGES, MIN_OBJECTS
from ijepa.evaluate.tasks.task import Split, Task, TaskDataError, file_split, read_text

LAYOUT = """\
expected CLEVR v1.0, unpacked:
  PATH/images/train/*.png   PATH/scenes/CLEVR_train_scenes.json
  PATH/images/val/*.png     PATH/scenes/CLEVR_val_scenes.json"""


def clevr(path: Path, name: str, channels: int) -> Task:
    """`name` is "clevr-count" or "clevr-dist"; tested on the validation images.

    Raises:
        TaskDataError: another layout, or scenes without what a label is made of.
    """
    label, what = (count_label, "count") if name == "clevr-count" else (distance_label, "distance")
    splits = [_split(path, part, label, channels) for part in ("train", "val")]
    return Task(name, splits[0], splits[1], CLASS_NAMES[what])


def count_label(scene: Mapping[str, Any]) -> int:
    """Objects of a scene, less the fewest."""
    return len(scene["objects"]) - MIN_OBJECTS


def distance_label(scene: Mapping[str, Any]) -> int:
    """Bin of the nearest object; a depth equal to an edge belongs to the bin below it."""
    nearest = min(item["pixel_coords"][2] for item in scene["objects"])
    return bisect_left(DISTANCE_EDGES, nearest)


def _split(path: Path, part: str, label, channels: int) -> Split:
    file = path / "scenes" / f"CLEVR_{part}_scenes.json"
    text = read_text(file, LAYOUT)
    try:
        scenes = json.loads(text)["scenes"]
        names = [str(scene["image_filename"]) for scene in scenes]
        labels = [label(scene) for scene in scenes]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"{type(error).__name__} {error}"
        raise TaskDataError(
            f"{file} is damaged or no file of CLEVR scenes: {reason}\n{LAYOUT}"
        ) from None
    images = path / "images" / part
    if not images.is_dir():
        raise TaskDataError(f"no folder {images}\n{LAYOUT}")
    return file_split(images, [Path(name).name for name in names], labels, channels)

"""Small data sets on disk in the layouts of the tasks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image


def picture(path: Path, label: int, seed: int, side: int = 20) -> None:
    """An image whose brightness tells its label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 40, (side, side + 4, 3)) + 25 * label
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def class_folders(root: Path, classes: int = 3, each: int = 10, split: bool = False) -> Path:
    for part, count in (("train", each), ("val", max(each // 3, 1))) if split else (("", each),):
        for label in range(classes):
            for number in range(count):
                picture(
                    root / part / f"class-{label}" / f"{number}.png", label, 100 * label + number
                )
    return root


def cifar(root: Path, name: str, each: int = 6) -> Path:
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    classes = 100 if name == "cifar100" else 10

    def records(count: int) -> bytes:
        labels = np.arange(count, dtype=np.uint8) % classes
        pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        columns = [labels[:, None], pixels]
        if name == "cifar100":
            columns.insert(0, (labels[:, None] // 5).astype(np.uint8))  # coarse label
        return np.concatenate(columns, axis=1).tobytes()

    if name == "cifar100":
        (root / "train.bin").write_bytes(records(each * classes))
        (root / "test.bin").write_bytes(records(classes))
        (root / "fine_label_names.txt").write_text("\n".join(f"fine{n}" for n in range(100)) + "\n")
    else:
        for number in range(1, 6):
            (root / f"data_batch_{number}.bin").write_bytes(records(each * 2))
        (root / "test_batch.bin").write_bytes(records(20))
        (root / "batches.meta.txt").write_text("\n".join(f"kind{n}" for n in range(10)) + "\n\n")
    return root


def clevr(root: Path, each: int = 16) -> Path:
    depths = (7.5, 8.25, 8.75, 9.25, 9.75, 11.0)
    (root / "scenes").mkdir(parents=True)
    for part in ("train", "val"):
        scenes = []
        for number in range(each):
            name = f"CLEVR_{part}_{number:06d}.png"
            count = 3 + number % 8
            objects = [{"pixel_coords": [10, 20, depths[number % 6] + k]} for k in range(count)]
            scenes.append({"image_filename": name, "objects": objects[::-1]})
            picture(root / "images" / part / name, number % 8, number)
        text = json.dumps({"info": {}, "scenes": scenes})
        (root / "scenes" / f"CLEVR_{part}_scenes.json").write_text(text)
    return root


def inat18(root: Path, classes: int = 5, each: int = 3) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", each), ("val", 1)):
        images: list[dict] = []
        annotations = []
        for number in range(classes * count):
            label = number % classes
            name = f"train_val2018/Birds/{label}/{part}{number}.jpg"
            picture(root / name, label, number)
            images.insert(0, {"id": 10 + number, "file_name": name})  # in another order
            annotations.append({"image_id": 10 + number, "category_id": label, "id": number})
        listed = {"images": images, "annotations": annotations}
        (root / f"{part}2018.json").write_text(json.dumps(listed))
    return root


def places205(root: Path, classes: int = 5, each: int = 3) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", each), ("val", 1)):
        lines = []
        for number in range(classes * count):
            label = number % classes
            name = f"a/place {label}/{part}_{number}.jpg"
            picture(root / "images256" / name, label, number)
            lines.append(f"{name} {label}")
        (root / f"{part}_places205.csv").write_text("\n".join(lines) + "\n")
    return root


def csv_file(root: Path, each: int = 6) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    lines = ["path,label"]
    for label, word in enumerate(("cat", "dog, large")):
        for number in range(each):
            picture(root / "photos" / f"{label}-{number}.png", label, number)
            lines.append(f'photos/{label}-{number}.png,"{word}"')
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root / "labels.csv"

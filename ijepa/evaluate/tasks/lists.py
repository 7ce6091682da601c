"""Tasks whose labels come in lists: iNaturalist 2018, Places205, and a CSV of one's own."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from ijepa.evaluate.tasks.task import (
    Split,
    Task,
    TaskDataError,
    file_split,
    read_text,
    some,
    split_in_two,
)

INAT_LAYOUT = """\
expected iNaturalist 2018, unpacked:
  PATH/train2018.json   PATH/val2018.json   PATH/train_val2018/SUPERCATEGORY/CATEGORY/*.jpg"""
PLACES_LAYOUT = """\
expected Places205, unpacked:
  PATH/train_places205.csv   PATH/val_places205.csv      lines "a/abbey/gsun_0001.jpg 0"
  PATH/images256/a/abbey/*.jpg        (the lists may also lie in PATH/trainvalsplit_places205)"""
CSV_LAYOUT = """\
expected a header and lines of path and label, in files or in one of which a fifth is held out:
  PATH/train.csv   PATH/test.csv      or PATH itself, a .csv file
  path,label
  photos/0001.jpg,cat                 (paths are relative to the CSV's folder)"""
INAT_CLASSES, PLACES_CLASSES = 8142, 205


def inat18(path: Path, channels: int, classes: int = INAT_CLASSES) -> Task:
    """Category numbers as the lists have them, 0 to 8141; tested on the validation list."""
    splits = []
    for part in ("train", "val"):
        file = path / f"{part}2018.json"
        text = read_text(file, INAT_LAYOUT)
        try:
            listed = json.loads(text)
            category = {a["image_id"]: int(a["category_id"]) for a in listed["annotations"]}
            names = [str(image["file_name"]) for image in listed["images"]]
            labels = [category[image["id"]] for image in listed["images"]]
        except (ValueError, KeyError, TypeError) as error:
            raise TaskDataError(
                f"{file} is damaged or no such list: {type(error).__name__} {error}\n{INAT_LAYOUT}"
            ) from None
        _stay_inside(file, names)
        splits.append(file_split(path, names, labels, channels))
    names_of_classes = tuple(str(number) for number in range(classes))
    return Task("inat18", splits[0], splits[1], names_of_classes)


def places205(path: Path, channels: int, classes: int = PLACES_CLASSES) -> Task:
    """Tested on the validation list."""
    images = path / "images256"
    if not images.is_dir():
        raise TaskDataError(f"no folder {images}\n{PLACES_LAYOUT}")
    lists = path / "trainvalsplit_places205"
    lists = lists if lists.is_dir() else path
    names_of_classes = {number: str(number) for number in range(classes)}
    splits = []
    for part in ("train", "val"):
        file = lists / f"{part}_places205.csv"
        names, labels = [], []
        for number, line in enumerate(read_text(file, PLACES_LAYOUT).splitlines(), start=1):
            name, _, label = line.strip().rpartition(" ")
            if not name or not label.isdigit():
                raise TaskDataError(f"{file}, line {number}: {line!r}\n{PLACES_LAYOUT}")
            names.append(name)
            labels.append(int(label))
            names_of_classes[int(label)] = str(Path(name).parent)
        _stay_inside(file, names)
        splits.append(file_split(images, names, labels, channels))
    return Task("places205", splits[0], splits[1],
                tuple(names_of_classes[n] for n in range(classes)))  # fmt: skip


def csv_lists(path: Path, channels: int) -> Task:
    """Paths and labels of one's own; labels are any words, numbered in alphabetical order."""
    if path.is_file():
        names, words = _read_csv(path)
        classes = tuple(sorted(set(words)))
        both = _numbered(path.parent, names, words, classes, channels)
        return split_in_two(both, classes, path.stem)
    train_names, train_words = _read_csv(path / "train.csv")
    test_names, test_words = _read_csv(path / "test.csv")
    classes = tuple(sorted(set(train_words)))
    unknown = sorted(set(test_words) - set(classes))
    if unknown:
        raise TaskDataError(f"{path / 'test.csv'}: {some(unknown)} of it is not in train.csv")
    train = _numbered(path, train_names, train_words, classes, channels)
    return Task(
        path.name, train, _numbered(path, test_names, test_words, classes, channels), classes
    )


def _numbered(
    root: Path, names: list[str], words: list[str], classes: tuple[str, ...], channels: int
) -> Split:
    number = {word: place for place, word in enumerate(classes)}
    return file_split(root, names, [number[word] for word in words], channels)


def _read_csv(file: Path) -> tuple[list[str], list[str]]:
    rows = list(_rows(file))
    if len({label for _, label in rows}) < 2:
        raise TaskDataError(f"{file} names fewer than two classes\n{CSV_LAYOUT}")
    return [path for path, _ in rows], [label for _, label in rows]


def _rows(file: Path) -> Iterator[tuple[str, str]]:
    reader = csv.DictReader(read_text(file, CSV_LAYOUT).splitlines())
    if not {"path", "label"} <= set(reader.fieldnames or ()):
        raise TaskDataError(
            f"{file} begins with {','.join(reader.fieldnames or ())!r}, not with path,label\n"
            f"{CSV_LAYOUT}"
        )
    for row in reader:
        if not row["path"] or not row["label"]:
            raise TaskDataError(
                f"{file}, line {reader.line_num}: a path and a label are expected\n{CSV_LAYOUT}"
            )
        yield row["path"], row["label"]


def _stay_inside(file: Path, names: list[str]) -> None:
    """Raise TaskDataError where somebody else's list names files out of its own folder."""
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise TaskDataError(f"{file} names {name}, which leads out of the folder")

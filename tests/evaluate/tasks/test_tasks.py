"""Tasks on disk: labels by hand-made files, and what is said where data are not as expected."""

import json
from bisect import bisect_left

import numpy as np
import pytest
import task_files
from PIL import Image

from ijepa.data.identity import source_identity
from ijepa.data.procedural.dataset import PROCEDURES
from ijepa.evaluate.tasks import TASKS, Split, Task, TaskDataError, open_task
from ijepa.evaluate.tasks.clevr import count_label, distance_label
from ijepa.evaluate.tasks.lists import inat18, places205


def pixels(split, index):
    return split.source.open(index).decode()


def test_folders_of_classes_with_a_split_of_their_own(tmp_path):
    task = open_task("folder", task_files.class_folders(tmp_path / "data", split=True))
    assert task.class_names == ("class-0", "class-1", "class-2")
    assert np.bincount(task.train.labels).tolist() == [10, 10, 10]
    assert np.bincount(task.test.labels).tolist() == [3, 3, 3]
    for split, part in ((task.train, "train"), (task.test, "val")):
        for index, label in enumerate(split.labels):
            assert f"/{part}/class-{label}/" in split.source.name(index)


def test_of_one_set_a_fifth_of_each_class_is_held_out(tmp_path):
    task = open_task("folder", task_files.class_folders(tmp_path / "data"))
    assert np.bincount(task.train.labels).tolist() == [8, 8, 8]
    assert np.bincount(task.test.labels).tolist() == [2, 2, 2]
    names = [split.source.name(i) for split in (task.train, task.test) for i in range(len(split))]
    assert len(set(names)) == 30
    for split in (task.train, task.test):
        for index, label in enumerate(split.labels):
            assert f"/class-{label}/" in split.source.name(index)
    again = open_task("folder", tmp_path / "data")
    assert [again.test.source.name(i) for i in range(6)] == names[24:]


@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_by_its_bytes(name, classes, tmp_path):
    root = task_files.cifar(tmp_path / "cifar", name)
    task = open_task(name, root)
    assert task.classes == classes and len(task.test) == (100 if classes == 100 else 20)
    file, labels = ("train.bin", 2) if classes == 100 else ("data_batch_1.bin", 1)
    record = (root / file).read_bytes()[(3072 + labels) * 7 :][: 3072 + labels]
    assert task.train.labels[7] == record[labels - 1] == 7  # the fine label of CIFAR-100
    image = pixels(task.train, 7)
    for channel, row, column in ((0, 0, 0), (1, 3, 30), (2, 31, 31)):
        expected = record[labels + 1024 * channel + 32 * row + column]
        assert image[row, column, channel] == expected
    assert task.class_names[3] == ("fine3" if classes == 100 else "kind3")


def test_clevr_labels_are_vtabs(tmp_path):
    root = task_files.clevr(tmp_path / "clevr")
    counts, distances = (open_task(name, root) for name in ("clevr-count", "clevr-dist"))
    assert counts.train.labels.tolist() == [n % 8 for n in range(16)]
    assert distances.train.labels.tolist() == [n % 6 for n in range(16)]
    assert (counts.classes, distances.classes) == (8, 6)
    assert counts.train.source.name(3).endswith("images/train/CLEVR_train_000003.png")
    assert distances.test.source.name(0).endswith("images/val/CLEVR_val_000000.png")


@pytest.mark.parametrize("nearest", [7.999, 8.0, 8.0001, 8.5, 9.0, 9.5, 10.0, 10.0001, 99.9])
def test_a_depth_on_an_edge_belongs_below_it(nearest):
    scene = {"objects": [{"pixel_coords": [0, 0, nearest + 1]}, {"pixel_coords": [0, 0, nearest]}]}
    assert distance_label(scene) == bisect_left([8, 8.5, 9, 9.5, 10, 100], nearest)
    assert count_label({"objects": [{}] * 10}) == 7


def test_inat_joins_images_and_annotations_by_number(tmp_path):
    root = task_files.inat18(tmp_path / "inat")
    task = inat18(root, 3, classes=5)
    assert len(task.train) == 15 and len(task.test) == 5
    for index, label in enumerate(task.train.labels):
        assert f"/Birds/{label}/train" in task.train.source.name(index)
        assert pixels(task.train, index).shape == (20, 24, 3)
    with pytest.raises(TaskDataError, match=r"to fit on of 5, 6, 7, 8, 9, \.\.\. \(8137\)"):
        open_task("inat18", root)


def test_places_by_its_lists(tmp_path):
    root = task_files.places205(tmp_path / "places")
    task = places205(root, 3, classes=5)
    assert task.class_names[2] == "a/place 2"
    for index, label in enumerate(task.test.labels):
        assert f"/a/place {label}/val_" in task.test.source.name(index)
    (root / "train_places205.csv").write_text("a/place 0/x.jpg zero\n")
    with pytest.raises(TaskDataError, match=r"line 1: 'a/place 0/x\.jpg zero'\nexpected Places205"):
        open_task("places205", root)


def test_a_csv_of_ones_own(tmp_path):
    file = task_files.csv_file(tmp_path / "csv")
    task = open_task("csv", file)
    assert task.class_names == ("cat", "dog, large")
    assert (len(task.train), len(task.test)) == (10, 2)
    for name in ("train.csv", "test.csv"):
        (file.parent / name).write_text(file.read_text())
    both = open_task("csv", file.parent)
    assert (len(both.train), len(both.test)) == (12, 12)
    assert both.train.source.name(11).endswith("photos/1-5.png")


def test_rendered_tasks_are_the_closing_tables(tmp_path, monkeypatch):
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path))
    small = PROCEDURES["scenes"].__class__(**{**PROCEDURES["scenes"].__dict__, "num_images": 40})
    monkeypatch.setitem(PROCEDURES, "scenes", small)
    monkeypatch.setattr("ijepa.evaluate.tasks.opening._TEST_IMAGES", 30)
    tasks = [open_task(name, image_size=(16, 16)) for name in ("scenes-count", "scenes-dist")]
    assert [task.classes for task in tasks] == [8, 6]
    assert [len(tasks[0].train), len(tasks[0].test)] == [40, 30]
    assert not np.array_equal(pixels(tasks[0].train, 0), pixels(tasks[0].test, 0))
    assert np.array_equal(tasks[1].train.labels, tasks[1].train.source.labels["distance"])


@pytest.mark.parametrize("name", [name for name in TASKS if not name.startswith(("sha", "sce"))])
def test_missing_data_show_the_layout(name, tmp_path):
    with pytest.raises(TaskDataError, match=rf"{name} needs the path of its data: --path"):
        open_task(name)
    with pytest.raises(TaskDataError, match=r"nothing at .*none"):
        open_task(name, tmp_path / "none")
    with pytest.raises(TaskDataError, match=r"\nexpected"):
        open_task(name, tmp_path)


def test_wrong_data_are_named(tmp_path):
    with pytest.raises(ValueError, match="unknown task 'cifar': choose one of shapes"):
        open_task("cifar")
    with pytest.raises(ValueError, match="shapes is rendered and has no path"):
        open_task("shapes", tmp_path)
    root = task_files.cifar(tmp_path / "cifar", "cifar100")
    (root / "train.bin").write_bytes((root / "train.bin").read_bytes()[:-5])
    with pytest.raises(TaskDataError, match=r"train\.bin has 1844395 bytes, .* multiple of 3074"):
        open_task("cifar100", root)
    (root / "fine_label_names.txt").write_text("one\ntwo\n")
    root = task_files.clevr(tmp_path / "clevr")
    scenes = root / "scenes" / "CLEVR_val_scenes.json"
    whole = json.loads(scenes.read_text())
    del whole["scenes"][2]["objects"][0]["pixel_coords"]
    scenes.write_text(json.dumps(whole))
    with pytest.raises(TaskDataError, match=r"no file of CLEVR scenes: KeyError 'pixel_coords'"):
        open_task("clevr-dist", root)
    whole["scenes"][2]["objects"] = [{}] * 2
    scenes.write_text(json.dumps(whole))
    with pytest.raises(TaskDataError, match=r"000002\.png has label -1, labels must be 0 to 7"):
        open_task("clevr-count", root)
    folders = task_files.class_folders(tmp_path / "folders", split=True)
    (folders / "val" / "class-1").rename(folders / "val" / "other")
    with pytest.raises(TaskDataError, match=r"other of it is not in .*train: the classes to test"):
        open_task("folder", folders)
    (tmp_path / "a.csv").write_text("file,label\nx,y\n")
    with pytest.raises(TaskDataError, match="begins with 'file,label', not with path,label"):
        open_task("csv", tmp_path / "a.csv")


def test_a_class_of_one_image_cannot_be_split(tmp_path):
    folder = task_files.class_folders(tmp_path / "data")
    task_files.picture(folder / "rare" / "0.png", 0, 0)
    with pytest.raises(TaskDataError, match="data: rare has one image alone"):
        open_task("folder", folder)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../secret.jpg"])
def test_a_list_cannot_lead_out_of_its_folder(name, tmp_path):
    root = task_files.inat18(tmp_path / "inat")
    listed = json.loads((root / "val2018.json").read_text())
    listed["images"][0]["file_name"] = name
    (root / "val2018.json").write_text(json.dumps(listed))
    with pytest.raises(TaskDataError, match="leads out of the folder"):
        inat18(root, 3, classes=5)


def test_a_subset_is_known_by_its_images(tmp_path):
    task = open_task("cifar10", task_files.cifar(tmp_path / "cifar", "cifar10"))
    few = task.limited(30, 10)
    assert (len(few.train), len(few.test)) == (30, 10)
    for index in range(10):
        row = few.test.source.indices[index]
        assert np.array_equal(pixels(few.test, index), pixels(task.test, row))
        assert few.test.labels[index] == task.test.labels[row]
    assert source_identity(few.train.source) != source_identity(few.test.source)
    assert source_identity(few.train.source) == source_identity(task.limited(30, 5).train.source)
    other = Split(task.test.source, task.test.labels).first(30)
    assert source_identity(other.source) != source_identity(few.train.source)
    assert task.limited(None, 10**9) == Task(task.name, task.train, task.test, task.class_names)


def test_grey_images_for_an_encoder_of_one_channel(tmp_path):
    folder = task_files.class_folders(tmp_path / "data")
    Image.new("L", (9, 9)).save(folder / "class-0" / "0.png")
    task = open_task("folder", folder, channels=1)
    assert pixels(task.train, 0).shape[2] == 1

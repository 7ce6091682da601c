"""`shapes` and `scenes`: what they show, their labels, and the cache they are kept in."""

import json
import multiprocessing
from bisect import bisect_left

import numpy as np
import pytest
from PIL import Image

from ijepa.data import procedural_source
from ijepa.data.procedural import scene_layout, scenes, shapes
from ijepa.data.procedural.scene_layout import draw_layouts, scene_labels
from ijepa.data.procedural.scenes import render_scenes
from ijepa.data.procedural.shapes import render_shapes, shape_labels

SIZE = (32, 32)


def probe(features: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Held-out accuracy of a least-squares classifier fitted to the first half."""
    features = (features - features.mean(0)) / (features.std(0) + 1e-6)
    features = np.column_stack([features, np.ones(len(features))])
    half = len(features) // 2
    targets = np.eye(classes)[labels]
    weights = np.linalg.lstsq(features[:half], targets[:half], rcond=None)[0]
    return float(np.mean((features[half:] @ weights).argmax(1) == labels[half:]))


@pytest.fixture(scope="module")
def shape_images() -> tuple[np.ndarray, np.ndarray]:
    indices = np.arange(3000)
    return render_shapes(indices, SIZE, seed=0), shape_labels(indices, SIZE, 0)["shape"]


def test_colours_say_nothing_about_the_shape(shape_images):
    images, labels = shape_images
    pixels = images.reshape(len(images), -1, 3).astype(np.float64)
    mean, spread = pixels.mean(1), pixels.std(1)
    # Chance is 0.1; three standard deviations at 1500 images are 0.023.
    assert probe(mean, labels, 10) < 0.125
    assert probe(np.hstack([mean, mean**2, spread, spread**2]), labels, 10) < 0.13


def test_the_shape_is_there_to_be_found(shape_images):
    """Split into two colours, the images show outlines whose length tells classes apart."""
    images, labels = shape_images
    pixels = images.reshape(len(images), -1, 3) - images.mean((1, 2), keepdims=True)[:, 0]
    principal = np.linalg.eigh(pixels.transpose(0, 2, 1) @ pixels)[1][:, :, -1:]
    shade = (pixels @ principal).reshape(-1, *SIZE)
    shape = shade > (shade.max((1, 2), keepdims=True) + shade.min((1, 2), keepdims=True)) / 2
    outline = np.diff(shape, axis=1).mean((1, 2)) + np.diff(shape, axis=2).mean((1, 2))
    area = np.minimum(shape.mean((1, 2)), 1 - shape.mean((1, 2)))
    length = outline / np.sqrt(area + 0.01)
    assert probe(np.stack([length, length**2, length**3, area], axis=1), labels, 10) > 0.4


@pytest.mark.parametrize("name", shapes.NAMES)
def test_shapes_cover_the_same_area(name):
    grid = np.linspace(-1.6, 1.6, 1601, dtype=np.float32)
    scale = shapes._AREA_SCALE[name]
    inside = shapes._INSIDE[name](grid[None] / scale, grid[:, None] / scale)
    assert abs(inside.mean() * 3.202**2 - np.pi) < 0.02


def test_classes_are_balanced_and_named():
    labels = shape_labels(np.arange(200), SIZE, 0)["shape"]
    assert np.bincount(labels).tolist() == [20] * 10 and len(shapes.NAMES) == 10


@pytest.mark.parametrize("render", [render_shapes, render_scenes])
def test_an_image_depends_on_its_number_alone(render):
    size = (24, 36)
    together = render(np.arange(40, 52), size, 3)
    assert together.shape == (12, 24, 36, 3) and together.dtype == np.uint8
    np.testing.assert_array_equal(render(np.array([47]), size, 3)[0], together[7])
    assert (render(np.array([47]), size, 4)[0] != together[7]).any()
    assert len({image.tobytes() for image in together}) == 12


def test_scene_labels_follow_the_vtab_definitions():
    indices = np.arange(600)
    layouts, labels = draw_layouts(indices, SIZE, 0), scene_labels(indices, SIZE, 0)
    assert set(np.unique(labels["count"])) == set(range(8))
    assert set(np.unique(labels["distance"])) == set(range(6))
    for row in range(50):
        count = layouts.count[row]
        assert labels["count"][row] == count - 3
        camera, forward = layouts.camera[row], layouts.axes[row, 2]
        depths = [float((centre - camera) @ forward) for centre in layouts.centre[row, :count]]
        assert labels["distance"][row] == bisect_left([8, 8.5, 9, 9.5, 10, 100], min(depths))
    assert {len(names) for names in scene_layout.CLASS_NAMES.values()} == {8, 6}


def test_scene_objects_stand_apart_inside_the_frame():
    layouts = draw_layouts(np.arange(300), SIZE, 0)
    for row in range(300):
        place = slice(0, layouts.count[row])
        centre = layouts.centre[row, place]
        reach = layouts.size[row, place] * scene_layout.BOUNDING[layouts.solid[row, place]]
        apart = np.linalg.norm(centre[:, None, :2] - centre[None, :, :2], axis=2)
        overlap = apart - reach[:, None] - reach + 9 * np.eye(len(centre))
        assert overlap.min() > 0
        seen = (centre - layouts.camera[row]) @ layouts.axes[row].T
        assert (np.abs(seen[:, :2]) / seen[:, 2:]).max() < scene_layout.FIELD_OF_VIEW


def test_every_object_of_a_scene_is_seen():
    """The middle of each object shows a colour of its own, not the gray of the floor."""
    size = (96, 96)
    layouts = draw_layouts(np.arange(10), size, 1)
    images = render_scenes(np.arange(10), size, 1).astype(float)
    chroma = images.max(axis=3) - images.min(axis=3)
    seen = total = 0
    for row in range(10):
        for slot in range(layouts.count[row]):
            if layouts.colour[row, slot] == 0:  # gray
                continue
            right, up, ahead = layouts.axes[row] @ (layouts.centre[row, slot] - layouts.camera[row])
            x = int(96 * (1 + right / ahead / scene_layout.FIELD_OF_VIEW) / 2)
            y = int(96 * (1 - up / ahead / scene_layout.FIELD_OF_VIEW) / 2)
            seen += chroma[row, y, x] > 20
            total += 1
    assert total > 30 and seen == total


@pytest.mark.parametrize(("name", "module"), [("shapes", shapes), ("scenes", scenes)])
def test_cache_is_written_once_and_read_again(tmp_path, name, module, monkeypatch):
    monkeypatch.setenv("IJEPA_CACHE", str(tmp_path))
    source = procedural_source(name, num_images=30, image_size=(16, 20), num_processes=1)
    assert len(source) == 30 and source.images.shape == (30, 16, 20, 3)
    folder = next(tmp_path.iterdir())
    assert folder.name == f"{name}-v{module.VERSION}-30x16x20-seed0"
    assert len(list((folder / "images").glob("*.png"))) == 30
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    again = procedural_source(name, num_images=30, image_size=(16, 20))
    np.testing.assert_array_equal(source.images, again.images)
    for task, values in source.labels.items():
        np.testing.assert_array_equal(values, again.labels[task])
        assert values.max() < len(source.class_names[task])
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}


def test_half_rendered_and_damaged_caches_are_finished(tmp_path):
    def build():
        return procedural_source("shapes", num_images=30, image_size=SIZE, cache_dir=tmp_path)

    whole = build().images.copy()
    folder = next(tmp_path.iterdir())
    kept = (folder / "images" / "00003.png").stat().st_mtime_ns
    (folder / "dataset.json").unlink()
    (folder / "pixels.npy").unlink()
    for number in range(10, 30):
        (folder / "images" / f"{number:05d}.png").unlink()
    np.testing.assert_array_equal(build().images, whole)
    assert (folder / "images" / "00003.png").stat().st_mtime_ns == kept

    # Damaged afterwards: a cut-off array, a cut-off image, a lost image.
    (folder / "pixels.npy").write_bytes((folder / "pixels.npy").read_bytes()[:5000])
    (folder / "images" / "00005.png").write_bytes(b"\x89PNG")
    (folder / "images" / "00006.png").unlink()
    np.testing.assert_array_equal(build().images, whole)
    np.testing.assert_array_equal(np.asarray(Image.open(folder / "images" / "00005.png")), whole[5])
    assert not list(folder.rglob("*.tmp"))
    assert json.loads((folder / "dataset.json").read_text())["class_names"]["shape"][0] == "disc"


def _build_in(folder, queue):
    queue.put(
        procedural_source("shapes", num_images=350, cache_dir=folder, image_size=(8, 8)).images
    )


def test_two_processes_may_render_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_build_in, args=(tmp_path, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    first, second = queue.get(timeout=60), queue.get(timeout=60)
    for process in processes:
        process.join(timeout=60)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first[::50], render_shapes(np.arange(0, 350, 50), (8, 8), 0))


def test_large_sets_stay_on_disk(tmp_path, monkeypatch):
    in_memory = procedural_source("shapes", num_images=12, cache_dir=tmp_path)
    monkeypatch.setattr("ijepa.data.procedural.dataset._MEMORY_LIMIT", 1000)
    on_disk = procedural_source("shapes", num_images=12, cache_dir=tmp_path)
    np.testing.assert_array_equal(on_disk.open(7).decode(), in_memory.images[7])
    assert on_disk.labels["shape"].tolist() == in_memory.labels["shape"].tolist()


def test_bad_requests_are_errors(tmp_path):
    with pytest.raises(ValueError, match="choose one of shapes, scenes"):
        procedural_source("circles", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="at least 1"):
        procedural_source("shapes", num_images=0, cache_dir=tmp_path)


def test_a_cache_that_cannot_be_made_or_read_says_what_to_do(tmp_path):
    with pytest.raises(OSError, match=r"/dev/null: make room there, or .* variable IJEPA_CACHE"):
        procedural_source("shapes", num_images=2, cache_dir="/dev/null")
    procedural_source("shapes", num_images=2, image_size=SIZE, cache_dir=tmp_path)
    (description,) = tmp_path.rglob("dataset.json")
    description.write_text(description.read_text()[:10])
    with pytest.raises(ValueError, match=f"{description} is damaged: delete it"):
        procedural_source("shapes", num_images=2, image_size=SIZE, cache_dir=tmp_path)
    description.unlink()
    assert len(procedural_source("shapes", num_images=2, image_size=SIZE, cache_dir=tmp_path)) == 2

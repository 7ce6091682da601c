"""What is found out about a folder of images."""

import numpy as np
import pytest
from PIL import Image

from ijepa.data import folder_source
from ijepa.propose.images import look_at_images


def _write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def test_count_median_size_colours_and_classes(tmp_path):
    random = np.random.default_rng(7)
    images = [random.integers(0, 256, (20 + n, 60 - n, 3), dtype=np.uint8) for n in range(21)]
    images[0] = images[0] // 4
    for number, pixels in enumerate(images):
        _write(tmp_path / ("a" if number % 2 else "b") / f"{number}.png", pixels)
    (tmp_path / "a" / "damaged.png").write_bytes(b"no image")
    found = look_at_images(folder_source(tmp_path))
    assert (found.count, found.looked_at, found.unreadable, found.classes) == (22, 21, 1, 2)
    assert (found.height, found.width) == (30, 50)
    rows = [pixels.reshape(-1, 3) / 255 for pixels in images]
    mean = np.mean([row.mean(axis=0) for row in rows], axis=0)
    square = np.mean([(row**2).mean(axis=0) for row in rows], axis=0)
    np.testing.assert_allclose(found.mean, mean)
    np.testing.assert_allclose(found.std, np.sqrt(square - mean**2))


def test_large_folders_are_sampled_from_beginning_to_end(tmp_path):
    for number in range(700):
        _write(tmp_path / f"{number:04}.png", np.full((8, 8, 3), number // 3, dtype=np.uint8))
    found = look_at_images(folder_source(tmp_path))
    assert (found.count, found.looked_at, found.classes) == (700, 256, 0)
    assert found.mean[0] == pytest.approx(np.mean(np.arange(700) // 3) / 255, abs=0.01)


def test_large_photographs_are_reduced_with_their_colours_kept(tmp_path):
    rows = np.linspace(0, 255, 1200).astype(np.uint8)
    _write(tmp_path / "one.jpg", np.broadcast_to(rows[:, None, None], (1200, 1600, 3)).copy())
    found = look_at_images(folder_source(tmp_path))
    assert (found.height, found.width) == (1200, 1600)
    assert found.mean == pytest.approx((0.5,) * 3, abs=0.01)
    assert found.std == pytest.approx((12**-0.5,) * 3, abs=0.01)


def test_a_folder_of_damaged_images_is_refused(tmp_path):
    for name in ("one.png", "two.jpg"):
        (tmp_path / name).write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of the 2 images looked at can be .*one\.png: "):
        look_at_images(folder_source(tmp_path))

"""Crops: distribution, determinism, and agreement with Pillow's resampling."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ijepa.counter_rng import derive_keys
from ijepa.data import ArraySource, CenterCrop, RandomResizedCrop, Squash, load_batch


def keys(count: int, seed: int = 0) -> np.ndarray:
    return derive_keys(seed, np.arange(count))


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    seed=st.integers(0, 2**31),
    low=st.floats(0.01, 1.0),
)
def test_crops_lie_inside_the_image(height, width, seed, low):
    transform = RandomResizedCrop((7, 5), scale=(low, 1.0))
    for view in transform.views(np.array([(height, width)] * 8), keys(8, seed)):
        top, left, box_height, box_width = view.box
        assert min(top, left) >= 0 and min(box_height, box_width) >= 1
        assert top + box_height <= height and left + box_width <= width


def test_crops_follow_scale_and_ratio():
    transform = RandomResizedCrop((32, 32), scale=(0.3, 1.0), flip=True)
    views = transform.views(np.array([(400, 500)] * 4000), keys(4000))
    boxes = np.array([view.box for view in views])
    area = boxes[:, 2] * boxes[:, 3] / (400 * 500)
    ratio = boxes[:, 3] / boxes[:, 2]
    assert 0.295 < area.min() < 0.31 and area.max() <= 1
    assert 0.745 < ratio.min() < 0.76 and 1.30 < ratio.max() < 1.34
    # Small crops nearly always fit, so their areas keep the uniform density.
    share = [np.mean((area > low) & (area < low + 0.1)) for low in (0.3, 0.4, 0.5)]
    assert max(share) - min(share) < 0.03
    room = np.array([400, 500]) - boxes[:, 2:]
    place = boxes[:, :2][room > 50] / room[room > 50]
    assert abs(place.mean() - 0.5) < 0.02 and place.min() < 0.02 and place.max() > 0.98
    assert 0.47 < np.mean([view.flip for view in views]) < 0.53
    assert not any(view.flip for view in RandomResizedCrop((8, 8)).views(boxes[:50, 2:], keys(50)))


def test_extreme_aspect_takes_the_largest_centre():
    (wide,) = RandomResizedCrop((8, 8), scale=(1, 1)).views(np.array([(10, 1000)]), keys(1))
    assert wide.box == (0, 493, 10, 13)
    (tall,) = RandomResizedCrop((8, 8), scale=(1, 1)).views(np.array([(1000, 10)]), keys(1))
    assert tall.box == (493, 0, 13, 10)


def test_views_do_not_depend_on_the_batch():
    transform = RandomResizedCrop((16, 16), flip=True)
    sizes = np.random.default_rng().integers(1, 600, size=(50, 2))
    together = transform.views(sizes, keys(50))
    alone = [transform.views(sizes[i : i + 1], keys(50)[i : i + 1])[0] for i in range(50)]
    assert together == alone


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_resampling_agrees_with_pillow(interpolation, channels):
    rng = np.random.default_rng()
    # In this range bicubic overshoots stay within 0 to 255: the two clip them at different times.
    pixels = rng.integers(70, 180, size=(2, 40, 50, channels), dtype=np.uint8)
    transform = RandomResizedCrop((24, 36), interpolation=interpolation, flip=True)
    chosen = keys(2, int(rng.integers(2**31)))
    images = load_batch(ArraySource(pixels), np.arange(2), transform, chosen).images
    assert images.shape == (2, channels, 24, 36)
    for row, view in enumerate(transform.views(np.array([(40, 50)] * 2), chosen)):
        top, left, height, width = view.box
        for channel in range(channels):
            crop = Image.fromarray(pixels[row, :, :, channel])
            crop = crop.crop((left, top, left + width, top + height))
            filter = getattr(Image, interpolation.upper())
            expected = np.asarray(crop.resize((36, 24), filter)).astype(int)
            expected = expected[:, ::-1] if view.flip else expected
            difference = np.abs(images[row, channel].numpy() - expected)
            assert difference.max() <= (1 if interpolation == "bilinear" else 2)
            assert difference.mean() < 0.5


def test_centre_crop_and_squash():
    ramp = np.tile(np.arange(0, 200, dtype=np.uint8)[:, None], (1, 100))[None, :, :, None]
    source = ArraySource(np.ascontiguousarray(ramp))
    (view,) = CenterCrop((56, 56)).views(np.array([(200, 100)]))
    assert view.resized == (128, 64) and view.offset == (36, 4)
    image = load_batch(source, np.array([0]), CenterCrop((100, 100), crop_ratio=1.0)).images[0]
    assert torch.equal(image[0, :, 0], torch.arange(50, 150, dtype=torch.uint8))
    image = load_batch(source, np.array([0]), Squash((200, 100))).images[0]
    assert torch.equal(image[0], torch.from_numpy(source.images[0, :, :, 0]))
    assert load_batch(source, np.array([0]), Squash((10, 30))).images.shape == (1, 1, 10, 30)
    # An output wider than the image: both sides must be covered.
    (view,) = CenterCrop((32, 96), crop_ratio=1.0).views(np.array([(200, 100)]))
    assert view.resized == (192, 96)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"size": (0, 8)}, "size must be"),
        ({"size": (8, 8), "scale": (0.5, 1.5)}, "scale must be a range"),
        ({"size": (8, 8), "ratio": (2, 1)}, "ratio must be"),
        ({"size": (8, 8), "interpolation": "nearest"}, "interpolation must be one of"),
    ],
)
def test_bad_settings_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        RandomResizedCrop(**settings)

"""Reading images: JPEG to a random crop, and the batches of the default recipe, on one core.

    pytest bench/data/bench_decode.py --benchmark-columns=min,median,ops

A round decodes a 500 x 400 photograph (scikit-learn's, resized) into 224 x 224 RandomResizedCrops,
the same crops for every provider; "images" in the extra info is how many a round makes. Times
are processor time, so that what else the machine does matters less.
"""

import io
import time
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image

from ijepa.counter_rng import derive_keys
from ijepa.data import ArraySource, RandomResizedCrop, build_loader
from ijepa.data.decode import EncodedImage
from ijepa.data.procedural.shapes import render_shapes
from ijepa.data.views import View, render_view

CROPS = 32
SIZE = (224, 224)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def jpeg() -> bytes:
    path = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"
    buffer = io.BytesIO()
    Image.open(path).resize((500, 400)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def views() -> list[View]:
    keys = derive_keys(0, np.arange(CROPS))
    return RandomResizedCrop(SIZE).views(np.array([(400, 500)] * CROPS), keys)


def simplejpeg_torch(data: bytes, view: View) -> torch.Tensor:
    """This package's path."""
    out = torch.empty(3, *SIZE, dtype=torch.uint8)
    render_view(EncodedImage(data), view, out, "bilinear")
    return out


def pillow(data: bytes, view: View) -> torch.Tensor:
    """The path of the released code, less torchvision's wrapping."""
    top, left, height, width = view.box
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image = image.crop((left, top, left + width, top + height))
    image = image.resize(SIZE, Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


PROVIDERS = {"simplejpeg+torch": simplejpeg_torch, "Pillow": pillow}


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_jpeg_to_crop(benchmark, jpeg, views, provider):
    function = PROVIDERS[provider]
    ours = torch.stack([simplejpeg_torch(jpeg, view) for view in views]).float()
    theirs = torch.stack([function(jpeg, view) for view in views]).float()
    difference = (ours - theirs).abs().mean().item()
    assert difference < 0.5
    benchmark.extra_info.update(images=CROPS, mean_difference_in_grey_levels=difference)
    benchmark(lambda: [function(jpeg, view) for view in views])
    benchmark.extra_info["images_per_second"] = CROPS / benchmark.stats.stats.median


@pytest.mark.benchmark(timer=time.process_time)
def test_default_recipe_batch(benchmark):
    """64 random crops of 32 px shapes held in memory, without masks, in this process."""
    source = ArraySource(render_shapes(np.arange(640), (32, 32), 0))
    transform = RandomResizedCrop((32, 32))
    loader = build_loader(source, lambda *, keys: None, transform, batch_size=64, seed=0)
    batches = iter(loader)
    benchmark(lambda: next(batches))

"""What pictures are made of: all three networks of a source, and images to look at."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ijepa.config import MaskConfig, ModelConfig, Recipe
from ijepa.counter_rng import derive_keys, random_bits
from ijepa.data import folder_source, load_batch
from ijepa.data.sources import ImageSource
from ijepa.interop import load_official, load_run
from ijepa.interop.runs import read_run
from ijepa.masks.from_config import build_mask_sampler
from ijepa.masks.sampler import MaskSampler
from ijepa.model import IJEPA
from ijepa.report.progress import telling
from ijepa.train.from_recipe import build_model, held_out_source, open_source, viewing_transform

_CHOICE_STREAM = 0x10C4


@dataclass(frozen=True)
class Opened:
    """The networks of a run, one of its checkpoints or a released checkpoint.

    Attributes:
        name: of the source, for people; with the step where it is known.
        folder: of the checkpoint; None of a released one.
        model: in evaluation mode, on the CPU or where the caller moved it.
        recipe: settings; of a released checkpoint None, since it does not hold them.
    """

    name: str
    folder: Path | None
    model: IJEPA
    recipe: Recipe | None

    @property
    def config(self) -> ModelConfig:
        """Of the networks."""
        return self.model.config

    @property
    def masks(self) -> MaskConfig:
        """How masks are drawn; the paper's way for a released checkpoint."""
        return MaskConfig() if self.recipe is None else self.recipe.masks

    @property
    def seed(self) -> int:
        """Of the run."""
        return 0 if self.recipe is None else self.recipe.train.seed

    def sampler(self, batch_size: int, **changes: object) -> MaskSampler:
        """Of the run's masks, with `changes` to their settings."""
        config = dataclasses.replace(self.masks, **changes)  # type: ignore[arg-type]
        return build_mask_sampler(config, self.config.grid, batch_size, torch.device("cpu"))

    def untrained(self) -> Opened:
        """The same networks as initialised from the run's seed."""
        if self.recipe is not None:
            model = build_model(self.recipe)
        else:
            torch.manual_seed(self.seed)
            model = IJEPA(self.config)
        model.eval().requires_grad_(False)
        return dataclasses.replace(self, name="random network", model=model)


def open_networks(source: str, device: torch.device, num_heads: int | None = None) -> Opened:
    """Open a run's folder, one of its checkpoints or a released `.pth.tar`.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: damaged or foreign.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"nothing at {path}: give a run's folder or a released checkpoint")
    if path.is_file():
        model = load_official(path, num_heads=num_heads)
        opened = Opened(path.name, None, model, None)
    else:
        recipe, _weights, folder = read_run(path)
        run = folder.parent.parent if folder.parent.name == "checkpoints" else folder
        name = f"{run.resolve().name}, {_spoken(folder.name)}"
        opened = Opened(name, folder, load_run(path), recipe)
    opened.model.eval().requires_grad_(False).to(device)
    return opened


def _spoken(checkpoint: str) -> str:
    """ "step-00006400" -> "step 6400"; other names as they are."""
    kind, _, number = checkpoint.partition("-")
    return f"step {int(number)}" if kind == "step" and number.isdecimal() else checkpoint


@dataclass(frozen=True)
class Images:
    """Images to look at, the same for every network, each at its own size.

    Attributes:
        source: where they are from.
        numbers: of the images, in the source.
        seen_in_training: whether the network may have been trained on them.
        caption: what they are, for people.
        recipe: whose view of them is taken.
    """

    source: ImageSource
    numbers: np.ndarray
    seen_in_training: bool
    caption: str
    recipe: Recipe

    def view(self, config: ModelConfig, first: int = 0, last: int | None = None) -> Tensor:
        """(n, C, H, W) uint8 as a network of such sizes sees them."""
        model = dataclasses.replace(self.recipe.model, image_size=config.image_size,
                                    patch_size=config.patch_size)  # fmt: skip
        transform = viewing_transform(dataclasses.replace(self.recipe, model=model))
        return load_batch(self.source, self.numbers[first:last], transform).images


def choose_images(
    opened: Opened, folder: Path | None, count: int, seed: int, console: Console | None
) -> Images:
    """`count` images (fewer where there are fewer) by a draw of `seed`.

    Of a run on rendered images they are such as it was never trained on; of a run on a folder its
    own, unless `folder` gives others.

    Raises:
        ValueError: a released checkpoint without a folder, or no image there.
    """
    recipe = opened.recipe
    if folder is not None:
        with telling(console, f"Looking for images in {folder}"):
            source: ImageSource = folder_source(folder, channels=opened.config.channels)
        base = Recipe(model=opened.config) if recipe is None else recipe
        data = dataclasses.replace(base.data, source="folder", path=str(folder))
        base = dataclasses.replace(base, data=data)
        seen, caption = False, f"images in {folder}"
    elif recipe is None:
        raise ValueError(f"{opened.name} says nothing of its images: give --images FOLDER")
    elif recipe.data.source == "folder":
        source, base = open_source(recipe, console), recipe
        seen, caption = True, "images of the training set"
    else:
        source, base = held_out_source(recipe, console is not None), recipe
        seen, caption = False, f"{recipe.data.source} never trained on"
    order = random_bits(derive_keys(seed, _CHOICE_STREAM).reshape(1), len(source))[0].argsort()
    return Images(source, order[:count].astype(np.int64), seen, caption, base)

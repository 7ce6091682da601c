"""`ijepa visualize rcdm train | sample`: representations of runs, decoded."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor

from ijepa.config import Recipe
from ijepa.data import build_loader, folder_source
from ijepa.data.sources import ImageSource
from ijepa.disk import written_aside
from ijepa.downstream.seeing.opened import Opened, choose_images, open_networks
from ijepa.downstream.seeing.options import RcdmSampleOptions, RcdmTrainOptions
from ijepa.evaluate.features import pixel_features
from ijepa.evaluate.linear import linear_probe_accuracy
from ijepa.evaluate.pooled_predictions import pooled_prediction, pooled_targets
from ijepa.evaluate.pooling import MEAN_AND_STD, pooled_features
from ijepa.masks.batch import MaskBatch
from ijepa.model import IJEPA
from ijepa.printable import printable
from ijepa.report.console import RunConsole
from ijepa.report.counting import Counting
from ijepa.train.from_recipe import choose_device, labelled_images, open_source, viewing_transform
from ijepa.train.stop_signals import StopSignals
from ijepa.visualize.heat import enlarged, framed
from ijepa.visualize.masks import PALETTE
from ijepa.visualize.rcdm.decoder import Decoder
from ijepa.visualize.rcdm.diffusion import Diffusion
from ijepa.visualize.rcdm.presets import PRESETS
from ijepa.visualize.rcdm.training import DecoderTrainer, holds_decoder, load_decoder
from ijepa.visualize.sheet import as_rgb, draw_sheet

_STATISTICS_BATCHES = 32  # that representations are standardised by
_SAMPLED_AT_ONCE = 64


def train_decoder(options: RcdmTrainOptions) -> None:
    """Begin or go on.

    Raises:
        ValueError: networks, images or settings that do not fit together.
        ModuleNotFoundError: diffusers is not installed.
    """
    for name in ("steps", "batch_size", "save_every"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    console, device = RunConsole(), choose_device(options.device)
    opened = open_networks(options.source, device, options.num_heads)
    if options.random_network:
        opened = opened.untrained()
        opened.model.to(device)
    preset = PRESETS[options.preset]
    if min(opened.config.image_size) < preset.image_size:
        raise ValueError(
            f"the decoder makes images of {preset.image_size} pixels, and the network sees "
            f"{opened.config.image_size}: choose a smaller --preset"
        )
    about = {
        "networks": _fingerprint(opened.model),
        "representation": options.of,
        "random_network": options.random_network,
        "source": str(Path(options.source).expanduser().resolve()),
    }
    width = opened.config.width if options.of == "encoder" else opened.config.target_width
    torch.manual_seed(options.seed)
    decoder = Decoder(preset, width, opened.config.channels).to(device)
    trainer = DecoderTrainer(decoder, about, options.seed, options.learning_rate)
    source, recipe = _training_images(options, opened, console)
    if holds_decoder(options.out):
        trainer.go_on(options.out)
        _say(console, f"going on with {options.out} after step {trainer.step:,}")
    else:
        batches = _batches(opened, source, recipe, options, 0, _STATISTICS_BATCHES)
        decoder.standardise(torch.cat([found for _, found in batches]))
    batches = _batches(opened, source, recipe, options, trainer.step, options.steps)
    with (
        Counting(console, "training", options.steps, trainer.step, "steps") as counting,
        StopSignals(lambda: "its last save" if holds_decoder(options.out) else None) as stop,
    ):
        trainer.train(
            batches,
            folder=options.out,
            save_every=options.save_every,
            told=lambda step, loss: counting.advance(1, f"loss {loss:.4f}"),
            stop=lambda: stop.requested,
        )
    if trainer.step < options.steps:
        _say(console, "Stopped and saved: the same command goes on")
    else:
        _say(console, f"decoder after {trainer.step:,} steps: {options.out}")


def sample_decoder(options: RcdmSampleOptions) -> None:
    """Draw the grid, and score samples where that is asked for.

    Raises:
        ValueError: networks other than the decoder's, or settings that do not fit together.
        ModuleNotFoundError: diffusers is not installed.
    """
    for name in ("count", "samples"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    console, device = RunConsole(), choose_device(options.device)
    decoder, described = load_decoder(options.decoder)
    decoder.to(device)
    about = described["about"]
    trained = open_networks(options.source or about["source"], device, options.num_heads)
    opened = trained.untrained() if about["random_network"] else trained
    opened.model.to(device)
    if _fingerprint(opened.model) != about["networks"]:
        raise ValueError(
            f"{options.source or about['source']} is not the network that {options.decoder} was "
            "trained on: it has trained on since, say. Give the right checkpoint with --source"
        )
    images = choose_images(opened, options.images, options.count, options.seed, console)
    pixels = images.view(opened.config)
    masks = opened.sampler(len(pixels))(
        len(pixels), generator=torch.Generator().manual_seed(options.seed)
    )
    representations = _representations(opened, about["representation"], pixels, masks)
    repeated = representations.repeat_interleave(options.samples, dim=0)
    samples = _sample(decoder, repeated, options, console, "sampling")
    rows: list[list[np.ndarray | None]] = []
    for number in range(len(pixels)):
        shown = [_resized(pixels[number : number + 1], decoder)[0]]
        image = as_rgb(shown[0].numpy())
        row: list[np.ndarray | None] = [image]
        if about["representation"] == "predictor":
            row.append(_context(image, masks, number))
        mine = samples[number * options.samples : (number + 1) * options.samples]
        rows.append([*row, *(as_rgb(sample.numpy()) for sample in mine)])
    second = ["context, block"] if about["representation"] == "predictor" else []
    columns = ["image", *second, *(f"sample {i + 1}" for i in range(options.samples))]
    options.out.mkdir(parents=True, exist_ok=True)
    random = "-random" if about["random_network"] else ""
    path = options.out / f"rcdm-{about['representation']}{random}.png"
    with written_aside(path) as aside:
        draw_sheet(rows, columns=columns, tile=96).save(aside, format="PNG")
    _say(console, f"{path}: {images.caption}, decoder after {described['step']:,} steps")
    if options.score:
        _score(trained, opened, decoder, about["representation"], options, console)


def _fingerprint(model: IJEPA) -> str:
    """A hash of the weights of all three networks, of 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _training_images(
    options: RcdmTrainOptions, opened: Opened, console: Console
) -> tuple[ImageSource, Recipe]:
    """Images to train on, and the recipe whose view of them is taken."""
    recipe = opened.recipe
    if options.images is not None:
        base = Recipe(model=opened.config) if recipe is None else recipe
        data = dataclasses.replace(base.data, source="folder", path=str(options.images))
        source = folder_source(options.images, channels=opened.config.channels)
        return source, dataclasses.replace(base, data=data)
    if recipe is None:
        raise ValueError(f"{opened.name} says nothing of its images: give --images FOLDER")
    return open_source(recipe, console), recipe


def _batches(
    opened: Opened, source: ImageSource, recipe: Recipe, options: RcdmTrainOptions,
    first: int, last: int,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """(images of the decoder's size, representations) of steps `first` to `last` - 1."""
    loader = build_loader(
        source,
        opened.sampler(options.batch_size),
        viewing_transform(recipe),
        batch_size=options.batch_size,
        seed=options.seed,
        start_step=first,
        end_step=last,
        num_workers=options.workers,
    )
    side = PRESETS[options.preset].image_size
    for batch in loader:
        found = _representations(opened, options.of, batch.images, batch.masks)
        yield _to_side(batch.images, side), found


def _representations(opened: Opened, of: str, images: Tensor, masks: MaskBatch) -> Tensor:
    device = opened.model.target_encoder.pos_embed.device
    if of == "encoder":
        return pooled_targets(opened.model, images.to(device))
    return pooled_prediction(opened.model, images.to(device), masks.to(device))


def _sample(
    decoder: Decoder, representations: Tensor, options: RcdmSampleOptions, console: Console,
    what: str,
) -> Tensor:  # fmt: skip
    """(n, C, S, S) uint8, the same for any size of the pieces it is done in."""
    shape = (decoder.channels, decoder.preset.image_size, decoder.preset.image_size)
    diffusion, found = Diffusion(), []
    total = len(representations) * options.steps
    with Counting(console, what, total, things="image steps") as counting:
        for number, part in enumerate(representations.split(_SAMPLED_AT_ONCE)):
            generator = torch.Generator().manual_seed(options.seed + number)
            found.append(
                diffusion.sample(
                    decoder, part, shape, generator, options.steps,
                    after_step=partial(counting.advance, len(part)),
                )
            )  # fmt: skip
    return torch.cat(found)


def _score(
    trained: Opened, opened: Opened, decoder: Decoder, of: str, options: RcdmSampleOptions,
    console: Console,
) -> None:  # fmt: skip
    """Say how often classifiers fitted on real images recognise samples, and the real images."""
    if trained.recipe is None:
        raise ValueError("scores need the labelled images of a run")
    recipe = trained.recipe
    source = open_source(recipe, console)
    if not source.labels:
        raise ValueError("scores need images with labels")
    labelled = labelled_images(recipe, source, True)
    real = labelled.test_images[: options.score]
    masks = opened.sampler(len(real))(
        len(real), generator=torch.Generator().manual_seed(options.seed)
    )
    representations = _representations(opened, of, real, masks)
    made = _sample(decoder, representations, options, console, "sampling to score")
    made = F.interpolate(made, size=real.shape[2:], mode="bilinear", antialias=True)
    encoder = trained.model.target_encoder
    mean, std = recipe.model.image_mean, recipe.model.image_std
    kinds = {
        "pixels": lambda pictures: pixel_features(pictures, mean, std),
        "features of the pretrained network": lambda pictures: pooled_features(encoder, pictures)[
            MEAN_AND_STD
        ],
    }
    for task, labels in labelled.train_labels.items():
        truth = labelled.test_labels[task][: len(real)]
        for kind, features in kinds.items():
            fitted = features(labelled.train_images)
            shares = [
                linear_probe_accuracy(fitted, labels, features(pictures), truth)
                for pictures in (made, real)
            ]
            _say(
                console,
                f"{task} by a linear classifier on {kind}: {shares[0]:.1%} of {len(real)} samples, "
                f"{shares[1]:.1%} of the real images; guessing {labelled.chance[task]:.1%}",
            )


def _context(image: np.ndarray, masks: MaskBatch, number: int) -> np.ndarray:
    """The image under its context, its first target block framed."""
    seen, block = (np.zeros(masks.grid, dtype=bool) for _ in range(2))
    seen.flat[masks.context_of(number).numpy()] = True
    block.flat[masks.targets_of(number)[0].numpy()] = True
    cell = max(96 // max(masks.grid), 2)  # whole pixels for a patch
    size = (cell * masks.grid[1], cell * masks.grid[0])
    large = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.NEAREST))
    veiled = np.where(enlarged(seen, large.shape[:2])[..., None], large, 232).astype(np.uint8)
    return framed(veiled, block, PALETTE[0], 3)


def _resized(images: Tensor, decoder: Decoder) -> Tensor:
    return _to_side(images, decoder.preset.image_size)


def _to_side(images: Tensor, side: int) -> Tensor:
    """(B, C, H, W) uint8 -> (B, C, side, side), the middle of what is not square."""
    height, width = images.shape[2:]
    if (height, width) == (side, side):
        return images
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = images[:, :, top : top + short, left : left + short]
    return F.interpolate(square, size=(side, side), mode="bilinear", antialias=True)


def _say(console: Console, text: str) -> None:
    console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

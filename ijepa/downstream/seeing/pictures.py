"""The pictures of `ijepa visualize`, each from opened networks and images; the report shows them
too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ijepa.counter_rng import derive_keys
from ijepa.downstream.neighbours import nearest
from ijepa.downstream.seeing.opened import Images, Opened
from ijepa.evaluate.attention_maps import attention_weights
from ijepa.evaluate.features import encoder_features
from ijepa.evaluate.matches import prediction_matches
from ijepa.masks.batch import MaskBatch
from ijepa.visualize.coverage import mask_coverage
from ijepa.visualize.heat import enlarged, framed, heat_colours, laid_over
from ijepa.visualize.masks import PALETTE, draw_mask_examples
from ijepa.visualize.pca import Basis, pca_colours
from ijepa.visualize.sheet import as_rgb, draw_sheet

_MASK_STREAM = 0x3A5C
_COVERAGE_IMAGES, _COVERAGE_BATCH = 4096, 128
_MARK = (57, 255, 136)  # of the patch that looks: on no heat map


@dataclass(frozen=True)
class Picture:
    """A picture and what it shows.

    Attributes:
        name: of its file, without ending.
        title, caption: for people; plain text.
    """

    name: str
    title: str
    caption: str
    image: Image.Image


def picture_masks(opened: Opened, images: Images, count: int = 6) -> list[Picture]:
    """Packed beside truncated masks on images, and how often each patch is covered."""
    pixels = images.view(opened.config, 0, count)
    pictures = []
    maps, names, shares = [], [], []
    kinds: list[str] = ["packed"]
    if opened.masks.strategy == "multiblock":
        kinds.append("truncate")
    for batching in kinds:
        masks = _masks_of(opened, len(pixels), batching=batching)
        sheet = Image.fromarray(draw_mask_examples(pixels, masks, count=len(pixels)))
        cut = ", cut to the shortest context of the batch" if batching == "truncate" else ""
        pictures.append(
            Picture(
                f"masks-{batching}",
                f"Masks, {batching}",
                "Image, context (what is seen), target blocks (what is predicted): "
                f"{opened.masks.strategy}{cut}.",
                sheet,
            )
        )
        sampler = opened.sampler(_COVERAGE_BATCH, batching=batching)
        found = mask_coverage(sampler, _COVERAGE_IMAGES, _COVERAGE_BATCH, opened.seed)
        maps.append([heat_colours(found.context, 0, 1), heat_colours(found.target, 0, 1)])
        names.append(f"{batching}: {found.context_patches:.0f} of {found.context.size} patches")
        shares.append(
            [
                f"{found.context.min():.0%} to {found.context.max():.0%}",
                f"{found.target.min():.0%} to {found.target.max():.0%}",
            ]
        )
    coverage = draw_sheet(
        maps,
        columns=("share of images where a patch is context", "... is in a target block"),
        names=names,
        captions=shares,
        tile=160,
    )
    caption = (
        f"Over {_COVERAGE_IMAGES:,} draws in batches of {_COVERAGE_BATCH}; dark is 0, light is 1. "
        "At the side: patches of a context, on average."
    )
    return [*pictures, Picture("masks-coverage", "Coverage", caption, coverage)]


def picture_pca(
    networks: Sequence[Opened],
    images: Images,
    *,
    count: int = 6,
    basis: Basis = "each",
    remove_position: bool = False,
) -> Picture:
    """Patch features of target encoders as colours, a row an image, a column a network; the
    directions are those of all `images`."""
    features = []
    for opened in networks:
        found = _patch_features(opened, images.view(opened.config))
        features.append(found - found.mean(dim=0) if remove_position else found)
    colours = pca_colours(features, basis)
    shown = images.view(networks[0].config, 0, count)
    rows: list[list[np.ndarray | None]] = []
    for number in range(len(shown)):
        row: list[np.ndarray | None] = [as_rgb(shown[number].numpy())]
        for opened, colour in zip(networks, colours, strict=True):
            cells = colour[number].view(*opened.config.grid, 3).numpy()
            row.append(enlarged(cells, (8 * cells.shape[0], 8 * cells.shape[1])))
        rows.append(row)
    how = {
        "one": "one basis for all columns",
        "each": "a basis for each column, turned towards the first one's colours",
    }[basis]
    less = " less each position's mean over the images" if remove_position else ""
    return Picture(
        "pca-content" if remove_position else "pca",
        "PCA of patch features" + (", positions removed" if remove_position else ""),
        f"The three main directions of the patches' features{less} as red, green and blue; {how}. "
        f"Images: {images.caption}.",
        draw_sheet(rows, columns=["image", *(opened.name for opened in networks)]),
    )


def picture_attention(
    opened: Opened, images: Images, *, count: int = 4, block: int = -1, place: float = 0.5
) -> Picture:
    """Where one patch of each image looks, by every head of a block, and all heads' mean."""
    pixels = images.view(opened.config, 0, count)
    device = opened.model.target_encoder.pos_embed.device
    weights = attention_weights(opened.model.target_encoder, pixels.to(device), block).cpu()
    grid = opened.config.grid
    asks = int(place * (grid[0] - 1) + 0.5) * grid[1] + int(place * (grid[1] - 1) + 0.5)
    mark = np.zeros(grid, dtype=bool)
    mark.flat[asks] = True
    rows: list[list[np.ndarray | None]] = []
    for number in range(len(pixels)):
        image = as_rgb(pixels[number].numpy())
        zoom = max(128 // max(image.shape[:2]), 1)
        image = image.repeat(zoom, axis=0).repeat(zoom, axis=1)
        row: list[np.ndarray | None] = [framed(image, mark, _MARK, max(zoom // 2, 2))]
        maps = weights[number, :, asks].numpy()  # (H, N)
        received = weights[number].mean(dim=(0, 1)).numpy()  # (N,)
        for values in (*maps, maps.mean(axis=0), received):
            cells = heat_colours(values.reshape(grid), 0.0, float(values.max()))
            drawn = laid_over(image, enlarged(cells, image.shape[:2]))
            row.append(framed(drawn, mark, _MARK, max(zoom // 2, 2)))
        rows.append(row)
    heads = [f"head {head + 1}" for head in range(weights.shape[1])]
    blocks = opened.config.depth
    return Picture(
        "attention",
        "Attention",
        f"Where the framed patch looks, block {block % blocks + 1} of {blocks} of the target "
        "encoder; each map from 0 to its own maximum. Last column: what every patch receives, mean "
        f"over heads and patches. Images: {images.caption}.",
        draw_sheet(rows, columns=["image", *heads, "mean of heads", "received"], tile=112),
    )


def picture_neighbours(
    networks: Sequence[Opened], images: Images, *, queries: int = 5, neighbours: int = 6
) -> Picture:
    """Nearest images by average-pooled target features, among all the others of `images`."""
    rows: list[list[np.ndarray | None]] = []
    names, captions = [], []
    features = []
    for opened in networks:
        pixels = images.view(opened.config)
        found = encoder_features(opened.model.target_encoder, pixels, batch_size=64)
        features.append(found.last.numpy())
    shown = images.view(networks[0].config)
    for query in range(min(queries, len(shown) - 1)):
        for opened, rows_of in zip(networks, features, strict=True):
            near = [n for n in nearest(rows_of, rows_of[query], neighbours + 1) if n.row != query]
            near = near[:neighbours]
            rows.append([as_rgb(shown[i].numpy()) for i in (query, *(n.row for n in near))])
            names.append(opened.name)
            captions.append(["query", *(f"{n.cosine:+.2f}" for n in near)])
    if not rows:
        raise ValueError("nearest neighbours take at least two images")
    return Picture(
        "neighbours",
        "Nearest neighbours",
        f"Of each query (left), the nearest among {len(shown):,} {images.caption}, by the cosine "
        "of average-pooled target features less their mean. Queries are random, not picked.",
        draw_sheet(rows, names=names, captions=captions, tile=96),
    )


def picture_predictor(opened: Opened, images: Images, *, count: int = 4) -> Picture:
    """Where the predicted features of each target block match, in the image and in another; the
    shares of right matches are over all `images`."""
    pixels = images.view(opened.config)
    if len(pixels) < 2:
        raise ValueError("the predictor's picture compares images: give at least two")
    device = opened.model.context_encoder.pos_embed.device
    masks = _masks_of(opened, len(pixels))
    found = prediction_matches(opened.model, pixels.to(device), masks.to(device))
    rows: list[list[np.ndarray | None]] = []
    captions = []
    grid = opened.config.grid
    limit = float(found.maps.abs().max())
    for number in range(min(count, len(pixels))):
        other = (number + 1) % len(pixels)
        context = np.zeros(grid, dtype=bool)
        context.flat[masks.context_of(number).numpy()] = True
        image = _zoomed(pixels[number])
        seen = np.where(enlarged(context, image.shape[:2])[..., None], image, 232).astype(np.uint8)
        row: list[np.ndarray | None] = [image, seen]
        words = ["", "context"]
        for block, ids in enumerate(masks.targets_of(number)):
            target = np.zeros(grid, dtype=bool)
            target.flat[ids.numpy()] = True
            colour = PALETTE[block % len(PALETTE)]
            for where, place in ((number, "here"), (other, "elsewhere")):
                values = found.maps[number, block, where].numpy().reshape(grid)
                cells = heat_colours(values, -limit, limit)
                drawn = laid_over(_zoomed(pixels[where]), enlarged(cells, image.shape[:2]))
                row.append(framed(drawn, target, colour, 4))
                words.append(f"{block + 1}, {place}")
        rows.append(row)
        captions.append(words)
    return Picture(
        "predictor",
        "What the predictor expects",
        "Cosine of the predicted features of each target block (framed) with every patch of the "
        f"image and, elsewhere, of another one; dark is -{limit:.2f}, light +{limit:.2f}. Over "
        f"{len(pixels)} images the right place is the most alike of its image for "
        f"{found.place:.1%} of the target patches (guessing {found.place_chance:.1%}), the right "
        f"image the most alike at its place for {found.image:.1%} (guessing "
        f"{found.image_chance:.1%}). Images: {images.caption}.",
        draw_sheet(rows, captions=captions, tile=112),
    )


def _zoomed(image: Tensor, side: int = 128) -> np.ndarray:
    """(C, H, W) -> (H', W', 3), small images enlarged in whole pixels' colours."""
    pixels = as_rgb(image.numpy())
    zoom = max(side // max(pixels.shape[:2]), 1)
    return pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)


def _masks_of(opened: Opened, images: int, **changes: object) -> MaskBatch:
    """Masks of the first `images` images, the same at every call."""
    keys = derive_keys(opened.seed, _MASK_STREAM, np.arange(images))
    return opened.sampler(images, **changes)(keys=keys)


@torch.no_grad()
def _patch_features(opened: Opened, pixels: Tensor) -> Tensor:
    """(B, N, D) float32 on the host, of the target encoder's last block."""
    encoder = opened.model.target_encoder
    device = encoder.pos_embed.device
    return torch.cat([encoder(part.to(device)).float().cpu() for part in pixels.split(64)])

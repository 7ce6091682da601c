"""An encoder to be used: images or files to features, nothing to be trained."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from ijepa.config import ModelConfig
from ijepa.data.decode import EncodedImage, ImageError
from ijepa.data.pillow_pixels import pillow_pixels
from ijepa.data.regular_files import read_regular_file
from ijepa.data.sources import ArraySource, OpenedImage
from ijepa.data.views import CenterCrop, Transform, render_view
from ijepa.evaluate.drop_path import block_with_drop_path
from ijepa.evaluate.features import CONCATENATED_BLOCKS, Layers, block_features
from ijepa.vit import Block, Encoder

Picture = str | os.PathLike | Image.Image


def evaluation_crop(size: tuple[int, int]) -> CenterCrop:
    """What the paper's evaluations look at (appendix A.2): the centre 224 of 256 pixels, bicubic.

    Above 224 pixels all of the tighter side is kept, as in MAE's fine-tuning at 448.
    """
    ratio = 224 / 256 if max(size) <= 224 else 1.0
    return CenterCrop(size, crop_ratio=ratio, interpolation="bicubic")


class PretrainedEncoder(Encoder):
    """An encoder in evaluation mode whose weights are fixed; of a classifier, with its head.

    Args:
        config: sizes, and the statistics that pixels are normalised with.
        state: tensors by released name; None leaves the encoder as initialised.
        transform: what `preprocess` makes of an image; None is `evaluation_crop` of the size that
            the encoder was trained at.
        class_names: of a classifier; then there is a linear `head` as well.

    Raises:
        ValueError: tensors are missing, unknown or of the wrong shape.
    """

    def __init__(
        self,
        config: ModelConfig,
        state: dict[str, Tensor] | None = None,
        transform: Transform | None = None,
        class_names: Sequence[str] = (),
    ):
        with torch.device("cpu" if state is None else "meta"):
            super().__init__(config)
            if class_names:
                self.head = nn.Linear(config.width, len(class_names))
        for name in ("image_mean", "image_std"):  # what no file holds
            setattr(self, name, torch.tensor(getattr(config, name), dtype=torch.float32))
        if state is not None:
            try:
                self.load_state_dict(state, assign=True)
            except RuntimeError as error:
                raise ValueError(f"the weights fit no encoder of their sizes: {error}") from None
        self.config = config
        self.class_names = tuple(class_names)
        self.transform = transform or evaluation_crop(config.image_size)
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def embed(
        self, images: Tensor, layers: Layers = "last", pool: Literal["mean"] | None = "mean"
    ) -> Tensor:
        """Features of images, through the final LayerNorm, float32 on the encoder's device.

        Args:
            images: (B, C, H, W) uint8 of any size that whole patches cover; where it is not the
                size of the training, positions are resized.
            layers: "last" block, or the "last4" concatenated, the earliest first (all blocks, where
                there are fewer); the paper reports the better of the two (appendix A.2).
            pool: "mean" over the patches, or None for every patch.

        Returns:
            (B, D), D being four times the width for "last4"; without pooling (B, N, D).

        Raises:
            ValueError: images of another kind, or that patches do not divide.
        """
        self._check(images)
        if pool not in ("mean", None):
            raise ValueError(f"pool must be 'mean' or None, got {pool!r}")
        images = images.to(self.pos_embed.device)
        if not len(images):
            return self._no_features(images, layers, pool)
        features = block_features(self, images, layers)  # (B, N, D)
        return features.mean(dim=1) if pool == "mean" else features

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """(B, classes) logits of images (B, C, H, W) uint8, by a fine-tuned classifier.

        Raises:
            ValueError: this encoder has no head; or images as for `embed`.
        """
        self._check(images)
        return self.class_logits(images.to(self.pos_embed.device))

    def class_logits(self, images: Tensor, drop_path: Sequence[float] = ()) -> Tensor:
        """(B, classes): the patches' mean, through the final LayerNorm and the head (as MAE does).

        Args:
            images: (B, C, H, W) on the encoder's device, uint8 or normalised floats.
            drop_path: chance of each block that an image goes past its branches; none by default.
        """
        if not self.class_names:
            raise ValueError("this encoder has no head: fine-tune it (ijepa eval finetune)")
        x, packing = self._embed(images, None, None)  # (B * N, D)
        tokens = x.shape[0] // images.shape[0]
        for block, chance in zip(self.blocks, drop_path or [0.0] * len(self.blocks), strict=True):
            assert isinstance(block, Block)
            x = block_with_drop_path(block, x, packing, chance, tokens)
        pooled = x.view(images.shape[0], tokens, -1).mean(dim=1)
        return self.head(self.norm(pooled))

    def preprocess(self, pictures: Picture | Sequence[Picture]) -> Tensor:
        """Image files or Pillow images -> (B, C, H, W) uint8 for `embed`, as `transform` says.

        Files are turned upright; transparent parts show white.

        Raises:
            ValueError: no picture.
            ImageError: a file cannot be read; names it.
        """
        if isinstance(pictures, str | os.PathLike | Image.Image):
            pictures = [pictures]
        if not pictures:
            raise ValueError("preprocess needs at least one path or picture")
        opened = [_open(picture, self.config.channels) for picture in pictures]
        sizes = np.array([(image.height, image.width) for image in opened])
        views = self.transform.views(sizes, np.zeros(len(opened), dtype=np.uint64))
        batch = torch.empty(len(opened), self.config.channels, *self.transform.size).byte()
        for picture, image, view, out in zip(pictures, opened, views, batch, strict=True):
            try:
                render_view(image, view, out, self.transform.interpolation)
            except ImageError as error:
                raise ImageError(f"{picture}: {error}") from None
        return batch

    def feature_width(self, layers: Layers) -> int:
        """D of the features of such layers."""
        blocks = 1 if layers == "last" else min(CONCATENATED_BLOCKS, self.config.depth)
        return blocks * self.config.width

    def _no_features(self, images: Tensor, layers: Layers, pool: str | None) -> Tensor:
        """Those of no image."""
        patches = [s // p for s, p in zip(images.shape[2:], self.patch_size, strict=True)]
        each = [] if pool == "mean" else [patches[0] * patches[1]]
        return torch.empty(0, *each, self.feature_width(layers), device=images.device)

    def fingerprint(self) -> str:
        """A hash of the weights and of what else decides about features, of 16 hex digits."""
        digest = hashlib.sha256(repr((self.config.heads, self.config.image_mean,
                                      self.config.image_std)).encode())  # fmt: skip
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ValueError unless whole patches cover images of (height, width) `size`."""
        patch = self.patch_size
        if size[0] % patch[0] or size[1] % patch[1] or min(size) < 1:
            nearest = [max(round(s / p), 1) * p for s, p in zip(size, patch, strict=True)]
            raise ValueError(
                f"{size[0]}x{size[1]} pixels are no whole patches of {patch[0]}x{patch[1]}: the "
                f"nearest size that is one is {nearest[0]}x{nearest[1]}"
            )

    def _check(self, images: Tensor) -> None:
        channels = self.config.channels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(
                f"images must be uint8 of shape (B, {channels}, H, W), as `preprocess` returns, "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        self.check_size((images.shape[2], images.shape[3]))


def _open(picture: Picture, channels: int) -> OpenedImage:
    if isinstance(picture, Image.Image):
        pixels = pillow_pixels(ImageOps.exif_transpose(picture), channels)
        return ArraySource(pixels[None]).open(0)
    try:
        return EncodedImage(read_regular_file(Path(picture).expanduser()), channels)
    except OSError as error:
        raise ImageError(f"{picture}: {error.strerror or error}") from None
    except ImageError as error:
        raise ImageError(f"{picture}: {error}") from None

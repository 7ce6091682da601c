"""MAE: reconstruct the pixels of masked patches (He et al. 2022, sections 3 and 4).

    python kernels/examples/mae.py

The encoder sees a quarter of the patches and a class token; a small decoder gets them back in order
with mask tokens between, and predicts every masked patch's normalised pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import generated
import torch
import training
from masked_vit_kernels import (
    PrefixPacking,
    gather_tokens,
    latent_prediction_loss,
    pack_lengths,
    pack_prefix,
    prepend_tokens,
    scatter_tokens,
    split_prefix,
)
from masked_vit_kernels.pixels import extract_patches
from packed_vit import Blocks, Patches
from torch import Tensor, nn

SIZE, PATCH, WIDTH, DECODER_WIDTH = 32, 4, 96, 64
NUM_TOKENS = (SIZE // PATCH) ** 2


@dataclass(frozen=True)
class Masking:
    """What is kept of a batch: `ids_keep` (B, K), `masked` (B * (N - K),) rows b * N + patch, and
    the sequences of encoder and decoder, each with its class token."""

    ids_keep: Tensor
    masked: Tensor
    kept: PrefixPacking
    whole: PrefixPacking

    def to(self, device: str) -> Masking:
        """The same on a device."""
        return Masking(**{name: value.to(device) for name, value in vars(self).items()})


def draw_masking(batch: int, generator: torch.Generator, kept_share: float = 0.25) -> Masking:
    """Uniformly random patches of each image, as many of all."""
    shuffle = torch.rand(batch, NUM_TOKENS, generator=generator).argsort(dim=1)
    num_kept = int(NUM_TOKENS * kept_share)
    rows = shuffle[:, num_kept:] + NUM_TOKENS * torch.arange(batch)[:, None]
    return Masking(
        shuffle[:, :num_kept],
        rows.flatten(),
        pack_prefix(pack_lengths([num_kept] * batch), 1),
        pack_prefix(pack_lengths([NUM_TOKENS] * batch), 1),
    )


class MAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = Patches(3, (PATCH, PATCH), NUM_TOKENS, WIDTH)
        self.class_token = nn.Parameter(torch.randn(1, WIDTH) * 0.02)
        self.encoder = Blocks(WIDTH, depth=4, heads=4)
        self.to_decoder = nn.Linear(WIDTH, DECODER_WIDTH)
        self.mask_token = nn.Parameter(torch.randn(1, 1, DECODER_WIDTH) * 0.02)
        self.decoder_positions = nn.Parameter(torch.randn(NUM_TOKENS, DECODER_WIDTH) * 0.02)
        self.decoder = Blocks(DECODER_WIDTH, depth=2, heads=4)
        self.predict = nn.Linear(DECODER_WIDTH, 3 * PATCH * PATCH)

    def forward(self, images: Tensor, masking: Masking) -> Tensor:
        """The mean squared error of the masked patches' pixels, normalised patch by patch."""
        x = self.patches(images, masking.ids_keep)  # (B, K, D)
        x = prepend_tokens(x.flatten(0, 1), self.class_token, masking.kept)
        x = self.to_decoder(self.encoder(x, masking.kept))
        class_token, x = split_prefix(x, masking.kept)  # (B, 1, P), (B * K, P)
        x = x.unflatten(0, masking.ids_keep.shape)
        x = scatter_tokens(x, masking.ids_keep, self.mask_token, NUM_TOKENS)  # (B, N, P)
        x = (x + self.decoder_positions).flatten(0, 1)
        x = self.decoder(prepend_tokens(x, class_token, masking.whole), masking.whole)
        _, x = split_prefix(x, masking.whole)  # (B * N, P)
        predictions = self.predict(gather_tokens(x, masking.masked))
        pixels = extract_patches(images, (PATCH, PATCH))  # (B, N, 3 * PATCH * PATCH)
        return latent_prediction_loss(predictions, pixels, masking.masked, kind="l2")


def main() -> None:
    given = training.options(__doc__)
    torch.manual_seed(given.seed)
    model = MAE().to(given.device)

    def loss_of(generator: torch.Generator) -> Tensor:
        images = generated.images(given.batch, SIZE, generator).to(given.device)
        return model(images, draw_masking(given.batch, generator).to(given.device))

    training.train(given, model, loss_of)


if __name__ == "__main__":
    main()

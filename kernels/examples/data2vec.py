"""data2vec: predict what an averaged network makes of the whole image (Baevski et al. 2022).

    python kernels/examples/data2vec.py

The student sees mask tokens in the place of hidden patches. Its target there is the mean of the
teacher's last blocks, standardised over the patches of each image; the teacher is the student's
moving average.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import generated
import torch
import training
from masked_vit_kernels import (
    Packing,
    embed_visible_patches,
    gather_tokens,
    latent_prediction_loss,
    pack_lengths,
    scatter_tokens,
)
from packed_vit import Blocks, Patches
from torch import Tensor, nn

SIZE, PATCH, WIDTH, TOP_BLOCKS = 32, 4, 96, 2
NUM_TOKENS = (SIZE // PATCH) ** 2


@dataclass(frozen=True)
class Masking:
    """What is hidden: `visible` (B, K) patches that are not, `masked` (B * (N - K),) rows
    b * N + patch that are, and the sequences of whole images."""

    visible: Tensor
    masked: Tensor
    whole: Packing

    def to(self, device: str) -> Masking:
        """The same on a device."""
        return Masking(**{name: value.to(device) for name, value in vars(self).items()})


def draw_masking(batch: int, generator: torch.Generator, masked_share: float = 0.6) -> Masking:
    """Uniformly random patches of each image."""
    shuffle = torch.rand(batch, NUM_TOKENS, generator=generator).argsort(dim=1)
    num_visible = int(NUM_TOKENS * (1 - masked_share))
    rows = shuffle[:, num_visible:] + NUM_TOKENS * torch.arange(batch)[:, None]
    whole = pack_lengths([NUM_TOKENS] * batch)
    return Masking(shuffle[:, :num_visible], rows.flatten(), whole)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = Patches(3, (PATCH, PATCH), NUM_TOKENS, WIDTH)
        self.mask_token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.blocks = Blocks(WIDTH, depth=4, heads=4)

    def forward(self, images: Tensor, masking: Masking) -> Tensor:
        """Student: (B * N, D) with mask tokens in the place of hidden patches."""
        patches = self.patches
        x = embed_visible_patches(images, patches.weight, patches.bias, None, masking.visible)
        x = scatter_tokens(x, masking.visible, self.mask_token, NUM_TOKENS) + patches.positions
        return self.blocks(x.flatten(0, 1), masking.whole)

    @torch.no_grad()
    def targets(self, images: Tensor, whole: Packing) -> Tensor:
        """Teacher: (B, N, D), the mean of the last blocks on whole images."""
        x, outputs = self.patches(images).flatten(0, 1), []
        for block in self.blocks.blocks:
            x = block(x, whole)
            outputs.append(x)
        return torch.stack(outputs[-TOP_BLOCKS:]).mean(0).unflatten(0, (images.shape[0], -1))


class Data2Vec(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = Encoder()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.predict = nn.Linear(WIDTH, WIDTH)

    def forward(self, images: Tensor, masking: Masking) -> Tensor:
        """Smooth L1 at the hidden patches."""
        predictions = self.predict(gather_tokens(self.student(images, masking), masking.masked))
        targets = self.teacher.targets(images, masking.whole)
        return latent_prediction_loss(
            predictions, targets, masking.masked, kind="smooth_l1", target_norm="instance"
        )


def main() -> None:
    given = training.options(__doc__)
    torch.manual_seed(given.seed)
    model = Data2Vec().to(given.device)

    def loss_of(generator: torch.Generator) -> Tensor:
        images = generated.images(given.batch, SIZE, generator).to(given.device)
        return model(images, draw_masking(given.batch, generator).to(given.device))

    training.train(given, model, loss_of, teacher=model.teacher, averaged=model.student)


if __name__ == "__main__":
    main()

"""DINOv2 in small: self-distillation over crops and hidden patches (Oquab et al. 2023, section 4).

    python kernels/examples/dinov2.py

The student sees two large crops of an image, some of their patches hidden, and four small ones; all
of them are one packed batch, each with its class token. DINO: what a head makes of the class tokens
must agree with the teacher's of the other large crops. iBOT: so must hidden patches with the
teacher's there. The teacher is the student's moving average and sees the large crops whole.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import generated
import torch
import torch.nn.functional as F
import training
from masked_vit_kernels import (
    PrefixPacking,
    embed_visible_patches,
    gather_tokens,
    pack_lengths,
    pack_prefix,
    prepend_tokens,
    scatter_tokens,
    split_prefix,
)
from packed_vit import Blocks, Patches
from torch import Tensor, nn

LARGE, SMALL, PATCH, WIDTH, PROTOTYPES = 32, 16, 4, 96, 256
SIDE = LARGE // PATCH
NUM_TOKENS, SMALL_TOKENS = SIDE**2, (SMALL // PATCH) ** 2
NUM_LARGE, NUM_SMALL = 2, 4  # crops an image
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.05


@dataclass(frozen=True)
class Masking:
    """What is hidden of the large crops: `visible` (2B, K) patches that are not, `masked` rows
    crop * N + patch that are; and the sequences of the student and of the teacher."""

    visible: Tensor
    masked: Tensor
    crops: PrefixPacking
    large: PrefixPacking

    def to(self, device: str) -> Masking:
        """The same on a device."""
        return Masking(**{name: value.to(device) for name, value in vars(self).items()})


def draw_masking(batch: int, generator: torch.Generator, masked_share: float = 0.4) -> Masking:
    """Uniformly random patches of each large crop."""
    count, num_visible = NUM_LARGE * batch, int(NUM_TOKENS * (1 - masked_share))
    shuffle = torch.rand(count, NUM_TOKENS, generator=generator).argsort(dim=1)
    rows = shuffle[:, num_visible:] + NUM_TOKENS * torch.arange(count)[:, None]
    large = [NUM_TOKENS] * count
    return Masking(
        shuffle[:, :num_visible],
        rows.flatten(),
        pack_prefix(pack_lengths(large + [SMALL_TOKENS] * NUM_SMALL * batch), 1),
        pack_prefix(pack_lengths(large), 1),
    )


def draw_crops(images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(B, 3, H, W) -> large (2B, ...) and small (4B, ...) crops, flipped by chance; crop-major."""

    def crops(count: int, size: int, least: float, most: float) -> Tensor:
        made = []
        for _ in range(count):
            share = least + (most - least) * float(torch.rand((), generator=generator))
            side = int(images.shape[-1] * share)
            room = images.shape[-1] - side
            y, x = (int(torch.randint(room + 1, (), generator=generator)) for _ in range(2))
            crop = images[:, :, y : y + side, x : x + side]
            crop = F.interpolate(crop, (size, size), mode="bilinear", antialias=True)
            made.append(crop.flip(3) if torch.rand((), generator=generator) < 0.5 else crop)
        return torch.cat(made)

    return crops(NUM_LARGE, LARGE, 0.5, 1.0), crops(NUM_SMALL, SMALL, 0.25, 0.5)


class Head(nn.Module):
    """Likeness of tokens to prototypes, both of unit length."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, 64))
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, 64))

    def forward(self, x: Tensor) -> Tensor:
        """(R, D) -> (R, prototypes)."""
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.prototypes, dim=-1))


class Network(nn.Module):
    """Encoder and head, of the student and of the teacher."""

    def __init__(self):
        super().__init__()
        self.patches = Patches(3, (PATCH, PATCH), NUM_TOKENS, WIDTH)
        self.class_token = nn.Parameter(torch.randn(1, WIDTH) * 0.02)
        self.mask_token = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.blocks = Blocks(WIDTH, depth=4, heads=4)
        self.head = Head()

    def positions(self, size: int) -> Tensor:
        """(N, D) for crops of `size` pixels."""
        side, learned = size // PATCH, self.patches.positions
        if side == SIDE:
            return learned
        grid = learned.T.reshape(1, WIDTH, SIDE, SIDE).float()
        resized = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
        return resized.flatten(2)[0].T.to(learned.dtype)

    def embed(self, crops: Tensor, visible: Tensor | None = None) -> Tensor:
        """(n * N, D), with mask tokens where patches are not `visible`."""
        weights = self.patches.weight, self.patches.bias
        positions = self.positions(crops.shape[-1])
        if visible is None:
            return embed_visible_patches(crops, *weights, positions).flatten(0, 1)
        x = embed_visible_patches(crops, *weights, None, visible)
        x = scatter_tokens(x, visible, self.mask_token, positions.shape[0])
        return (x + positions).flatten(0, 1)

    def forward(self, x: Tensor, packing: PrefixPacking, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded crops -> what the head makes of class tokens (S, ...) and of token `rows`."""
        x = self.blocks(prepend_tokens(x, self.class_token, packing), packing)
        class_tokens, tokens = split_prefix(x, packing)
        return self.head(class_tokens.flatten(0, 1)), self.head(gather_tokens(tokens, rows))


class DINOv2(nn.Module):
    def __init__(self):
        super().__init__()
        self.student = Network()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.register_buffer("centres", torch.zeros(2, PROTOTYPES))  # of DINO and of iBOT

    def forward(self, large: Tensor, small: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:
        """The sum of both losses, and the teacher's mean outputs (2, prototypes)."""
        student, teacher = self.student, self.teacher
        x = torch.cat([student.embed(large, masking.visible), student.embed(small)])
        by_crop, by_patch = student(x, masking.crops, masking.masked)
        with torch.no_grad():
            targets = teacher(teacher.embed(large), masking.large, masking.masked)
        loss = distillation(by_crop, by_patch, *targets, self.centres)
        return loss, torch.stack([target.float().mean(0) for target in targets])

    @torch.no_grad()
    def move_centres(self, means: Tensor, momentum: float = 0.9) -> None:
        """Follow the teacher's outputs, so that no prototype takes all."""
        self.centres.lerp_(means, 1 - momentum)


def distillation(
    by_crop: Tensor, by_patch: Tensor, crop_targets: Tensor, patch_targets: Tensor, centres: Tensor
) -> Tensor:
    """Cross-entropies: of every crop with the other large ones, and of the hidden patches."""

    def soften(targets: Tensor, centre: Tensor) -> Tensor:
        return ((targets.float() - centre) / TEACHER_TEMPERATURE).softmax(-1)

    def log(outputs: Tensor) -> Tensor:
        return (outputs.float() / STUDENT_TEMPERATURE).log_softmax(-1)

    views = log(by_crop).unflatten(0, (NUM_LARGE + NUM_SMALL, -1))  # (6, B, prototypes)
    wanted = soften(crop_targets, centres[0]).unflatten(0, (NUM_LARGE, -1))  # (2, B, prototypes)
    pairs = -torch.einsum("vbk,tbk->vtb", views, wanted).mean(2)  # (6, 2)
    others = 1 - torch.eye(NUM_LARGE + NUM_SMALL, NUM_LARGE, device=pairs.device)
    dino = (pairs * others).sum() / others.sum()
    ibot = -(log(by_patch) * soften(patch_targets, centres[1])).sum(-1).mean()
    return dino + ibot


def main() -> None:
    given = training.options(__doc__)
    torch.manual_seed(given.seed)
    model = DINOv2().to(given.device)

    def loss_of(generator: torch.Generator) -> Tensor:
        images = generated.images(given.batch, 2 * LARGE, generator).to(given.device)
        masking = draw_masking(given.batch, generator).to(given.device)
        loss, means = model(*draw_crops(images, generator), masking)
        model.move_centres(means)
        return loss

    training.train(given, model, loss_of, teacher=model.teacher, averaged=model.student)


if __name__ == "__main__":
    main()

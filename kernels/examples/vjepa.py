"""V-JEPA: predict the features of hidden parts of a clip (Bardes et al. 2024, section 3).

    python kernels/examples/vjepa.py

Patches are tubelets of two frames. What is hidden is hidden in all frames; every clip keeps its own
number of tokens, packed end to end. A predictor gets the context's tokens and mask tokens, and is
held by L1 to the teacher's LayerNorm-ed features, the teacher being the encoder's moving average.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import generated
import torch
import training
from masked_vit_kernels import (
    Packing,
    PredictorPacking,
    assemble_predictor_tokens,
    gather_tokens,
    latent_prediction_loss,
    pack_lengths,
    pack_predictor,
)
from packed_vit import Blocks, Patches
from torch import Tensor, nn

SIZE, FRAMES, PATCH, TUBELET = 32, 8, 8, 2
SIDE, TIMES, WIDTH, PREDICTOR_WIDTH = SIZE // PATCH, FRAMES // TUBELET, 96, 64
NUM_TOKENS = TIMES * SIDE * SIDE


@dataclass(frozen=True)
class Masking:
    """Token ids of context and targets, clip after clip, how they are packed, and for each target
    its row b * N + token among the teacher's features."""

    context: Tensor
    targets: Tensor
    target_rows: Tensor
    context_packing: Packing
    predictor_packing: PredictorPacking
    whole: Packing

    def to(self, device: str) -> Masking:
        """The same on a device."""
        return Masking(**{name: value.to(device) for name, value in vars(self).items()})


def draw_masking(
    batch: int, generator: torch.Generator, hidden: tuple[int, int] = (6, 11)
) -> Masking:
    """Some of the places, `hidden` at least and at most, in all frames."""
    context, targets, rows = [], [], []
    times = torch.arange(TIMES)[:, None] * SIDE * SIDE
    for clip in range(batch):
        places = torch.randperm(SIDE * SIDE, generator=generator)
        count = int(torch.randint(hidden[0], hidden[1] + 1, (), generator=generator))
        chosen, rest = (
            (times + some.sort().values).flatten() for some in (places[:count], places[count:])
        )
        context.append(rest)
        targets.append(chosen)
        rows.append(chosen + clip * NUM_TOKENS)
    packings = [pack_lengths([len(ids) for ids in side]) for side in (context, targets)]
    return Masking(
        *(torch.cat(ids) for ids in (context, targets, rows)),
        packings[0],
        pack_predictor(*packings),
        pack_lengths([NUM_TOKENS] * batch),
    )


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = Patches(3, (TUBELET, PATCH, PATCH), NUM_TOKENS, WIDTH)
        self.blocks = Blocks(WIDTH, depth=4, heads=4)


class VJEPA(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = Encoder()
        self.teacher = copy.deepcopy(self.encoder).requires_grad_(False)
        self.to_predictor = nn.Linear(WIDTH, PREDICTOR_WIDTH)
        self.mask_token = nn.Parameter(torch.randn(PREDICTOR_WIDTH) * 0.02)
        self.positions = nn.Parameter(torch.randn(NUM_TOKENS, PREDICTOR_WIDTH) * 0.02)
        self.predictor = Blocks(PREDICTOR_WIDTH, depth=2, heads=4)
        self.predict = nn.Linear(PREDICTOR_WIDTH, WIDTH)

    def forward(self, clips: Tensor, masking: Masking) -> Tensor:
        """L1 of the hidden tokens' features."""
        encoder, packing = self.encoder, masking.predictor_packing
        x = encoder.patches(clips, masking.context, masking.context_packing)  # (T, D)
        x = self.to_predictor(encoder.blocks(x, masking.context_packing))
        x = assemble_predictor_tokens(
            x, self.mask_token, self.positions, masking.context, masking.targets, packing
        )
        x = gather_tokens(self.predictor(x, packing), packing.target_rows)
        with torch.no_grad():
            targets = self.teacher.patches(clips)  # (B, N, D)
            targets = self.teacher.blocks(targets.flatten(0, 1), masking.whole)
        return latent_prediction_loss(self.predict(x), targets, masking.target_rows, kind="l1")


def main() -> None:
    given = training.options(__doc__)
    torch.manual_seed(given.seed)
    model = VJEPA().to(given.device)

    def loss_of(generator: torch.Generator) -> Tensor:
        clips = generated.clips(given.batch, FRAMES, SIZE, generator).to(given.device)
        return model(clips, draw_masking(given.batch, generator).to(given.device))

    training.train(given, model, loss_of, teacher=model.teacher, averaged=model.encoder)


if __name__ == "__main__":
    main()

"""Networks that may be proposed, from the smallest up, and what each wants to be worth its cost.

`images` and `seen` are rules of thumb: the smallest network is the demo's, which learned in 102,400
images seen of 12,000; ViT-B to ViT-H lie below what the paper gave them (600 and 300 passes over
1.28 million). What lies between was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """A network and how it is trained.

    Attributes:
        label: for people.
        width, depth, heads: of the encoders.
        predictor_width, predictor_depth, predictor_heads: of the predictor.
        grid: patches along a side, about.
        side: longest image side it is given.
        batch: images a step.
        peak_lr: at that batch.
        narrow: whether it takes what narrow networks need: fan-in weights, targets standardised
            over an image's patches, little weight decay.
        images: fewest images of a set that are worth it.
        seen: fewest images seen in a run, repetitions counted, that are.
    """

    label: str
    width: int
    depth: int
    heads: int
    predictor_width: int
    predictor_depth: int
    predictor_heads: int
    grid: int
    side: int
    batch: int
    peak_lr: float
    narrow: bool
    images: int
    seen: float

    def __str__(self) -> str:
        return f"{self.label} ({self.width} wide, {self.depth} deep)"


SIZES = (
    Size("the demo's network", 96, 4, 4, 48, 2, 2, 8, 64, 16, 1e-3, True, 1, 0),
    Size("a small ViT", 192, 8, 6, 96, 4, 4, 8, 64, 64, 1e-3, True, 5_000, 5e5),
    Size("ViT-S", 384, 12, 6, 192, 6, 6, 14, 112, 256, 1e-3, True, 20_000, 5e6),
    Size("ViT-B", 768, 12, 12, 384, 6, 12, 14, 224, 1024, 7e-4, False, 200_000, 6e7),
    Size("ViT-L", 1024, 24, 16, 384, 12, 16, 14, 224, 1024, 7e-4, False, 1_000_000, 2e8),
    Size("ViT-H", 1280, 32, 16, 384, 12, 16, 16, 224, 1024, 7e-4, False, 1_000_000, 3e8),
)

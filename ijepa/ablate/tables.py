"""The paper's ablations, Tables 6 to 14: which settings differ in their rows, and what it found.

Its figures are of ImageNet at 1 % of the labels, of ViT-B/16 to H/16 after 300 to 800 epochs. Runs
here are small ones on rendered shapes: what is compared is the order of the rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Variant:
    """A row of a table.

    Attributes:
        name: in words.
        settings: by dotted name, on top of the base.
        paper: accuracy in percent, None in a grid of one's own.
    """

    name: str
    settings: Mapping[str, Any]
    paper: float | None = None


@dataclass(frozen=True)
class Comparison:
    """Variants and what they are about.

    Attributes:
        name: of its folder.
        title: in words.
        variants: its rows.
        common: settings of all rows.
        protocol: what the paper measured, and on what; "" in a grid of one's own.
    """

    name: str
    title: str
    variants: tuple[Variant, ...]
    common: Mapping[str, Any] = field(default_factory=dict)
    protocol: str = ""


_LOW_SHOT = "linear probe on ImageNet-1K with 1 % of the labels"


def _multiblock(settings: Mapping[str, Any], paper: float, name: str) -> Variant:
    return Variant(name, {"masks.strategy": "multiblock", **settings}, paper)


def _scales(key: str, rows: tuple[tuple[float, float, float], ...]) -> tuple[Variant, ...]:
    return tuple(
        _multiblock({key: (low, high)}, paper, f"({low:g}, {high:g})") for low, high, paper in rows
    )


TABLES: dict[int, Comparison] = {
    6: Comparison(
        "table-6",
        "mask strategies",
        (
            _multiblock({}, 54.2, "multi-block"),
            Variant("rasterized", {"masks.strategy": "rasterized"}, 15.5),
            Variant("block", {"masks.strategy": "block", "masks.target_share": 0.6}, 20.2),
            Variant("random", {"masks.strategy": "random", "masks.target_share": 0.6}, 17.6),
        ),
        protocol=f"{_LOW_SHOT}; ViT-B/16, 300 epochs",
    ),
    7: Comparison(
        "table-7",
        "targets",
        (
            Variant("target encoder's output", {"model.target": "representation"}, 66.9),
            Variant("pixels", {"model.target": "pixels"}, 40.7),
        ),
        protocol=f"{_LOW_SHOT}; ViT-L/16, 500 epochs, pixels 800",
    ),
    8: Comparison(
        "table-8",
        "scale of the target blocks",
        _scales(
            "masks.target_scale",
            (
                (0.075, 0.2, 19.2),
                (0.1, 0.2, 39.2),
                (0.125, 0.2, 42.4),
                (0.15, 0.2, 54.2),
                (0.2, 0.25, 38.9),
                (0.2, 0.3, 33.6),
            ),
        ),
        protocol=f"{_LOW_SHOT}; ViT-B/16, 300 epochs",
    ),
    9: Comparison(
        "table-9",
        "scale of the context",
        _scales(
            "masks.context_scale",
            ((0.4, 1.0, 31.2), (0.65, 1.0, 47.1), (0.75, 1.0, 49.3), (0.85, 1.0, 54.2)),
        ),
        protocol=f"{_LOW_SHOT}; ViT-B/16, 300 epochs",
    ),
    10: Comparison(
        "table-10",
        "number of target blocks",
        tuple(
            _multiblock({"masks.num_targets": count}, paper, str(count))
            for count, paper in ((1, 9.0), (2, 22.0), (3, 48.5), (4, 54.2))
        ),
        protocol=f"{_LOW_SHOT}; ViT-B/16, 300 epochs",
    ),
    11: Comparison(
        "table-11",
        "where targets are masked",
        (
            Variant("output", {"model.target_masking": "output"}, 67.3),
            Variant("input", {"model.target_masking": "input"}, 56.1),
        ),
        # Where the input is masked there is no feature of every patch to standardise over.
        {"model.target_norm": "layer"},
        f"{_LOW_SHOT}; ViT-H/16, 300 epochs",
    ),
    12: Comparison(
        "table-12",
        "depth of the predictor (6 and 12 at ViT-L/16; here half and all of the base's)",
        (
            Variant("half", {"model.predictor_depth": 1}, 64.0),
            Variant("whole", {"model.predictor_depth": 2}, 66.9),
        ),
        protocol=f"{_LOW_SHOT}; ViT-L/16, 500 epochs",
    ),
    13: Comparison(
        "table-13",
        "weight decay",
        (
            Variant(
                ".04 to .4",
                {
                    "schedule.weight_decay": 0.04,
                    "schedule.final_weight_decay": 0.4,
                    "schedule.weight_decay_shape": "linear",
                },
                77.8,
            ),
            Variant(
                ".05", {"schedule.weight_decay": 0.05, "schedule.final_weight_decay": 0.05}, 76.4
            ),
        ),
        protocol="linear probe on ImageNet-1K (fine-tuned on 1 %: 69.4 and 70.7); ViT-L/16, 600 "
        "epochs",
    ),
    14: Comparison(
        "table-14",
        "width of the predictor (384 and 1024 at width 1024; here half and all of the base's)",
        (
            Variant("narrow", {"model.predictor_width": 48}, 70.7),
            Variant("as the encoder", {"model.predictor_width": 96}, 68.4),
        ),
        protocol="fine-tuning on ImageNet-1K with 1 % of the labels; ViT-L/16, 600 epochs",
    ),
}

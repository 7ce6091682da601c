"""`ijepa report` and `ijepa visualize` on the command line."""

from __future__ import annotations

from typing import TypeVar

import tyro

from ijepa.downstream.seeing.options import (
    AttentionOptions,
    LookOptions,
    MasksOptions,
    PcaOptions,
    PictureNeighboursOptions,
    PredictorOptions,
    RcdmSampleOptions,
    RcdmTrainOptions,
    ReportOptions,
)
from ijepa.recipes import check_known

Options = TypeVar("Options")
VISUALIZE_USAGE = """\
ijepa visualize WHAT SOURCE [options]: pictures of what was learned, as PNG files

  masks        packed beside truncated masks, and how often each patch is covered
  pca          patch features as colours, several checkpoints side by side
  attention    where a patch looks, head by head
  neighbours   the nearest images to random ones
  predictor    where the predicted features of a block match, in the image and in another
  rcdm train   a diffusion model that decodes pooled representations (extra rcdm)
  rcdm sample  its samples: what they share is in the representation, what varies is not

SOURCE is a run's folder, one of its checkpoints, or a released .pth.tar.
Options of each: ijepa visualize WHAT --help
"""
_PICTURES: dict[str, type[LookOptions]] = {
    "masks": MasksOptions,
    "pca": PcaOptions,
    "attention": AttentionOptions,
    "neighbours": PictureNeighboursOptions,
    "predictor": PredictorOptions,
}


def report_command(arguments: list[str]) -> int:
    """`ijepa report RUN...`."""
    options = _parsed(ReportOptions, "report", arguments)
    from ijepa.downstream.seeing.report import write_page

    write_page(options)
    return 0


def visualize_command(arguments: list[str]) -> int:
    """`ijepa visualize masks | pca | attention | neighbours | predictor SOURCE`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(VISUALIZE_USAGE, end="")
        return 0
    what, *rest = arguments
    check_known([what], [*_PICTURES, "rcdm"], "unknown picture")
    if what == "rcdm":
        return _rcdm(rest)
    options = _parsed(_PICTURES[what], f"visualize {what}", rest)
    from ijepa.downstream.seeing.look import look

    look(options)
    return 0


def _rcdm(arguments: list[str]) -> int:
    """`ijepa visualize rcdm train | sample`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(VISUALIZE_USAGE, end="")
        return 0
    what, *rest = arguments
    check_known([what], ["train", "sample"], "unknown verb of rcdm")
    if what == "train":
        training = _parsed(RcdmTrainOptions, "visualize rcdm train", rest)
        from ijepa.downstream.seeing.rcdm import train_decoder

        train_decoder(training)
    else:
        sampling = _parsed(RcdmSampleOptions, "visualize rcdm sample", rest)
        from ijepa.downstream.seeing.rcdm import sample_decoder

        sample_decoder(sampling)
    return 0


def _parsed(kind: type[Options], command: str, arguments: list[str]) -> Options:
    return tyro.cli(kind, args=arguments, prog=f"ijepa {command}")

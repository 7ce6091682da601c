"""Copies of batches to the device, beside the computation of the step before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ijepa.masks.batch import MaskBatch
from ijepa.masks.layout import tensors_of


def copied_beside(
    batches: Iterable[tuple[Tensor, MaskBatch]], device: torch.device
) -> Iterator[tuple[Tensor, MaskBatch]]:
    """Images and masks on `device`, copied on a stream of their own.

    The host runs ahead of the device, so a batch from pinned memory travels while the step before
    is still being computed.
    """
    if device.type != "cuda":
        for images, masks in batches:
            yield images.to(device), masks.to(device)
        return
    copies = torch.cuda.Stream(device)
    for images, masks in batches:
        with torch.cuda.stream(copies):
            images, masks = images.to(device, non_blocking=True), masks.to(device)
        compute = torch.cuda.current_stream(device)
        compute.wait_stream(copies)
        for tensor in (images, *tensors_of(masks)):
            tensor.record_stream(compute)  # not to be reused by the next copy while in use
        yield images, masks

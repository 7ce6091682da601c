"""An encoder as an ONNX file, for programs that only run it.

Input `images` (batch, C, H, W) uint8, as decoded; output `features` (batch, N, D) float32, through
the final LayerNorm: what `PretrainedEncoder.embed(images, pool=None)` returns. Pixels are
normalised inside. The batch is any, the size is that of the training.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ijepa.config import ModelConfig
from ijepa.disk import written_aside
from ijepa.vit import LAYER_NORM_EPS

_OPSET = 20  # the first with an exact GELU


class DenseEncoder(nn.Module):
    """The encoder in plain PyTorch on whole images: nothing that an exporter does not know."""

    def __init__(self, config: ModelConfig, state: dict[str, Tensor]):
        super().__init__()
        self.config = config
        for name, tensor in state.items():
            self.register_buffer(name.replace(".", "__"), tensor.float().clone())
        for name in ("image_mean", "image_std"):
            self.register_buffer(name, torch.tensor(getattr(config, name)).view(-1, 1, 1))

    def _of(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of a layer."""
        at = name.replace(".", "__")
        return self.get_buffer(f"{at}__weight"), self.get_buffer(f"{at}__bias")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (self.config.width,), *self._of(name), LAYER_NORM_EPS)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) uint8 -> (B, N, D)."""
        pixels = (images.float() / 255 - self.get_buffer("image_mean")) / self.get_buffer(
            "image_std"
        )
        patches = F.conv2d(pixels, *self._of("patch_embed.proj"), stride=self.config.patch_size)
        x = patches.flatten(2).transpose(1, 2) + self.get_buffer("pos_embed")  # (B, N, D)
        heads = self.config.heads
        for block in range(self.config.depth):
            at = f"blocks.{block}"
            qkv = F.linear(self._norm(x, f"{at}.norm1"), *self._of(f"{at}.attn.qkv"))
            q, k, v = (
                part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2)
            )  # (B, H, N, D / H) each
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + F.linear(mixed, *self._of(f"{at}.attn.proj"))
            hidden = F.gelu(F.linear(self._norm(x, f"{at}.norm2"), *self._of(f"{at}.mlp.fc1")))
            x = x + F.linear(hidden, *self._of(f"{at}.mlp.fc2"))
        return self._norm(x, "norm")


def write_onnx(path: Path, config: ModelConfig, state: dict[str, Tensor]) -> None:
    """Export, check and write the encoder.

    Raises:
        ImportError: the exporter's packages are not installed.
        ValueError: an encoder of over 2 GB, which one file of ONNX cannot hold.
    """
    missing = [n for n in ("onnx", "onnxscript") if importlib.util.find_spec(n) is None]
    if missing:
        raise ImportError(
            f"ONNX files need {' and '.join(missing)}: pip install 'ijepa[interop]' (or "
            f"{' '.join(missing)})"
        )
    if sum(tensor.numel() * 4 for tensor in state.values()) >= 2**31:
        raise ValueError(
            "an ONNX file holds at most 2 GB, and this encoder's weights in float32 are more: "
            "convert to transformers and export it there with external data"
        )
    encoder = DenseEncoder(config, state).eval()
    images = torch.zeros(2, config.channels, *config.image_size, dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1)
    exported = torch.onnx.export(
        encoder, (images,), dynamo=True, opset_version=_OPSET, input_names=["images"],
        output_names=["features"], dynamic_shapes={"images": {0: batch}}, verbose=False,
        external_data=False,
    )  # fmt: skip
    assert exported is not None
    with written_aside(path) as aside:
        exported.save(aside, external_data=False)

"""Training a decoder: AdamW at 1e-4 without decay, a moving average of the weights, checkpoints.

    OUT/decoder.safetensors    weights, their average, optimiser, random state; in its header step,
                               preset, and what the representations are of

It is written aside and renamed. A run that is started again goes on from it, with the images that
the loader gives from that step on, bit by bit on the CPU.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ijepa.disk import written_aside
from ijepa.visualize.rcdm.decoder import Decoder
from ijepa.visualize.rcdm.diffusion import STEPS, Diffusion
from ijepa.visualize.rcdm.presets import Preset

LEARNING_RATE, EMA_DECAY = 1e-4, 0.9999
FILE_NAME = "decoder.safetensors"
_FORMAT, _HEADER = "ijepa-rcdm-decoder", "decoder"


@dataclass
class DecoderTrainer:
    """A decoder in training, on the device of its weights.

    Args:
        decoder: the network.
        about: JSON values that say what the representations are of; a run that goes on must have
            the same.
        seed: of steps and noise.
        learning_rate: of AdamW.

    Attributes:
        step: steps taken.
        average: name -> moving average of each weight. Its decay is at most .9999, and less in the
            beginning, (1 + step) / (10 + step): the average forgets the untrained network.
    """

    decoder: Decoder
    about: dict[str, Any]
    seed: int = 0
    learning_rate: float = LEARNING_RATE

    def __post_init__(self) -> None:
        self.step = 0
        self._diffusion = Diffusion()
        self._optimizer = torch.optim.AdamW(
            self.decoder.parameters(), lr=self.learning_rate, weight_decay=0.0
        )
        self._generator = torch.Generator().manual_seed(self.seed)
        self.average = {
            name: parameter.detach().clone() for name, parameter in self.decoder.named_parameters()
        }

    def train_step(self, images: Tensor, representations: Tensor) -> float:
        """Learn from a batch.

        Args:
            images: (B, C, H, W) uint8, of the preset's size.
            representations: (B, width), of the same images.

        Returns:
            The loss.

        Raises:
            FloatingPointError: it is not finite; nothing was changed.
        """
        device = representations.device
        scaled = images.to(device).float() / 127.5 - 1
        steps = torch.randint(0, STEPS, (len(scaled),), generator=self._generator).to(device)
        noise = torch.randn(scaled.shape, generator=self._generator).to(device)
        loss = self._diffusion.loss(self.decoder, scaled, representations, steps, noise)
        value = loss.item()
        if not loss.isfinite():
            raise FloatingPointError(f"the decoder's loss is {value} at step {self.step + 1}")
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        self.step += 1
        decay = min(EMA_DECAY, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            parameters = dict(self.decoder.named_parameters())
            torch._foreach_lerp_(
                list(self.average.values()), [parameters[n] for n in self.average], 1 - decay
            )
        return value

    def train(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        folder: Path,
        save_every: int,
        told: Callable[[int, float], None],
        stop: Callable[[], bool],
    ) -> None:
        """Learn from all batches, saving now and then and at the end; `stop` ends it early."""
        self.decoder.train()
        for images, representations in batches:
            told(self.step + 1, self.train_step(images, representations))
            if self.step % save_every == 0 or stop():
                self.save(folder)
            if stop():
                return
        self.save(folder)

    def save(self, folder: Path) -> None:
        """Write the file.

        Raises:
            NotWritten: no room; the old one is as it was.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"decoder.{name}": t for name, t in self.decoder.state_dict().items()}
        tensors |= {f"average.{name}": t for name, t in self.average.items()}
        for number, state in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": t for name, t in state.items()}
        tensors["generator"] = self._generator.get_state()
        stored = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        described = {
            "format": _FORMAT,
            "step": self.step,
            "preset": dataclasses.asdict(self.decoder.preset),
            "width": self.decoder.width,
            "channels": self.decoder.channels,
            "about": self.about,
        }
        with written_aside(folder / FILE_NAME) as path:
            save_file(stored, path, metadata={_HEADER: json.dumps(described)})

    def go_on(self, folder: Path) -> None:
        """Take up what `save` wrote.

        Raises:
            ValueError: it is damaged, or of other representations or sizes.
        """
        described, tensors = _read(folder)
        mine = {**self.about, "preset": dataclasses.asdict(self.decoder.preset)}
        theirs = {**described["about"], "preset": described["preset"]}
        for key, value in json.loads(json.dumps(mine)).items():  # as lists, not tuples
            if theirs.get(key) != value:
                raise ValueError(
                    f"{folder} holds a decoder of {key} {theirs.get(key)}, not {value}: choose "
                    "another --out"
                )
        self.decoder.load_state_dict(_part(tensors, "decoder."))
        for name, tensor in _part(tensors, "average.").items():
            self.average[name].copy_(tensor)
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _part(tensors, "optimizer.").items():
            number, _, key = name.partition(".")
            state.setdefault(int(number), {})[key] = tensor
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})
        self._generator.set_state(tensors["generator"])
        self.step = int(described["step"])


def holds_decoder(folder: Path) -> bool:
    """Whether there is a decoder to go on with or to sample from."""
    return (folder / FILE_NAME).exists()


def load_decoder(folder: Path) -> tuple[Decoder, dict[str, Any]]:
    """The averaged decoder, in evaluation mode, and what is written about it ("step", "about").

    Raises:
        FileNotFoundError: none there.
        ValueError: it is damaged.
        ModuleNotFoundError: diffusers is not installed.
    """
    described, tensors = _read(folder)
    sizes: dict[str, Any] = described["preset"]
    for name in ("multipliers", "attention"):
        sizes[name] = tuple(sizes[name])
    preset = Preset(**sizes)
    decoder = Decoder(preset, int(described["width"]), int(described["channels"]))
    state = _part(tensors, "decoder.") | _part(tensors, "average.")
    try:
        decoder.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{folder}: the weights do not fit their sizes: {error}") from None
    return decoder.eval().requires_grad_(False), described


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors."""
    if not holds_decoder(folder):
        raise FileNotFoundError(
            f"{folder} holds no decoder: train one with ijepa visualize rcdm train"
        )
    try:
        with safe_open(folder / FILE_NAME, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER, "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        described = json.loads(header)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder / FILE_NAME} is damaged: {error}") from None
    needed = {"format", "step", "preset", "width", "channels", "about"}
    if not isinstance(described, dict) or not needed <= set(described):
        raise ValueError(f"{folder / FILE_NAME} is no decoder's")
    if described["format"] != _FORMAT:
        raise ValueError(f"{folder / FILE_NAME} has format {described['format']!r}, not {_FORMAT}")
    return described, tensors


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}

"""Checkpoints: written whole or not at all, and refused by name where something is wrong.

    RUN/checkpoints/step-00000500/
        weights.safetensors     context_encoder.*, target_encoder.*, predictor.*, released names
        trainer.safetensors     optimiser and counters, random states
        checkpoint.json         step, settings, versions, sizes and SHA-256 of the files
    RUN/checkpoints/latest      the newest one's name
    RUN/checkpoints/best/       the weights alone that scored best on the way

A checkpoint is written into a folder aside, every file and the folder are fsynced, and one rename
puts it in place; `latest` is replaced likewise. A process killed at any moment leaves the last
complete checkpoint as it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ijepa.disk import NotWritten, not_written, require_space, sync, write_whole
from ijepa.machine import hardware
from ijepa.versions import versions

FORMAT = "ijepa-checkpoint"
FORMAT_VERSION = 1
KEPT = 2  # checkpoints of a run
WEIGHTS, STATE, METADATA, LATEST, BEST = (
    "weights.safetensors",
    "trainer.safetensors",
    "checkpoint.json",
    "latest",
    "best",
)


class CheckpointError(ValueError):
    """A checkpoint that is damaged, foreign, or does not belong to this run."""


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Attributes:
        path: the folder.
        step: optimiser steps taken.
        metadata: the JSON object: "config" (all settings, lengths in steps), "data", "versions".
        weights: the three networks' tensors by prefixed released names.
        state: nested dicts and lists of tensors and plain values.
    """

    path: Path
    step: int
    metadata: dict[str, Any]
    weights: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    run_folder: Path,
    step: int,
    weights: dict[str, Tensor],
    state: dict[str, Any],
    metadata: dict[str, Any],
) -> Path:
    """Write `run_folder`/checkpoints/step-<step> atomically and drop all but the newest two.

    Folders of other names, as a copy that somebody keeps, stay.

    Args:
        state: nested dicts and lists of tensors, numbers, strings, booleans and None.
        metadata: JSON values.

    Raises:
        NotWritten: no room, or writing failed; the checkpoints of before are as they were, and
            nothing of this one is left to fill the disk.
    """
    root = run_folder / "checkpoints"
    final = write_checkpoint(root, f"step-{step:08d}", step, weights, state, metadata)
    make_latest(final)
    return final


def make_latest(checkpoint: Path) -> None:
    """A whole checkpoint step-<step> is the run's latest now; all but the newest two go.

    Raises:
        NotWritten: no room to say so.
    """
    root = checkpoint.parent
    try:
        write_whole(root / LATEST, checkpoint.name + "\n")
    except OSError as error:
        raise not_written(checkpoint.name, root, error) from None
    # By when they were written: of a run that goes on from an older checkpoint, those of higher
    # steps are the older ones.
    others = sorted((f for f in checkpoint_folders(root) if f != checkpoint), key=_written)
    for old in [*others[: 1 - KEPT], *root.glob(".step-*.partial")]:
        _remove(old)


def write_checkpoint(
    root: Path,
    name: str,
    step: int,
    weights: dict[str, Tensor],
    state: dict[str, Any],
    metadata: dict[str, Any],
) -> Path:
    """Write `root`/`name` whole, in place of what was there; arguments as for `save_checkpoint`.

    Raises:
        NotWritten: what was there is as it was.
    """
    tensors: dict[str, Tensor] = {}
    tree = flatten(state, "", tensors)
    files = {WEIGHTS: _savable(weights), STATE: _savable(tensors)}
    folder = CheckpointFolder(root / name)
    folder.begin(bytes_needed(weights) + bytes_needed(tensors))
    try:
        for file, content in files.items():
            save_file(content, folder.aside / file)
        folder.seal(step, metadata, tree)
    except (OSError, SafetensorError) as error:
        raise folder.given_up(error) from None
    return folder.path


class CheckpointFolder:
    """The folder of a checkpoint that is being written.

    Attributes:
        path: where it will be.
        aside: where it is until it is whole.
    """

    def __init__(self, path: Path):
        self._root, self.path = path.parent, path
        self.aside = self._root / f".{path.name}.partial"

    def begin(self, needed: int) -> None:
        """Make `aside`; what a killed process left of others goes away.

        Args:
            needed: bytes.

        Raises:
            NotWritten: no room.
        """
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            for leftover in self._root.glob(".*.partial"):
                _remove(leftover)
            require_space(self.path.name, self._root, needed)
            self.aside.mkdir()
        except OSError as error:
            raise self.given_up(error) from None

    def given_up(self, error: BaseException) -> NotWritten:
        """Leave nothing that would fill the disk; the error to raise."""
        shutil.rmtree(self.aside, ignore_errors=True)
        return not_written(self.path.name, self._root, error)

    def seal(self, step: int, metadata: dict[str, Any], tree: Any) -> None:
        """Describe the files in `aside` and put it into its place, for what was there."""
        root, final, aside = self._root, self.path, self.aside
        _describe(aside, step, metadata, tree)
        for name in (WEIGHTS, STATE):
            sync(aside / name)
        sync(aside)
        if final.exists():  # a run resumed from an older checkpoint comes by again
            final.rename(root / f".{final.name}.replaced.partial")
        aside.rename(final)
        sync(root)
        for old in root.glob(f".{final.name}.*.partial"):
            _remove(old)


def take_up(checkpoint: Path) -> None:
    """Make the checkpoint that a run goes on from its newest, whatever its step: if the run ends
    before its next save, this is where its log ends too.

    Raises:
        NotWritten: nothing can be written there.
    """
    try:
        os.utime(checkpoint / METADATA)
    except OSError as error:
        raise not_written(METADATA, checkpoint, error) from None
    if checkpoint.parent.name == "checkpoints":
        write_whole(checkpoint.parent / LATEST, checkpoint.name + "\n")


def _written(folder: Path) -> tuple[int, str]:
    """Sorts checkpoints by age; what is no checkpoint is the oldest."""
    try:
        return (folder / METADATA).stat().st_mtime_ns, folder.name
    except OSError:
        return 0, folder.name


def _remove(path: Path) -> None:
    """What cannot go now, as a file that is open on NFS, is tried again at the next save."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def bytes_needed(tensors: dict[str, Tensor]) -> int:
    """Upper bound of what the tensors and their description take on a disk."""
    content = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return content + 1000 * len(tensors) + (1 << 16)


def _describe(folder: Path, step: int, metadata: dict[str, Any], tree: Any) -> None:
    """Write the JSON file that makes the files in `folder` a checkpoint."""
    described = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        "files": {name: _fingerprint(folder / name) for name in (WEIGHTS, STATE)},
        "versions": versions(),
        "machine": hardware(),
        **metadata,
        "state": tree,
    }
    described["checksum"] = _checksum(described)
    write_whole(folder / METADATA, json.dumps(described, indent=1))


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint folder, or the latest one of a run's folder.

    Raises:
        CheckpointError: nothing there, a damaged or foreign file; names it.
    """
    folder = find_checkpoint(Path(path))
    metadata = verify_checkpoint(folder)
    try:
        contents = {name: load_file(folder / name) for name in (WEIGHTS, STATE)}
        state = _unflatten(metadata.pop("state"), contents[STATE])
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder / METADATA} is damaged: what it says of the state ({error!r})"
        ) from None
    return Checkpoint(folder, metadata["step"], metadata, contents[WEIGHTS], state)


def load_weights(path: Path | str) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """Folder, metadata and the three networks' tensors of a checkpoint, without its optimiser.

    Args:
        path: as for `load_checkpoint`.

    Raises:
        CheckpointError: nothing there, a damaged or foreign file; names it.
    """
    folder = find_checkpoint(Path(path))
    metadata = read_metadata(folder)
    try:
        _verify_file(folder / WEIGHTS, metadata["files"][WEIGHTS])
        return folder, metadata, load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} is damaged: {error}") from None


def verify_checkpoint(folder: Path) -> dict[str, Any]:
    """The metadata of a checkpoint's folder, all of whose files are as they were written.

    Raises:
        CheckpointError: one of them is missing, damaged or foreign; names it.
    """
    metadata = read_metadata(folder)
    for name in (WEIGHTS, STATE):
        _verify_file(folder / name, metadata["files"][name])
    return metadata


def read_metadata(folder: Path) -> dict[str, Any]:
    """The JSON object of a checkpoint's folder, intact.

    Raises:
        CheckpointError: it is missing, damaged or foreign.
    """
    try:
        metadata = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} holds no {METADATA}: not a checkpoint") from None
    except ValueError as error:
        raise CheckpointError(f"{folder / METADATA} is damaged: {error}") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError(f"{folder / METADATA} is foreign: not written by ijepa")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / METADATA} has format version {metadata.get('format_version')}, "
            f"this program reads {FORMAT_VERSION}"
        )
    if metadata.get("checksum") != _checksum(metadata):
        raise CheckpointError(f"{folder / METADATA} is damaged: its checksum differs")
    _check_entries(folder / METADATA, metadata)
    return metadata


def _check_entries(file: Path, metadata: dict[str, Any]) -> None:
    """Raise CheckpointError where an entry is of another kind than what is written: the checksum
    says only that whoever wrote it knew how."""
    files, seconds = metadata.get("files"), metadata.get("seconds", 0.0)
    data = metadata.get("data", {})
    step, images = metadata.get("step"), data.get("images", 1) if isinstance(data, dict) else None
    fingerprints = [files.get(n) for n in (WEIGHTS, STATE)] if isinstance(files, dict) else [None]
    kinds = {
        "step": type(step) is int and step >= 0,
        "files": all(isinstance(entry, dict) and {"bytes", "sha256"} <= entry.keys()
                     for entry in fingerprints),
        "config": isinstance(metadata.get("config", {}), dict),
        "data": type(images) is int and images > 0,
        "seconds": isinstance(seconds, int | float) and math.isfinite(seconds),
        "state": isinstance(metadata.get("state"), dict),
    }  # fmt: skip
    for name, fits in kinds.items():
        if not fits:
            shown = repr(metadata.get(name))[:80]
            raise CheckpointError(f"{file} is damaged: {name} cannot be {shown}")


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder meant by a run's folder, its checkpoints folder or itself."""
    if (path / METADATA).exists() or path.name.startswith("step-"):
        return path
    root = path if path.name == "checkpoints" else path / "checkpoints"
    if not root.is_dir():
        raise CheckpointError(
            f"{path} holds no checkpoints: give the folder of a run, runs/<recipe>-<number>, "
            "or one of its checkpoints"
        )
    if (root / LATEST).exists():
        name = (root / LATEST).read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"step-\d{1,18}", name):  # a path would lead out of the run
            raise CheckpointError(
                f"{root / LATEST} must name a checkpoint beside it, as step-00000500, "
                f"got {name[:80]!r}"
            )
        if not (root / name).is_dir():
            raise CheckpointError(f"{root / LATEST} names {name}, which is not there")
        return root / name
    complete = checkpoint_folders(root)
    if not complete:
        raise CheckpointError(
            f"{root} holds no complete checkpoint: the run ended before its first one. Start it "
            f"again as before; with --train.output {root.parent} it takes the same folder"
        )
    return complete[-1]


def checkpoint_folders(root: Path) -> list[Path]:
    """The checkpoints in a run's checkpoints folder, by step; none is opened."""
    found = [path for path in root.glob("step-*") if re.fullmatch(r"step-\d{1,18}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def holds_checkpoint(run_folder: Path) -> bool:
    """Whether a run can go on from `run_folder`."""
    return bool(checkpoint_folders(run_folder / "checkpoints"))


def _verify_file(file: Path, expected: dict[str, Any]) -> None:
    """Raise CheckpointError unless size and checksum are as they were written."""
    if not file.exists():
        raise CheckpointError(f"{file} is missing")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise CheckpointError(f"{file} is damaged: {size} bytes, {expected['bytes']} were written")
    if _fingerprint(file) != expected:
        raise CheckpointError(f"{file} is damaged: its checksum differs from the written one")


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {
            "bytes": file.stat().st_size,
            "sha256": hashlib.file_digest(stream, "sha256").hexdigest(),
        }


def _checksum(described: dict[str, Any]) -> str:
    """SHA-256 over the metadata's own JSON, the checksum itself left out."""
    content = {name: value for name, value in described.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _savable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous host copies that share no memory, which safetensors requires."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in tensors.items()}  # fmt: skip


def flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A JSON description of a nested value; its tensors go into `tensors` by their path."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):  # as pairs: optimisers key their state by integers
        return {"dict": [[k, flatten(v, f"{name}/{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        entries = [flatten(entry, f"{name}/{i}", tensors) for i, entry in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": entries}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise TypeError(f"a checkpoint cannot hold {name}: {type(value).__name__}")


def _unflatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _unflatten(value, tensors) for key, value in content}
    if kind == "list":
        return [_unflatten(entry, tensors) for entry in content]
    if kind == "tuple":
        return tuple(_unflatten(entry, tensors) for entry in content)
    return content


def random_states() -> dict[str, Tensor]:
    """State of torch's own generators; data and masks do not draw from them."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Tensor]) -> None:
    """The inverse of `random_states`, as far as this machine has the devices."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])

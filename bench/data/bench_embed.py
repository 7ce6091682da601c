"""Embedding JPEG files beside its two parts alone: the encoder on ready tensors, the decoder.

    python -m bench.data.bench_embed [--images 2000] [--size T] [--threads 2]
        [--kills 10 --source RUN]

All three are measured in one run on the same images, the parts in the middle. With `--kills` the
command is killed at so many random moments and started again, and its files are compared with
those of one that nobody killed. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ijepa.config import VIT_SIZES, ModelConfig
from ijepa.data import folder_source
from ijepa.data.in_order import batches_in_order, without_keys
from ijepa.downstream.embed import Embedding, embed_source
from ijepa.downstream.feature_files import DESCRIPTION, FEATURES, NAMES
from ijepa.evaluate.pretrained import PretrainedEncoder

SIZE = (400, 500)  # height, width of a photograph of ImageNet's kind
BATCH = 64


def write_photographs(folder: Path, count: int) -> None:
    """`count` JPEG files of smooth noise, which compresses about as a photograph does."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = rng.integers(0, 256, (SIZE[0] // 8, SIZE[1] // 8, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize(SIZE[::-1], Image.Resampling.BICUBIC)
        picture.save(folder / f"{number:05d}.jpg", quality=90)


def encoder_alone(encoder: PretrainedEncoder, batches: int) -> float:
    """Images a second on tensors that are there."""
    images = torch.randint(0, 256, (BATCH, 3, 224, 224), dtype=torch.uint8)
    encoder.embed(images)
    started = time.perf_counter()
    for _ in range(batches):
        encoder.embed(images)
    return batches * BATCH / (time.perf_counter() - started)


def decoder_alone(folder: Path, encoder: PretrainedEncoder, workers: int) -> float:
    """Images a second of decoding and cropping, by as many processes as the command takes."""
    source = folder_source(folder, cache_bytes=0)
    asked = without_keys(np.array_split(np.arange(len(source)), -(-len(source) // BATCH)))
    started = time.perf_counter()
    for _ in batches_in_order(source, encoder.transform, asked, workers):
        pass
    return len(source) / (time.perf_counter() - started)


def embedding(folder: Path, encoder: PretrainedEncoder, workers: int) -> float:
    """Images a second of `embed_source` from files to files."""
    source = folder_source(folder, cache_bytes=0)
    with tempfile.TemporaryDirectory() as out:
        settings = Embedding("last", encoder.transform, BATCH, workers=workers)
        done = embed_source(encoder, source, Path(out), settings)
    assert done is not None and done.images_per_second is not None
    return done.images_per_second


def survives_kills(source: str, folder: Path, kills: int, seed: int) -> bool:
    """Whether a command killed so often ends with the bytes of one that was not."""
    work = Path(tempfile.mkdtemp())

    def start(out: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "ijepa.cli", "embed", source, str(folder)]
        return subprocess.Popen([*command, "--out", str(work / out)], stdout=subprocess.DEVNULL)

    began = time.perf_counter()
    assert start("whole").wait() == 0
    seconds = time.perf_counter() - began
    draw = random.Random(seed)
    cut, at = 0, []
    while cut < kills:
        process = start("killed")
        try:
            process.wait(draw.uniform(0.3, 0.5 + 0.9 * seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            cut += 1
        described = work / "killed" / DESCRIPTION
        at.append(json.loads(described.read_text())["done"] if described.exists() else 0)
        if process.returncode == 0:  # it got to the end: begin again for the rest of the kills
            for path in (work / "killed").iterdir():
                path.unlink()
    assert start("killed").wait() == 0
    print(f"images done at each end: {at}", file=sys.stderr)
    names = (FEATURES, NAMES, DESCRIPTION)
    return all(filecmp.cmp(work / "whole" / n, work / "killed" / n, shallow=False) for n in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--size", default="T", choices=sorted(VIT_SIZES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--source", help="of the encoder of the command that is killed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    encoder = PretrainedEncoder(ModelConfig(**VIT_SIZES[options.size]))
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), options.images)
        first = embedding(Path(folder), encoder, options.workers)
        alone = encoder_alone(encoder, max(options.images // BATCH // 2, 2))
        decoded = decoder_alone(Path(folder), encoder, options.workers)
        second = embedding(Path(folder), encoder, options.workers)
        result = {
            "encoder": f"ViT-{options.size}/16",
            "images": options.images,
            "embed": [round(first, 1), round(second, 1)],
            "encoder_alone": round(alone, 1),
            "decoder_alone": round(decoded, 1),
            "share": round(min(first, second) / min(alone, decoded), 3),
            "threads": options.threads,
            "workers": options.workers,
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
        }
        if options.kills:
            result["same_bytes_after_kills"] = survives_kills(
                options.source, Path(folder), options.kills, options.seed
            )
        print(json.dumps(result))


if __name__ == "__main__":
    main()

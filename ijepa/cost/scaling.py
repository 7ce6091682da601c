"""A step on more and more GPUs that share one batch: what computing, sending and memory leave.

What is assumed: the MFU stays what it is on one GPU, whatever the images of a micro-batch, which
flatters small ones; DDP's messages hide behind the last micro-batch's backward pass but for the
last bucket, FSDP2's and HSDP's behind all computing but for the first unit's weights and the last
unit's gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from ijepa.config import Recipe
from ijepa.cost.communication import PARALLEL, Parallel, seconds_to_send, step_traffic
from ijepa.cost.flops import Flops, total_flops
from ijepa.cost.gpus import Gpu
from ijepa.disk import written_aside

GPUS_A_MACHINE = 8
_BUCKET = 25 * 2**20  # bytes of DDP's last bucket
_WORTH_IT = 0.8
_NEAR = 1.02  # a simpler way that is within this of the fastest is taken
_GIB = 2**30


@dataclass(frozen=True)
class Point:
    """A step on so many GPUs.

    Attributes:
        seconds: of a step by way of sharing; None where memory does not suffice.
        bytes_sent: by one GPU, likewise for all.
        memory: bytes that a GPU needs, likewise.
        best: which way; None where none fits.
    """

    gpus: int
    micro_batch: int
    computing: float
    seconds: dict[Parallel, float | None]
    bytes_sent: dict[Parallel, float]
    memory: dict[Parallel, float]
    best: Parallel | None

    def images_per_second(self, batch: int) -> float | None:
        """Of the best way."""
        found = None if self.best is None else self.seconds[self.best]
        return None if found is None else batch / found


@dataclass(frozen=True)
class Networks:
    """What of the networks sending and memory depend on.

    Attributes:
        trained, averaged: parameters.
        blocks: of all three networks.
        state_bytes: of a GPU that holds everything.
        image_bytes: activations of one image.
        largest_unit: parameters of the largest block.
    """

    trained: int
    averaged: int
    blocks: int
    state_bytes: int
    image_bytes: float
    largest_unit: int


def scaling(
    recipe: Recipe,
    networks: Networks,
    flops: dict[str, Flops],
    *,
    gpu: Gpu,
    gpus: int,
    mfu: float,
    room: float,
) -> list[Point]:
    """Points from one GPU to `gpus`, those that can share the batch: powers of two and `gpus`.

    Args:
        room: bytes of a GPU's memory that can be used.
    """
    batch, accumulate = recipe.train.batch_size, recipe.train.accumulate
    counts = sorted({2**k for k in range(gpus.bit_length())} | {gpus})
    return [
        _point(recipe, networks, flops, gpu=gpu, gpus=count, mfu=mfu, room=room)
        for count in counts
        if count <= gpus and batch % (count * accumulate) == 0
    ]


def _point(
    recipe: Recipe,
    networks: Networks,
    flops: dict[str, Flops],
    *,
    gpu: Gpu,
    gpus: int,
    mfu: float,
    room: float,
) -> Point:
    train = recipe.train
    micro_batch = recipe.micro_batch_size(gpus)
    rate = gpu.teraflops * 1e12 * mfu
    images = micro_batch * train.accumulate
    computing = images * total_flops(flops) / rate
    backward = micro_batch * sum(part.total - part.forward for part in flops.values()) / rate
    weight_bytes = 4 if train.precision == "fp32" else 2
    seconds: dict[Parallel, float | None] = {}
    sent: dict[Parallel, float] = {}
    memory: dict[Parallel, float] = {}
    for parallel in PARALLEL:
        if parallel == "hsdp" and gpus <= GPUS_A_MACHINE:
            continue  # one machine: fsdp
        traffic = step_traffic(
            parallel,
            trained=networks.trained,
            averaged=networks.averaged,
            units=networks.blocks + 3,
            weight_bytes=weight_bytes,
            gpus=gpus,
            gpus_a_machine=GPUS_A_MACHINE,
            micro_batches=train.accumulate,
        )
        sending = seconds_to_send(
            traffic, gpu, parallel=parallel, gpus=gpus, gpus_a_machine=GPUS_A_MACHINE
        )
        sent[parallel] = traffic.inside + traffic.between
        ring = GPUS_A_MACHINE if parallel == "hsdp" else gpus
        shards = 1 if parallel == "ddp" else min(gpus, ring)
        gathered = 0 if shards == 1 else 2 * networks.largest_unit * (weight_bytes + 4)
        memory[parallel] = (
            networks.state_bytes / shards + gathered + micro_batch * networks.image_bytes
        )
        if parallel == "ddp":
            last = sending * min(1.0, _BUCKET / (4 * networks.trained))
            step = computing + max(sending - last - backward, 0.0) + last
        else:
            ends = 2 * sending / max(traffic.messages, 1)
            step = max(computing, sending) + ends
        seconds[parallel] = step if memory[parallel] <= room else None
    return Point(gpus, micro_batch, computing, seconds, sent, memory, _best(seconds))


def _best(seconds: dict[Parallel, float | None]) -> Parallel | None:
    """The simplest of those that are about as fast as the fastest."""
    fitting = {parallel: value for parallel, value in seconds.items() if value is not None}
    fastest = min(fitting.values(), default=None)
    if fastest is None:
        return None
    return next(parallel for parallel, value in fitting.items() if value <= _NEAR * fastest)


def render_scaling(recipe: Recipe, gpu: Gpu, points: Sequence[Point]) -> Table:
    """The points as a table for the terminal."""
    table = Table(
        title=f"a step of {recipe.train.batch_size:,} images, "
        f"{GPUS_A_MACHINE} x {gpu.label} a machine",
        caption=f"NVLink {gpu.nvlink:,.0f} GB/s a GPU and direction, network {gpu.network:,.0f}; "
        "ms with sending, - where memory does not suffice; share: of the speed that as many GPUs "
        "would have without it",
    )
    for heading in ("GPUs", "images each", *PARALLEL, "best", "images/s", "share"):
        table.add_column(heading, justify="left" if heading == "best" else "right")
    batch = recipe.train.batch_size
    for point in points:
        rate = point.images_per_second(batch)
        efficiency = ""
        if rate is not None:
            efficiency = f"{rate * point.computing / batch:.0%}"
        table.add_row(
            f"{point.gpus:,}",
            f"{point.micro_batch:,}",
            *(_milliseconds(point.seconds.get(parallel)) for parallel in PARALLEL),
            point.best or "none fits",
            "" if rate is None else f"{rate:,.0f}",
            efficiency,
        )
    return table


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:,.1f}"


def advice(points: Sequence[Point], room: float) -> str:
    """What to set for the last point, and why."""
    point = points[-1]
    if point.best is None:
        least = min(point.memory.values())
        return (
            f"On {point.gpus:,} GPUs nothing fits: {least / _GIB:,.1f} GiB are needed and "
            f"{room / _GIB:,.1f} usable. Take more train.accumulate or "
            "model.activation_checkpointing"
        )
    lost = 1 - _kept(point)
    return (
        f"On {point.gpus:,} GPUs: train.parallel {point.best!r}, "
        f"{point.bytes_sent[point.best] / 1e9:,.2f} GB sent by a GPU each step, "
        f"{lost:.0%} of the step waited for them, {point.memory[point.best] / _GIB:,.1f} GiB a GPU"
        f"{_fewer(points)}"
    )


def _fewer(points: Sequence[Point]) -> str:
    """Where sending takes over, if it does."""
    good = [p for p in points if p.best is not None and _kept(p) >= _WORTH_IT]
    if not good or good[-1] is points[-1]:
        return ""
    return (
        f". Up to {good[-1].gpus:,} GPUs {_WORTH_IT:.0%} of the computing speed are kept; more of "
        "them want a larger train.batch_size"
    )


def _kept(point: Point) -> float:
    """Share of a step that is computing."""
    seconds = None if point.best is None else point.seconds[point.best]
    return 0.0 if seconds is None else point.computing / seconds


def draw_scaling(recipe: Recipe, points: Sequence[Point], path: Path) -> None:
    """Images/s over GPUs, beside what no sending would leave.

    Raises:
        ImportError: matplotlib is not installed.
        NotWritten: no room.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    batch = recipe.train.batch_size
    counts = [point.gpus for point in points]
    axes.plot(counts, [batch / p.computing for p in points], "--", color="grey", label="no sending")
    for parallel in PARALLEL:
        found = [(p.gpus, batch / s) for p in points if (s := p.seconds.get(parallel)) is not None]
        if found:
            axes.plot(*zip(*found, strict=True), marker="o", label=parallel)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_xlabel("GPUs")
    axes.set_ylabel("images/s")
    axes.set_title(f"{recipe.name}, batch {batch:,}")
    axes.legend()
    axes.grid(alpha=0.3)
    with written_aside(path) as aside:
        figure.savefig(aside, dpi=120)

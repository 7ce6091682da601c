"""What ranks send each other in a step, and how long that takes: arithmetic on the recipe.

    ddp    one all-reduce of the trained networks' gradients, float32
    fsdp   each micro-batch: all-gather of every block's weights before its forward pass, of those
           of the trained networks again before its backward pass, reduce-scatter of gradients
    hsdp   the same within a machine; between machines one all-reduce of the gradients' shards

Rings: of n ranks each sends (n - 1) / n of what is gathered or scattered, twice that of what is
reduced to all. A ring over machines crosses each machine's border on all of its GPUs' network
adapters at once, so it runs at the slower of a GPU's NVLink and the machine's whole network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ijepa.cost.gpus import Gpu

Parallel = Literal["ddp", "fsdp", "hsdp"]
PARALLEL: tuple[Parallel, ...] = ("ddp", "fsdp", "hsdp")
GRADIENT_BYTES = 4  # an element on its way, whatever the weights are
_REACHED = 0.8  # of the datasheet's bandwidth
_NVLINK_LATENCY, _NETWORK_LATENCY = 2e-6, 6e-6  # seconds a message, of each step of a ring


@dataclass(frozen=True)
class Traffic:
    """Bytes that one GPU sends in a step.

    Attributes:
        inside: within machines, or around a ring of all where there is one ring.
        between: in the rings between machines.
        messages: collectives, each of which waits for its ring.
    """

    inside: float
    between: float
    messages: int


def ring_share(ranks: int) -> float:
    """Of a gathered or scattered buffer, what one of so many ranks sends."""
    return (ranks - 1) / ranks


def step_traffic(
    parallel: Parallel,
    *,
    trained: int,
    averaged: int,
    units: int,
    weight_bytes: int,
    gpus: int,
    gpus_a_machine: int,
    micro_batches: int,
) -> Traffic:
    """What one GPU sends in a step.

    Args:
        trained: parameters that get gradients.
        averaged: parameters of the target encoder.
        units: of weights that are gathered at once, over the three networks.
        weight_bytes: of an element of the gathered weights.
    """
    gradients = GRADIENT_BYTES * trained
    if gpus == 1:
        return Traffic(0.0, 0.0, 0)
    if parallel == "ddp":
        return Traffic(2 * ring_share(gpus) * gradients, 0.0, 1)
    ring = gpus if parallel == "fsdp" else min(gpus, gpus_a_machine)
    gathered = weight_bytes * (2 * trained + averaged)
    inside = micro_batches * ring_share(ring) * (gathered + gradients)
    machines = 1 if parallel == "fsdp" else -(-gpus // gpus_a_machine)
    between = 2 * ring_share(machines) * gradients / ring
    return Traffic(inside, between, 3 * units * micro_batches)


def seconds_to_send(
    traffic: Traffic, gpu: Gpu, *, parallel: Parallel, gpus: int, gpus_a_machine: int
) -> float:
    """How long a step's messages take where nothing else is done."""
    inside_bandwidth = _REACHED * gpu.nvlink * 1e9
    network = _REACHED * gpu.network * 1e9
    machines = -(-gpus // gpus_a_machine)
    one_machine = machines == 1 or parallel == "hsdp"
    ring = min(gpus, gpus_a_machine) if parallel == "hsdp" else gpus
    if one_machine:
        bandwidth, latency = inside_bandwidth, _NVLINK_LATENCY
    else:
        bandwidth = min(inside_bandwidth, gpus_a_machine * network)
        latency = _NETWORK_LATENCY
    seconds = traffic.inside / bandwidth + traffic.messages * (ring - 1) * latency
    if traffic.between:
        # every GPU's shard travels on its own adapter
        seconds += traffic.between / network + 2 * (machines - 1) * _NETWORK_LATENCY
    return seconds

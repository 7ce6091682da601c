"""GPUs that a recipe can be planned for, as their datasheets have them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Datasheet values: memory in GiB, dense matmul rates in TFLOP/s (float8's None without any),
    and what a GPU sends to others of its machine and over the network in one direction, GB/s.

    The network is what machines of these GPUs are commonly built with: one adapter a GPU, of 400
    Gbit/s beside H100 to B200, 200 beside A100, 100 beside the others, which have no NVLink.
    """

    label: str
    memory: float
    teraflops: float
    float8_teraflops: float | None
    nvlink: float
    network: float


GPUS = {
    "a100": Gpu("A100 80 GB", 80, 312, None, 300, 25),
    "a100-40": Gpu("A100 40 GB", 40, 312, None, 300, 25),
    "h100": Gpu("H100 SXM", 80, 989, 1979, 450, 50),
    "h200": Gpu("H200", 141, 989, 1979, 450, 50),
    "b200": Gpu("B200", 180, 2250, 4500, 900, 50),
    "l40s": Gpu("L40S", 48, 362, 733, 32, 12.5),
    "rtx4090": Gpu("RTX 4090", 24, 165, 330, 32, 12.5),
}


def known_gpu(device_name: str) -> Gpu | None:
    """The entry of `GPUS` for a name as the driver gives it, "NVIDIA H100 80GB HBM3"."""
    name = device_name.lower().replace(" ", "")
    if "a100" in name:
        return GPUS["a100-40" if "40gb" in name else "a100"]
    return next((gpu for key, gpu in GPUS.items() if key in name), None)

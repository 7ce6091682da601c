"""GPUs that a recipe can be planned for, as their datasheets have them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Datasheet values: memory in GiB, dense matmul rates in TFLOP/s, float8's None without any."""

    label: str
    memory: float
    teraflops: float
    float8_teraflops: float | None


GPUS = {
    "a100": Gpu("A100 80 GB", 80, 312, None),
    "a100-40": Gpu("A100 40 GB", 40, 312, None),
    "h100": Gpu("H100 SXM", 80, 989, 1979),
    "h200": Gpu("H200", 141, 989, 1979),
    "b200": Gpu("B200", 180, 2250, 4500),
    "l40s": Gpu("L40S", 48, 362, 733),
    "rtx4090": Gpu("RTX 4090", 24, 165, 330),
}


def known_gpu(device_name: str) -> Gpu | None:
    """The entry of `GPUS` for a name as the driver gives it, "NVIDIA H100 80GB HBM3"."""
    name = device_name.lower().replace(" ", "")
    if "a100" in name:
        return GPUS["a100-40" if "40gb" in name else "a100"]
    return next((gpu for key, gpu in GPUS.items() if key in name), None)

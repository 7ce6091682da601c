"""What this machine is: facts that a result's speed depends on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch


def hardware() -> dict[str, str]:
    """System, processor, cores, memory and GPUs, in words."""
    facts = {
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "processor": _processor(),
        "cores": f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads",
        "memory": _memory(),
    }
    if not torch.cuda.is_available():
        reason = "torch sees no device" if torch.version.cuda else "this torch is built for the CPU"
        return {**facts, "GPU": f"none ({reason})"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = (
            f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:,.0f} GiB, "
            f"{gpu.multi_processor_count} SMs"
        )
    return facts


def _processor() -> str:
    """The processor's name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return "unknown"
    return f"{pages * size / 2**30:,.0f} GiB"

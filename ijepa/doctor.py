"""`ijepa doctor`: what this machine is, which versions run, and where each op runs."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from pathlib import Path

import torch
from masked_vit_kernels.cpu_linear import ONEDNN_DTYPES
from rich.console import Console
from rich.table import Table

from ijepa.versions import installed_versions

_OPS = (
    "embed_visible_patches",
    "gather_tokens",
    "scatter_tokens",
    "varlen_attention",
    "varlen_attention_qkvpacked",
    "varlen_attention_kvpacked",
    "assemble_predictor_tokens",
    "latent_prediction_loss",
    "ema_update_",
    "AdamWEMA",
)


def run_doctor(console: Console) -> None:
    """Print everything."""
    console.print(_two_columns("machine", machine()))
    console.print(_two_columns("versions", installed_versions()))
    table = Table("op", "CPU tensors", "CUDA tensors", title="ops", title_justify="left")
    for name, cpu, cuda in op_table():
        table.add_row(name, cpu, cuda)
    console.print(table)
    if not torch.cuda.is_available():
        console.print(
            "No CUDA device: everything runs in plain PyTorch on the CPU. The kernels are used as "
            "soon as a GPU and a CUDA build of torch are there."
        )


def machine() -> dict[str, str]:
    """Facts about this machine."""
    facts = {
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "python": f"{platform.python_version()} at {sys.executable}",
        "cores": f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads",
        "memory": _memory(),
        "free disk here": f"{shutil.disk_usage(Path.cwd()).free / 2**30:,.0f} GiB",
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


def op_table() -> list[tuple[str, str, str]]:
    """(op, where it runs on CPU tensors, where on CUDA tensors)."""
    rows = [(name, "plain PyTorch", "Triton kernel") for name in _OPS]
    onednn = sorted(str(dtype).removeprefix("torch.") for dtype in ONEDNN_DTYPES)
    products = f"oneDNN for {', '.join(onednn)}" if onednn else "plain PyTorch"
    return [*rows, ("linear", products, "plain PyTorch, no kernel")]


def _two_columns(title: str, facts: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def _memory() -> str:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return "unknown"
    return f"{pages * size / 2**30:,.0f} GiB"

"""`ijepa doctor`: what this machine is, which versions run, and where each op runs."""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

import torch
from masked_vit_kernels.cpu_linear import ONEDNN_DTYPES
from rich.console import Console
from rich.table import Table

from ijepa.machine import hardware
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
    """Facts about this machine and the Python here."""
    return {
        **hardware(),
        "python": f"{platform.python_version()} at {sys.executable}",
        "free disk here": f"{shutil.disk_usage(Path.cwd()).free / 2**30:,.0f} GiB",
    }


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

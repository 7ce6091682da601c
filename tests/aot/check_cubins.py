"""What was built: every cubin within its budget and as its table says, every symbol present."""

from __future__ import annotations

import re
import struct
import subprocess
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from aot_build import ARCHS, BUILD, CUBINS, LIBRARY, MANIFEST
from masked_vit_kernels.audit import resource_usage
from masked_vit_kernels.audit.budgets import BUDGETS
from masked_vit_kernels.launch import SHARED_MEMORY_LIMIT

KPARAM_INFO = 0x17
OPS = {
    "attention_forward", "attention_backward", "invert_rows", "gather_rows", "scatter_rows",
    "scatter_fill_gradient", "sum_rows_by_place", "patch_rows", "embed_visible_patches",
    "add_position", "add_position_backward", "assemble_predictor_tokens",
    "assemble_predictor_tokens_backward", "prediction_loss", "prediction_loss_backward",
    "loss_finish", "ema_update", "adamw_ema_gradient_norm", "adamw_ema_decide", "adamw_ema_update",
}  # fmt: skip


def _cubin(kernel: dict) -> bytes:
    packed = CUBINS[kernel["offset"] : kernel["offset"] + kernel["packed_size"]]
    return zlib.decompress(packed, -zlib.MAX_WBITS)


def test_registers_stack_and_shared_memory_are_within_the_budgets():
    kernels = MANIFEST["kernels"]
    with ThreadPoolExecutor() as pool:
        usages = list(pool.map(lambda kernel: resource_usage(_cubin(kernel)), kernels))
    over = []
    for kernel, (registers, stack) in zip(kernels, usages, strict=True):
        assert kernel["budgets"]
        for budget in (BUDGETS[name] for name in kernel["budgets"]):
            limits = (budget.registers, budget.stack_bytes)
            for value, limit in zip((registers, stack), limits, strict=True):
                if limit is not None and value > limit:
                    over.append((kernel["capability"], kernel["symbol"], registers, stack))
        if kernel["shared"] > SHARED_MEMORY_LIMIT[kernel["capability"]]:
            over.append((kernel["capability"], kernel["symbol"], kernel["shared"]))
    assert over == []


def _sections(elf: bytes):
    table, count, names = (
        struct.unpack_from(fmt, elf, at)[0]
        for fmt, at in (("<Q", 0x28), ("<H", 0x3C), ("<H", 0x3E))
    )
    rows = [struct.unpack_from("<IIQQQQ", elf, table + 64 * i) for i in range(count)]
    start = rows[names][4]
    for name, _, _, _, offset, size in rows:
        end = elf.index(b"\0", start + name)
        yield elf[start + name : end].decode(), offset, size


def _parameter_sizes(elf: bytes, symbol: str) -> dict[int, int]:
    """Bytes of each parameter by its place, as ptxas noted them."""
    found = {}
    for name, offset, size in _sections(elf):
        at, end = offset, offset + size
        while name == f".nv.info.{symbol}" and at < end:
            form, attribute, length = struct.unpack_from("<BBH", elf, at)
            if form == 4 and attribute == KPARAM_INFO:
                _, place, _, flags = struct.unpack_from("<IHHI", elf, at + 4)
                found[place] = flags >> 18
            at += 4 + (length if form == 4 else 0)
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_cubins_take_the_parameters_of_the_tables(arch):
    machine_code = 0
    for kernel in MANIFEST["kernels"]:
        if kernel["capability"] != arch:
            continue
        elf = _cubin(kernel)
        names = {name for name, _, _ in _sections(elf)}
        assert f".text.{kernel['symbol']}" in names
        sizes = _parameter_sizes(elf, kernel["symbol"])
        expected = [{"i32": 4, "fp32": 4}.get(ty, 8) for _, ty, _ in kernel["parameters"]]
        assert [sizes[i] for i in range(len(sizes))] == [*expected, 8, 8], kernel["symbol"]
        machine_code += 1
    assert machine_code > 100


def test_every_op_has_kernels_on_every_architecture():
    found = {(case["op"], case["capability"]) for case in MANIFEST["cases"]}
    assert found == {(op, arch) for op in OPS for arch in ARCHS}
    used = {number for case in MANIFEST["cases"] for number in case["kernels"]}
    assert used == set(range(len(MANIFEST["kernels"])))
    assert LIBRARY.handle.mvk_kernel_count() == len(MANIFEST["kernels"])


def test_the_library_exports_what_the_header_declares_and_nothing_else():
    library = BUILD / "libmasked_vit_kernels.so"
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", library], check=True, capture_output=True, text=True
    ).stdout
    exported = {line.split()[-1] for line in listing.splitlines()}
    assert exported == set(LIBRARY.functions)
    assert len(LIBRARY.functions) == len(set(LIBRARY.functions))


def test_the_library_needs_neither_a_driver_nor_python():
    listing = subprocess.run(
        ["readelf", "-d", BUILD / "libmasked_vit_kernels.so"],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    needed = re.findall(r"NEEDED.*\[(.*?)\]", listing)
    assert all(re.match(r"(libc|libdl|libpthread|ld-linux.*)\.so", name) for name in needed)

"""Write what C reads: the tables of ops, cases, launches and kernels, and the cubins.

    tables.h      numbers of the ops and of the launch code that C needs at compile time
    tables.c      the tables, see src/runtime/table_types.h
    cubins.bin    every cubin, compressed: most of it is the debugger's text; cubins.S embeds it
    manifest.json the same for the tests
"""

from __future__ import annotations

import itertools
import json
import zlib
from pathlib import Path

import torch
from cubins import Entry, Kernel
from masked_vit_kernels import packing
from masked_vit_kernels.attention.forward import LOG2_E
from masked_vit_kernels.attention.tiles import MAX_GRID_Y
from masked_vit_kernels.catalogue.case import Key
from masked_vit_kernels.optimizer import kernels as adamw_ema_kernels
from masked_vit_kernels.optimizer import multi_tensor
from masked_vit_kernels.tokens import prediction_loss_kernels, sum_by_place

# `mvk_dtype` of masked_vit_kernels.h; the generated tables assert that they agree.
DTYPE_CODES = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.uint8: 3,
    torch.int32: 4,
    torch.int64: 5,
}
NO_DTYPE = -1
# The other keys that are words in Python: layouts of rows and kinds of loss.
WORD_CODES = {"every_token": 0, "dense": 1, "packed": 2, "smooth_l1": 0, "l2": 1}

# Keys that are upper bounds: of an op's cases, the first whose bounds hold is meant.
BOUNDS = ("max_seqlen_q", "max_seqlen_k", "max_programs")

PARAMETER_TYPES = {"i32": "MVK_INT32", "i64": "MVK_INT64", "fp32": "MVK_FLOAT"}

# What the public header promises, checked when the library is compiled.
HEADER_CONSTANTS = {
    "MVK_TILE_ROWS": packing.TILE,
    "MVK_WIDE_TILE_ROWS": packing.WIDE_TILE,
    "MVK_TENSOR_TILE": multi_tensor.TILE,
    "MVK_ADAMW_TABLE_COLUMNS": adamw_ema_kernels.TABLE_COLUMNS.value,
    "MVK_ADAMW_COEFFICIENTS": adamw_ema_kernels.COEFFICIENTS.value,
    "MVK_ADAMW_GROUP_VALUES": adamw_ema_kernels.GROUP_VALUES.value,
}
# Numbers of the Python launch code that the C launch code shares.
LAUNCH_CONSTANTS = {
    "MVK_MAX_GRID_Y": MAX_GRID_Y,
    "MVK_MANY_ROWS": sum_by_place.MANY_ROWS,
    "MVK_MOST_LOSS_PROGRAMS": prediction_loss_kernels.MOST_PROGRAMS,
    "MVK_LOG2_E": LOG2_E,
}


def code_of(key: Key) -> int:
    """The number that C knows a key's value by."""
    if key is None:
        return NO_DTYPE
    if isinstance(key, torch.dtype):
        return DTYPE_CODES[key]
    return WORD_CODES[key] if isinstance(key, str) else int(key)


class _Lists:
    """Lists of C initialisers laid end to end, equal ones once; each is (first, count)."""

    def __init__(self) -> None:
        self.items: list[str] = []
        self._seen: dict[tuple[str, ...], int] = {}

    def add(self, items: list[str]) -> str:
        key = tuple(items)
        if key not in self._seen:
            self._seen[key] = len(self.items)
            self.items += items
        return f"{self._seen[key]}, {len(items)}"


def write(entries: list[Entry], out: Path) -> None:
    """Write all files into `out`."""
    kernels = list({id(kernel): kernel for entry in entries for kernel in entry.kernels}.values())
    for kernel in kernels:
        _check(kernel)
    packed = [_pack(kernel.cubin) for kernel in kernels]
    offsets = list(itertools.accumulate(map(len, packed), initial=0))
    ops: dict[str, list[Entry]] = {}
    for entry in entries:
        ops.setdefault(entry.case.op, []).append(entry)

    (out / "cubins.bin").write_bytes(b"".join(packed))
    (out / "cubins.S").write_text(_assembly(out / "cubins.bin"))
    (out / "tables.h").write_text(_header(ops))
    (out / "tables.c").write_text(_tables(ops, kernels, offsets))
    (out / "manifest.json").write_text(json.dumps(_manifest(entries, kernels, offsets)))


def _check(kernel: Kernel) -> None:
    """Raise where a kernel asks for something that the C launch does not give."""
    for name, expected in (
        ("num_ctas", 1), ("launch_pdl", False), ("launch_cooperative_grid", False),
        ("global_scratch_size", 0), ("profile_scratch_size", 0),
    ):  # fmt: skip
        if kernel.metadata[name] != expected:
            raise RuntimeError(f"{kernel.symbol}: {name} is {kernel.metadata[name]}")


def _pack(cubin: bytes) -> bytes:
    """A raw DEFLATE stream, which `src/runtime/inflate.c` reads."""
    compress = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return compress.compress(cubin) + compress.flush()


def _assembly(blob: Path) -> str:
    return f"""\
    .section .rodata
    .globl mvk_cubins
    .hidden mvk_cubins
mvk_cubins:
    .incbin "{blob}"
    .section .note.GNU-stack, "", %progbits
"""


def _header(ops: dict[str, list[Entry]]) -> str:
    names = "".join(f"    MVK_OP_{name},\n" for name in ops)
    numbers = "".join(f"#define {name} {value}\n" for name, value in LAUNCH_CONSTANTS.items())
    return f"enum mvk_op_number {{\n{names}    MVK_NUM_OPS\n}};\n\n{numbers}"


def parameters(kernel: Kernel) -> list[tuple[str, str, bool]]:
    """(name, Triton type, hinted as a multiple of 16) of every argument the cubin takes."""
    src = kernel.specialized.src
    return [
        (name, ty, ["tt.divisibility", 16] in src.attrs.get((place,), []))
        for place, (name, ty) in enumerate(src.signature.items())
        if ty != "constexpr"
    ]


def constants(kernel: Kernel) -> dict[str, object]:
    """Value by name of every argument that is compiled in."""
    src = kernel.specialized.src
    names = list(src.signature)
    return {names[place]: value for (place,), value in src.constants.items()}


def _c_constant(name: str, value: object) -> str:
    if value is None:
        return f'{{"{name}", 0, 0}}'
    if isinstance(value, bool | int):
        return f'{{"{name}", 0, {int(value)}}}'
    return f'{{"{name}", "{value}", 0}}'


def _c_parameter(name: str, ty: str, hinted: bool) -> str:
    kind = "MVK_POINTER" if ty.startswith("*") else PARAMETER_TYPES[ty]
    return f'{{"{name}", {kind}, {int(hinted)}}}'


def _tables(ops: dict[str, list[Entry]], kernels: list[Kernel], offsets: list[int]) -> str:
    parameter_lists, constant_lists = _Lists(), _Lists()
    kernel_rows, numbers = [], {}
    for number, kernel in enumerate(kernels):
        numbers[id(kernel)] = number
        names = parameter_lists.add([_c_parameter(*p) for p in parameters(kernel)])
        values = constant_lists.add([_c_constant(*c) for c in constants(kernel).items()])
        kernel_rows.append(
            f'{{"{kernel.metadata["name"]}", {offsets[number]}u, '
            f"{offsets[number + 1] - offsets[number]}u, {len(kernel.cubin)}u, {names}, {values}, "
            f"{kernel.metadata['num_warps']}, {kernel.metadata['shared']}}}"
        )
    launch_rows: list[str] = []
    case_rows: list[str] = []
    op_rows: list[str] = []
    for name, entries in ops.items():
        keys = list(entries[0].case.keys)
        first_case = len(case_rows)
        for entry in entries:
            if list(entry.case.keys) != keys:
                raise RuntimeError(f"cases of {name} differ in their keys: {entry.case.keys}")
            first = len(launch_rows)
            for launch, kernel in zip(entry.case.launches, entry.kernels, strict=True):
                fixed = [_c_constant(n, launch.arguments[n]) for n in entry.case.fixed]
                launch_rows.append(f"{{{numbers[id(kernel)]}, {constant_lists.add(fixed)}}}")
            values = ", ".join(str(code_of(value)) for value in entry.case.keys.values())
            case_rows.append(
                f"{{{entry.capability}, {first}, {len(entry.case.launches)}, {{{values}}}}}"
            )
        quoted = ", ".join(f'"{key}"' for key in keys)
        bounds = sum(1 << place for place, key in enumerate(keys) if key in BOUNDS)
        op_rows.append(
            f'{{"{name}", {{{quoted}}}, {len(keys)}, {bounds}, {first_case}, {len(entries)}}}'
        )
    return "".join(
        (
            '#include "masked_vit_kernels.h"\n#include "table_types.h"\n\n',
            *(
                f'_Static_assert({name} == {value}, "{name}");\n'
                for name, value in (HEADER_CONSTANTS | _dtype_constants()).items()
            ),
            _array("mvk_parameter", "mvk_parameters", parameter_lists.items),
            _array("mvk_constant", "mvk_constants", constant_lists.items),
            _array("mvk_kernel", "mvk_kernels", kernel_rows),
            _array("mvk_launch", "mvk_launches", launch_rows),
            _array("mvk_case", "mvk_cases", case_rows),
            _array("mvk_op", "mvk_ops", op_rows),
            f"const int mvk_num_kernels = {len(kernel_rows)};\n",
        )
    )


def _dtype_constants() -> dict[str, int]:
    names = {dtype: "MVK_" + str(dtype).removeprefix("torch.").upper() for dtype in DTYPE_CODES}
    return {f"MVK_DTYPE_{names[d].removeprefix('MVK_')}": code for d, code in DTYPE_CODES.items()}


def _array(type_name: str, name: str, initialisers: list[str]) -> str:
    body = "".join(f"    {text},\n" for text in initialisers)
    return f"\nconst struct {type_name} {name}[] = {{\n{body}}};\n"


def _manifest(entries: list[Entry], kernels: list[Kernel], offsets: list[int]) -> dict:
    numbers = {id(kernel): number for number, kernel in enumerate(kernels)}
    return {
        "kernels": [
            {
                "capability": kernel.capability,
                "symbol": kernel.metadata["name"],
                "key": kernel.key,
                "offset": offsets[number],
                "packed_size": offsets[number + 1] - offsets[number],
                "parameters": parameters(kernel),
                "shared": kernel.metadata["shared"],
                "num_warps": kernel.metadata["num_warps"],
                "budgets": sorted(kernel.budgets),
            }
            for number, kernel in enumerate(kernels)
        ],
        "cases": [
            {
                "capability": entry.capability,
                "op": entry.case.op,
                "keys": {name: code_of(value) for name, value in entry.case.keys.items()},
                "kernels": [numbers[id(kernel)] for kernel in entry.kernels],
            }
            for entry in entries
        ],
    }

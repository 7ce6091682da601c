"""The C library from Python, its structs read from the header: nothing is described again."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    torch.float32: "FLOAT32", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16",
    torch.uint8: "UINT8", torch.int32: "INT32", torch.int64: "INT64",
}  # fmt: skip

_SCALARS = {
    "int64_t": ctypes.c_int64,
    "double": ctypes.c_double,
    "mvk_dtype": ctypes.c_int,
    "mvk_loss_kind": ctypes.c_int,
}


class Library:
    """Functions by name without `mvk_`; arguments by keyword, tensors as their addresses."""

    def __init__(self, path: Path, header: Path):
        self.text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.DOTALL)
        self.handle = ctypes.CDLL(str(path))
        self.functions = re.findall(r"MVK_API[^;{]*?\b(mvk_\w+)\(", self.text)
        self.constants = {
            name: int(value) for name, value in re.findall(r"\b(MVK_\w+) = (\d+)", self.text)
        }
        self.structs = self._structs()
        self.handle.mvk_last_error_message.restype = ctypes.c_char_p
        self.handle.mvk_error_string.restype = ctypes.c_char_p
        for name in ("mvk_loss_programs", "mvk_num_tiles", "mvk_patch_row_width",
                     "mvk_tensor_tiles"):  # fmt: skip
            function = getattr(self.handle, name)
            function.restype = ctypes.c_int64
            function.argtypes = [ctypes.c_int64] * (3 if name == "mvk_num_tiles" else 1)
        self.handle.mvk_tensor_tiles.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]

    def _structs(self) -> dict[str, type[ctypes.Structure]]:
        structs: dict[str, type[ctypes.Structure]] = {}
        pattern = r"typedef struct (\w+) \{(.*?)\} \1;"
        for name, body in re.findall(pattern, self.text, flags=re.DOTALL):
            fields = []
            for declaration in filter(None, (d.strip() for d in body.split(";"))):
                kind, names = declaration.removeprefix("const ").split(maxsplit=1)
                for field in names.split(","):
                    pointer, field = "*" in field, field.strip(" *\n")
                    scalar = structs.get(kind) or _SCALARS.get(kind)
                    fields.append((field, ctypes.c_void_p if pointer else scalar))
            structs[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
        return structs

    def struct(self, name: str, **values) -> ctypes.Structure:
        """A zeroed struct with these fields set; an unknown field raises AttributeError."""
        result = self.structs[name]()
        for field, value in values.items():
            if field not in {known[0] for known in self.structs[name]._fields_}:
                raise AttributeError(f"{name} has no field {field}")
            if isinstance(value, Tensor):
                value = value.data_ptr()
            elif isinstance(value, torch.dtype):
                value = self.constants["MVK_DTYPE_" + DTYPES[value]]
            setattr(result, field, value)
        return result

    def call(self, function: str, stream: int | None = 77, **values) -> int:
        """The status of mvk_`function`; the stream None calls a host function."""
        args = self.struct(f"mvk_{function}_args", **values)
        extra = () if stream is None else (ctypes.c_void_p(stream),)
        return getattr(self.handle, f"mvk_{function}")(ctypes.byref(args), *extra)

    def run(self, function: str, **values) -> None:
        """`call`, with any failure raised as RuntimeError."""
        status = self.call(function, **values)
        if status:
            raise RuntimeError(self.message())

    def message(self) -> str:
        return self.handle.mvk_last_error_message().decode()


class _Launch(ctypes.Structure):
    _fields_ = (
        ("symbol", ctypes.c_char * 128), ("cubin_hash", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32), ("stream", ctypes.c_uint64),
        ("num_parameters", ctypes.c_uint32), ("sizes", ctypes.c_uint32 * 64),
        ("values", (ctypes.c_uint8 * 8) * 64),
    )  # fmt: skip


class FakeDriver:
    """`fake_driver.c`: loaded before the library, it is the libcuda.so.1 that the library finds."""

    def __init__(self, path: Path):
        self.handle = ctypes.CDLL(str(path))
        self.handle.fake_launch.restype = ctypes.POINTER(_Launch)

    def reset(self, capability: int) -> None:
        self.handle.fake_reset()
        self.handle.fake_set_capability(*divmod(capability, 10))

    def launches(self) -> list[_Launch]:
        return [
            self.handle.fake_launch(i).contents for i in range(self.handle.fake_num_launches())
        ]


def cubin_hash(cubin: bytes) -> int:
    """What the fake driver calls a cubin: FNV-1a."""
    value = 14695981039346656037
    for byte in cubin:
        value = (value ^ byte) * 1099511628211 & 0xFFFFFFFFFFFFFFFF
    return value

"""Imports run one way: torch, triton <- masked_vit_kernels <- ijepa <- bench, tests.

Every import statement of the tree is read, those inside functions and under TYPE_CHECKING too. A
room is a folder or a file right below a package, and `ROOMS` says which rooms it may import. A new
room, or a new arrow between two, has to be entered here.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FACE = "__init__"  # the room of a package's own exports

# package -> its folder, and the packages from outside that it may import
PACKAGES = {
    "masked_vit_kernels": (ROOT / "kernels/masked_vit_kernels", {"torch", "triton", "numpy"}),
    "ijepa": (
        ROOT / "ijepa",
        {
            "masked_vit_kernels", "torch", "triton", "numpy", "PIL", "simplejpeg", "safetensors",
            "tyro", "rich",
            # extras, each imported where it is used
            "sklearn", "matplotlib", "tensorboard", "timm", "transformers", "diffusers",
        },
    ),
    "bench": (
        ROOT / "bench",
        {
            "masked_vit_kernels", "ijepa", "torch", "triton", "numpy", "PIL", "sklearn", "pytest",
            "matplotlib", "xformers", "flash_attn",
        },
    ),
}  # fmt: skip

# package -> room -> the rooms of the same package that it may import. A package without an entry
# is read for what it imports from outside alone.
ROOMS: dict[str, dict[str, set[str]]] = {
    "masked_vit_kernels": {
        FACE: {"attention", "tokens", "optimizer", "packing", "cpu_linear", "float8"},
        "packing": set(),
        "checks": set(),
        "pixels": set(),
        "cpu_linear": set(),
        "float8": {"checks"},
        "bundle": set(),
        "kernel_language": set(),
        "launch": {"bundle", "kernel_language"},
        # The three kinds of ops do not know each other.
        "attention": {"packing", "checks", "launch", "kernel_language"},
        "tokens": {"packing", "checks", "launch", "pixels", "kernel_language"},
        "optimizer": {"checks", "launch", "kernel_language", "float8"},
        "compile": {"launch"},
        "catalogue": {"attention", "tokens", "optimizer", "packing", "launch"},
        "audit": {"catalogue", "compile", "launch"},
        "adapters": {"attention", "tokens", "packing", "checks"},
        # The oracle: whoever judges with it imports it, and it shares no code with what it judges.
        "reference": {"packing"},
        "selftest": {FACE, "attention", "tokens", "catalogue", "reference"},
    },
    "ijepa": {
        FACE: set(),  # its names are imported on first use
        "config": set(),
        "configs": set(),
        "counter_rng": set(),
        "positions": set(),
        "disk": set(),
        "printable": set(),
        "versions": set(),
        "machine": set(),
        "recipes": {"config"},
        "masks": {"config", "counter_rng"},
        "data": {"counter_rng", "disk", "printable"},
        "vit": {"config", "positions"},
        "model": {"config", "masks", "positions", "vit"},
        "visualize": {"counter_rng", "disk", "masks", "printable"},
        "cost": {"config", "counter_rng", "disk", "masks", "recipes"},
        # model -> evaluate -> report -> train -> cli
        "evaluate": {"config", "counter_rng", "data", "masks", "model", "vit"},
        "report": {"config", "disk", "evaluate", "printable", "versions", "visualize"},
        "train": {
            "config", "recipes", "counter_rng", "disk", "versions", "machine", "masks", "data",
            "vit", "model", "visualize", "cost", "evaluate", "report",
        },
        "propose": {
            "config", "recipes", "counter_rng", "disk", "printable", "masks", "data", "cost",
            "report", "train",
        },
        "interop": {"config", "recipes", "disk", "data", "vit", "model", "evaluate", "train"},
        "downstream": {
            "config", "recipes", "counter_rng", "disk", "printable", "versions", "machine",
            "masks", "data", "vit", "model", "positions", "evaluate", "report", "train", "interop",
            "visualize",
        },
        "doctor": {"machine", "versions"},
        "ablate": {"config", "recipes", "disk", "report", "train"},
        "cli": {
            FACE, "config", "recipes", "data", "cost", "report", "train", "propose", "downstream",
            "ablate", "doctor",
        },
    },
}  # fmt: skip
# What of the op library a part of ijepa may import; what is not named here imports nothing of it.
# Three modules call ops.
OPS = {
    "ijepa.vit": {"masked_vit_kernels"},
    "ijepa.model": {"masked_vit_kernels"},
    "ijepa.train.optim": {"masked_vit_kernels"},
    "ijepa.masks": {"masked_vit_kernels.packing"},
    "ijepa.evaluate": {"masked_vit_kernels.pixels", "masked_vit_kernels.packing"},
    "ijepa.downstream": {"masked_vit_kernels.pixels"},
    "ijepa.doctor": {"masked_vit_kernels.cpu_linear"},
}
# The oracle judges production and lends it nothing.
ORACLE = {"masked_vit_kernels.reference", "masked_vit_kernels.selftest"}


def imported(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Full names of what the source of `module` imports; `from a import b` gives a.b."""
    parents = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def wrong_imports(package: str, module: str, names: Iterator[str]) -> list[str]:
    """Those of `names` that `module` of `package` may not import, in words."""
    _, outside = PACKAGES[package]
    rooms = ROOMS.get(package, {})
    room = room_of(module, rooms)
    wrong = []
    for name in names:
        top = name.split(".")[0]
        if top != package:
            known = top in outside or top in sys.stdlib_module_names
            if not known or (package == "ijepa" and not may_take(module, name)):
                wrong.append(f"{module} imports {name}")
        elif rooms:
            other = room_of(name, rooms)
            if other != room and other not in rooms[room]:
                wrong.append(f"{module} imports {name}: {room} may not know {other}")
    return wrong


def may_take(module: str, name: str) -> bool:
    """Whether a module of ijepa may import `name`, as far as the op library goes."""
    if not within(name, "masked_vit_kernels"):
        return True
    if any(within(name, oracle) for oracle in ORACLE):
        return False
    parts = {part for user, parts in OPS.items() if within(module, user) for part in parts}
    return any(within(name, part) for part in parts)


def within(name: str, prefix: str) -> bool:
    """Whether a dotted name is `prefix` or lies in it."""
    return f"{name}.".startswith(f"{prefix}.")


def room_of(name: str, rooms: dict[str, set[str]]) -> str:
    """The room of a dotted name; what is no room is a name that the package itself exports."""
    part = [*name.split("."), FACE][1]
    return part if part in rooms else FACE


def sources(package: str) -> Iterator[tuple[str, Path]]:
    """(module, file) of every file of a package."""
    folder, _ = PACKAGES[package]
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        yield ".".join([package, *(p for p in parts if p != "__init__")]), path


@pytest.mark.parametrize("package", PACKAGES)
def test_every_import_goes_downwards(package):
    wrong = []
    for module, path in sources(package):
        names = imported(path.read_text(), module, is_package=path.name == "__init__.py")
        wrong += wrong_imports(package, module, names)
    assert wrong == []


@pytest.mark.parametrize("package", ROOMS)
def test_every_file_lies_in_a_room(package):
    folder, _ = PACKAGES[package]
    found = {path.stem for path in folder.glob("*.py")} | {
        path.parent.name for path in folder.glob("*/__init__.py")
    }
    assert found == set(ROOMS[package])


@pytest.mark.parametrize("package", ROOMS)
def test_the_rooms_have_no_circle(package):
    rooms = ROOMS[package]

    def below(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, f"{' -> '.join(path)} -> {room}"
        for other in rooms[room]:
            below(other, (*path, room))

    for room in rooms:
        below(room, ())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("masked_vit_kernels.attention.varlen", "from masked_vit_kernels.tokens import cpu"),
        ("masked_vit_kernels.tokens.cpu", "from masked_vit_kernels import reference"),
        ("masked_vit_kernels.tokens.cpu", "from masked_vit_kernels import gather_tokens"),
        ("masked_vit_kernels.tokens.cpu", "from ..optimizer import ema"),
        ("masked_vit_kernels.optimizer", "from .. import attention"),
        ("masked_vit_kernels.reference", "import masked_vit_kernels.pixels"),
        ("masked_vit_kernels.launch", "def f():\n    from ijepa import model"),
        ("masked_vit_kernels.pixels", "import torchvision"),
        ("ijepa.model", "from masked_vit_kernels.reference import extract_patches"),
        ("ijepa.model", "if TYPE_CHECKING:\n    import tests.mutation"),
        ("ijepa.model", "from ijepa.evaluate.knn import knn_accuracy"),
        ("ijepa.config", "from ijepa.recipes import load_recipe"),
        ("ijepa.masks.batch", "from masked_vit_kernels import gather_tokens"),
        ("ijepa.masks.batch", "from ijepa.vit import Encoder"),
        ("ijepa.data.loader", "from ijepa import MaskBatch"),
        ("ijepa.evaluate.knn", "from ijepa.report import metrics"),
        ("ijepa.report.summary", "def f():\n    from ijepa.train import checkpoint"),
        ("ijepa.train.run", "from ijepa import cli"),
        ("ijepa.train.trainer", "from masked_vit_kernels import varlen_attention"),
        ("ijepa.cost.plan", "from ..train import from_recipe"),
        ("bench.timing", "from tests import op_checks"),
    ],
)
def test_a_wrong_arrow_is_found(module, source):
    names = imported(source, module, is_package=module.count(".") == 1 and "opt" in module)
    assert len(wrong_imports(module.split(".")[0], module, names)) == 1

"""What is built and installed: the two packages, the recipes, and nothing called `kernels`."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])('out'))"


def modules(package: Path) -> set[str]:
    """Every file below a package folder that is installed, as a wheel would name it."""
    return {
        str(path.relative_to(package.parent))
        for path in package.rglob("*")
        if (path.suffix in (".py", ".toml", ".css", ".js") or path.name == "py.typed")
        and "__pycache__" not in path.parts
    }


EXPECTED = modules(ROOT / "ijepa") | modules(ROOT / "kernels" / "masked_vit_kernels")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy to build in, as a fresh clone would be."""
    folder = tmp_path_factory.mktemp("clone") / "ijepa"
    folder.mkdir()
    for name in ("ijepa", "kernels", "tests"):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.npz")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, folder)
    (folder / "out").mkdir()
    return folder


@pytest.fixture(scope="module")
def wheel(source):
    subprocess.run([sys.executable, "-c", BUILD, "build_wheel"], cwd=source, check=True,
                   capture_output=True)  # fmt: skip
    (path,) = (source / "out").glob("*.whl")
    return path


def test_the_folder_kernels_is_no_package():
    """An import package named `kernels` would shadow the one that transformers probes for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "masked_vit_kernels" / "__init__.py").exists()


def test_the_wheel_holds_both_packages_and_the_recipes_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        content = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(n for n in archive.namelist() if n.endswith("METADATA"))
        requirements = archive.read(metadata).decode()
    assert content == EXPECTED
    core = [
        line.split(":", 1)[1].strip().split(">")[0].split("<")[0]
        for line in requirements.splitlines()
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    ]
    assert sorted(core) == [
        "numpy", "pillow", "rich", "safetensors", "simplejpeg", "torch", "triton", "tyro",
    ]  # fmt: skip


def test_the_source_archive_holds_what_a_build_needs(source):
    subprocess.run([sys.executable, "-c", BUILD, "build_sdist"], cwd=source, check=True,
                   capture_output=True)  # fmt: skip
    (path,) = (source / "out").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert {"ijepa/py.typed", "kernels/masked_vit_kernels/py.typed"} <= names
    assert "kernels/masked_vit_kernels/__init__.py" in names
    assert "ijepa/configs/shapes-tiny.toml" in names
    assert "kernels/__init__.py" not in names


def test_an_install_offers_no_module_named_kernels(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = """
import importlib.util, sys
sys.path[:] = [path for path in sys.path if path not in REMOVED]
sys.path.insert(0, SITE)
assert importlib.util.find_spec("kernels") is None
for name in ("ijepa", "masked_vit_kernels"):
    assert importlib.util.find_spec(name).origin.startswith(SITE), name
from ijepa.recipes import load_recipe
assert load_recipe("shapes-tiny").train.steps
"""
    removed = ["", str(ROOT), str(ROOT / "kernels")]
    script = script.replace("SITE", repr(str(tmp_path / "site"))).replace("REMOVED", repr(removed))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)


def test_what_is_installed_runs_the_demo_to_its_table(wheel, tmp_path):
    """Outside the checkout, with nothing of it on the path."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    settings = (
        "--train.steps 3 --data.num-images 64 --data.num-held-out 40 --train.output runs/demo"
    )
    script = (
        f"import sys; sys.path[:] = [p for p in sys.path if p not in {['', str(ROOT)]!r}];"
        f"sys.path.insert(0, {str(tmp_path / 'site')!r}); from ijepa.cli import main;"
        f"import ijepa; assert ijepa.__file__.startswith({str(tmp_path)!r});"
        "sys.exit(main(sys.argv[1:]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["IJEPA_CACHE"] = str(tmp_path / "cache")
    done = subprocess.run(
        [sys.executable, "-c", script, "pretrain", *settings.split()], cwd=tmp_path,
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| random network" in (tmp_path / "runs/demo/summary.md").read_text()


def test_the_wheel_says_its_licence_and_that_it_is_typed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(n for n in archive.namelist() if n.endswith("METADATA"))
        text = archive.read(metadata).decode()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert "License-Expression: Apache-2.0" in text
    assert "Classifier: Typing :: Typed" in text


def test_the_installed_command_is_the_one_the_readme_names():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'ijepa = "ijepa.cli:main"' in text
    commands = (ROOT / "README.md").read_text()
    for command in ("make demo", "make test", "ijepa pretrain"):
        assert command in commands


def test_only_the_tests_are_installed_with_constraints():
    """They name the triton of the audit, which would tie a CUDA torch to one release."""
    makefile = (ROOT / "Makefile").read_text()
    installs = re.findall(r"pip install .*-e '(.*)'", makefile)
    constrained = re.findall(r"pip install .*-c constraints.txt -e '(.*)'", makefile)
    assert (installs, constrained) == ([".[plots]", ".[dev]"], [".[dev]"])


def test_the_readmes_python_examples_run():
    text = (ROOT / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    model_example, _three_lines, ops_example = examples  # those three have a test of their own
    scope: dict = {}
    exec(model_example, scope)
    assert scope["loss"].ndim == 0 and scope["loss"] > 0
    assert scope["features"].shape == (8, 96)
    exec(ops_example, scope)
    assert scope["out"].shape == (17, 4, 24) and scope["visible"].shape == (2, 50, 64)

"""`bench/on_gpu.sh --dry` rehearsed on a machine like a GPU image: packages missing, no network.

The bare Python is a virtual environment of links to this one's packages, less those that
`bench/carry.sh` gathers; their wheels are packed from the files installed here.
"""

import os
import re
import subprocess
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
(_NEEDED,) = re.findall(r"NEEDED=\((.*)\)", (ROOT / "bench" / "carry.sh").read_text())
CARRIED = _NEEDED.split()
MODULES = [name.replace("-", "_") for name in CARRIED]

NO_NETWORK = """\
import socket

def _connect(self, address, *, _connect=socket.socket.connect):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1"):
        raise OSError(f"no network here, asked for {address}")
    return _connect(self, address)

socket.socket.connect = _connect
"""


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """A Python that has everything this one has, but neither `CARRIED` nor the project."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    left_out = {"ijepa", "masked_vit_kernels"}
    for name in CARRIED:
        left_out |= {file.parts[0] for file in metadata.files(name) or ()}
    for installed in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(installed).iterdir():
            if entry.name not in left_out and not entry.name.startswith("__editable__"):
                (packages / entry.name).symlink_to(entry)
    (packages / "no_network.py").write_text(NO_NETWORK)
    (packages / "no_network.pth").write_text("import no_network\n")
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def carry(tmp_path_factory) -> Path:
    """A folder of wheels of `CARRIED`, each of the files installed here."""
    folder = tmp_path_factory.mktemp("carry")
    for name in CARRIED:
        distribution = metadata.distribution(name)
        tag = re.findall(r"^Tag: (\S+)$", distribution.read_text("WHEEL") or "", re.MULTILINE)[0]
        wheel = f"{name.replace('-', '_')}-{distribution.version}-{tag}.whl"
        with zipfile.ZipFile(folder / wheel, "w") as archive:
            for file in distribution.files or ():
                if ".." not in file.parts and "__pycache__" not in file.parts:
                    archive.write(file.locate(), str(file))
    return folder


def dry(python: Path, out: Path, **environment: str) -> tuple[dict[str, str], str]:
    """Part to what the summary says of it, and the log."""
    settings = os.environ | {"PYTHON": str(python), "PIP_CONFIG_FILE": os.devnull} | environment
    subprocess.run(["bash", "bench/on_gpu.sh", str(out), "--dry"], cwd=ROOT, env=settings)
    lines = (out / "summary.txt").read_text().splitlines()
    summary = dict(line.split(": ", 1) for line in lines if ": " in line)
    return summary, (out / "log.txt").read_text()


def test_with_the_wheels_every_module_imports_and_every_part_passes(tmp_path, bare_python, carry):
    summary, log = dry(bare_python, tmp_path / "out", CARRY=str(carry))
    counted = summary.pop("GPU tests")
    assert all(said.startswith("exit 0 ") for said in summary.values()), f"{summary}\n{log[-4000:]}"
    assert {"packages", "doctor", "step", "attention", "tests", "report"} <= summary.keys()
    assert "ERROR collecting" not in log
    (never_ran,) = re.findall(r"(\d+) never ran", counted)
    assert int(never_ran) > 400


def test_without_them_the_missing_are_named_and_the_other_tests_are_still_collected(
    tmp_path, bare_python
):
    """That this fails is what makes the rehearsal one."""
    summary, log = dry(
        bare_python, tmp_path / "out", CARRY=str(tmp_path / "none"), ONLY="packages tests"
    )
    assert summary["packages"].startswith("exit 1 ")
    for module in MODULES:
        assert f"needed: {module}: ModuleNotFoundError" in log
    assert summary["tests"].startswith("exit ") and not summary["tests"].startswith("exit 0 ")
    assert "ERROR collecting" in log  # modules that do not import
    assert "test_attention.py::" in log


def test_the_bare_python_reaches_no_network(bare_python):
    program = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
    ended = subprocess.run([bare_python, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 1 and "no network here" in ended.stderr

"""The README's map of the tree has a line for every folder of sources, and no other."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = {".py", ".c", ".h", ".toml", ".cmake"}


def _mapped() -> list[str]:
    text = (ROOT / "README.md").read_text().split("## Where things are")[1].split("\n## ")[0]
    return re.findall(r"^\| `([\w/]+)` \|", text, flags=re.MULTILINE)


def test_every_folder_of_sources_has_its_line():
    found = {
        str(file.parent.relative_to(ROOT))
        for room in ("kernels", "ijepa", "bench")
        for file in (ROOT / room).rglob("*")
        if file.suffix in SOURCES
    }
    assert sorted(_mapped()) == sorted(found | {"tests"})

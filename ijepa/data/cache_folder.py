"""Where things are kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """$IJEPA_CACHE, else ijepa in the user's cache folder."""
    if os.environ.get("IJEPA_CACHE"):
        return Path(os.environ["IJEPA_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ijepa"


def index_cache() -> Path:
    """Of what was found in folders and archives."""
    return default_cache() / "indexes"

"""Checkpoints from here and elsewhere: runs of this program, the released code's files."""

from ijepa.interop.released import load_official
from ijepa.interop.runs import load_run
from ijepa.interop.sources import load_pretrained

__all__ = ["load_official", "load_pretrained", "load_run"]

"""Pictures: mask examples on images, and the curves of a run (extra `plots`)."""

from ijepa.visualize.masks import draw_mask_examples

__all__ = ["draw_mask_examples"]

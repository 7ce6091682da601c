"""Heat maps, coverage of masks, sheets of pictures."""

import numpy as np
import pytest

from ijepa.masks.multiblock import MultiBlockSampler
from ijepa.masks.strategies import RasterizedSampler
from ijepa.visualize.coverage import mask_coverage
from ijepa.visualize.heat import enlarged, framed, heat_colours, laid_over
from ijepa.visualize.sheet import draw_sheet


def test_heat_runs_from_dark_to_light():
    colours = heat_colours(np.linspace(-1, 2, 50), 0.0, 1.0)
    lightness = colours.astype(int).sum(axis=-1)
    assert (np.diff(lightness) >= 0).all() and lightness[0] < 120 < 600 < lightness[-1]
    assert (colours[:16] == colours[0]).all()  # below the range


def test_cells_are_enlarged_and_framed_inside():
    cells = np.array([[False, True], [False, False]])
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    drawn = framed(pixels, cells, (9, 9, 9), width=1)[..., 0] == 9
    expected = np.zeros((8, 8), dtype=bool)
    expected[:4, 4:] = True
    expected[1:3, 5:7] = False
    assert np.array_equal(drawn, expected)
    assert np.array_equal(enlarged(cells, (8, 8))[:4, 4:], np.ones((4, 4), dtype=bool))


def test_colours_are_laid_over_grey():
    pixels = np.full((2, 2, 3), 100, dtype=np.uint8)
    drawn = laid_over(pixels, np.full((2, 2, 3), 200), strength=0.5)
    assert (drawn == 150).all()


def test_coverage_counts_what_the_masks_say():
    """Quadrants: each is the context of a quarter of the images, a target of the others."""
    found = mask_coverage(RasterizedSampler((4, 6)), 8000, 50, seed=3)
    np.testing.assert_allclose(found.context, 0.25, atol=0.03)
    np.testing.assert_allclose(found.context + found.target, 1.0)
    assert found.context_patches == 6


def test_truncation_never_shows_the_last_row():
    packed = mask_coverage(MultiBlockSampler((8, 8)), 500, 50, seed=0)
    cut = mask_coverage(MultiBlockSampler((8, 8), batching="truncate"), 500, 50, seed=0)
    assert (cut.context[-1] == 0).all() and (packed.context[-1] > 0).all()
    assert cut.context_patches < packed.context_patches


def test_a_sheet_holds_every_picture_where_it_belongs():
    red = np.zeros((8, 8, 3), dtype=np.uint8)
    red[..., 0] = 255
    sheet = np.asarray(
        draw_sheet([[red, None], [red, red]], columns=("a", "b"), names=("x\n", "y\udcff"),
                   captions=(("one",), ("two", "three")), tile=32)
    )  # fmt: skip
    place = (sheet == [255, 0, 0]).all(axis=-1)
    assert place.sum() == 3 * 32 * 32
    with pytest.raises(ValueError, match="at least one picture"):
        draw_sheet([[None]])

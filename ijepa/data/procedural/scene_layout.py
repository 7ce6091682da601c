"""What stands where in a `scenes` image, and the two VTAB labels that follow from it.

The measures are those of CLEVR: objects on a 6 x 6 floor, two sizes, three solids, eight colours,
two materials, the camera jittered around (7.36, -6.93, 4.96). Layouts are drawn for many images
at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ijepa.counter_rng import derive_keys, uniform

SOLIDS = ("sphere", "cube", "cylinder")
COLOURS = {  # sRGB, as in CLEVR
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}
MIN_OBJECTS, MAX_OBJECTS = 3, 10
DISTANCE_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
CLASS_NAMES = {
    "count": tuple(str(count) for count in range(MIN_OBJECTS, MAX_OBJECTS + 1)),
    "distance": ("under 8", "8 to 8.5", "8.5 to 9", "9 to 9.5", "9.5 to 10", "over 10"),
}
FIELD_OF_VIEW = 0.36  # half the wider side of the image, over the depth
BOUNDING = np.array([1.0, math.sqrt(1.5), math.sqrt(2)])  # bounding sphere over size, by solid

_STREAM = 202
_LARGE, _SMALL = 0.7, 0.35
_CANDIDATES = 48  # places tried for each object
_MIN_GAP = 0.25  # between the bounding circles of two objects on the floor
_SCREEN_WEIGHT = 10  # a distance on the screen in units of the floor, at a depth of 10
_DRAWS_PER_OBJECT = 6 + 2 * _CANDIDATES


@dataclass(frozen=True)
class Layouts:
    """n scenes of up to 10 objects; entries from `count` on are not part of the scene.

    Attributes:
        count: (n,) int64, 3 to 10.
        camera: (n, 3) position; axes: (n, 3, 3) rows right, up, forward.
        light: (n, 3) position of the key light.
        centre: (n, 10, 3); size: (n, 10) radius, or half the edge of a cube times sqrt(2).
        angle: (n, 10) about the vertical.
        solid, colour: (n, 10) int64 indices into SOLIDS and COLOURS; metal: (n, 10) bool.
    """

    count: np.ndarray
    camera: np.ndarray
    axes: np.ndarray
    light: np.ndarray
    centre: np.ndarray
    size: np.ndarray
    angle: np.ndarray
    solid: np.ndarray
    colour: np.ndarray
    metal: np.ndarray

    def depth(self) -> np.ndarray:
        """(n, 10) distance of each centre along the camera's axis: CLEVR's `pixel_coords[2]`."""
        return ((self.centre - self.camera[:, None]) * self.axes[:, 2, None]).sum(axis=2)


def draw_layouts(indices: np.ndarray, size: tuple[int, int], seed: int) -> Layouts:
    """Layouts of images `indices` (n,) for a frame of (height, width) `size`."""
    indices = np.asarray(indices, dtype=np.int64)
    keys = derive_keys(seed, _STREAM, indices)
    draws = uniform(keys, 8 + MAX_OBJECTS * _DRAWS_PER_OBJECT)
    count = MIN_OBJECTS + np.floor(draws[:, 0] * (MAX_OBJECTS - MIN_OBJECTS + 1)).astype(np.int64)
    camera = np.array([7.36, -6.93, 4.96]) + (draws[:, 1:4] - 0.5)
    axes = _camera_axes(camera, target=np.array([0.0, 0.0, 0.25]))
    light = np.array([5.0, -3.5, 8.5]) + 3 * (draws[:, 4:7] - 0.5)
    each = draws[:, 8:].reshape(len(keys), MAX_OBJECTS, _DRAWS_PER_OBJECT)
    solid = np.floor(each[:, :, 0] * len(SOLIDS)).astype(np.int64)
    places = 6 * each[:, :, 6:].reshape(len(keys), MAX_OBJECTS, _CANDIDATES, 2) - 3
    object_size = np.where(each[:, :, 1] < 0.5, _SMALL, _LARGE)
    centre, object_size = _place(places, solid, object_size, count, camera, axes, size)
    return Layouts(
        count=count,
        camera=camera,
        axes=axes,
        light=light,
        centre=centre,
        size=object_size,
        angle=2 * math.pi * each[:, :, 2],
        solid=solid,
        colour=np.floor(each[:, :, 3] * len(COLOURS)).astype(np.int64),
        metal=each[:, :, 4] < 0.5,
    )


def scene_labels(indices: np.ndarray, size: tuple[int, int], seed: int) -> dict[str, np.ndarray]:
    """The VTAB tasks: "count" = objects - 3, "distance" = bin of the nearest object's depth."""
    layouts = draw_layouts(indices, size, seed)
    present = np.arange(MAX_OBJECTS) < layouts.count[:, None]
    nearest = np.where(present, layouts.depth(), np.inf).min(axis=1)
    # bisect_left: a depth equal to an edge belongs to the bin below it.
    distance = np.searchsorted(DISTANCE_EDGES, nearest, side="left")
    return {"count": layouts.count - MIN_OBJECTS, "distance": distance.astype(np.int64)}


def height_over_floor(solid: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Height of an object's centre: CLEVR shrinks a cube by sqrt(2)."""
    return np.where(solid == SOLIDS.index("cube"), size / math.sqrt(2), size)


def _camera_axes(camera: np.ndarray, target: np.ndarray) -> np.ndarray:
    """(n, 3) -> (n, 3, 3): rows right, up, forward of a camera that looks at `target`."""

    def unit(vectors: np.ndarray) -> np.ndarray:
        return vectors / np.sqrt((vectors**2).sum(axis=-1, keepdims=True))

    forward = unit(target - camera)
    right = unit(np.cross(forward, np.array([0.0, 0.0, 1.0])))
    return np.stack([right, np.cross(right, forward), forward], axis=1)


def _place(places, solid, size, count, camera, axes, frame) -> tuple[np.ndarray, np.ndarray]:
    """One object after the other takes the first place that keeps apart from the earlier ones.

    places (n, 10, candidates, 2). An object for which no place is free is made small; if it still
    has none, it takes the place with the least overlap. Returns centres (n, 10, 3), sizes (n, 10).
    """
    n = len(places)
    centre = np.zeros((n, MAX_OBJECTS, 3))
    size = size.copy()
    slack = np.full((n, MAX_OBJECTS), -np.inf)
    for slot in range(MAX_OBJECTS):
        for make_small in (False, True):
            rows = np.flatnonzero((slack[:, slot] < 0) & (slot < count))
            if make_small:
                size[rows, slot] = _SMALL
            reach = size[rows, : slot + 1] * BOUNDING[solid[rows, : slot + 1]]
            trial = np.empty((len(rows), _CANDIDATES, 3))
            trial[:, :, :2] = places[rows, slot]
            trial[:, :, 2] = height_over_floor(solid[rows, slot], size[rows, slot])[:, None]
            view = camera[rows], axes[rows]
            free = _slack(trial, centre[rows, :slot], reach, view, frame)
            fits = free >= 0
            chosen = np.where(fits.any(axis=1), fits.argmax(axis=1), free.argmax(axis=1))
            every = np.arange(len(rows))
            centre[rows, slot] = trial[every, chosen]
            slack[rows, slot] = free[every, chosen]
    return centre, size


def _slack(trial, standing, reach, view, frame) -> np.ndarray:
    """How well each place would do: (n, candidates), not negative where nothing is wrong with it.

    Args:
        trial: (n, candidates, 3) centres of the new object.
        standing: (n, k, 3) centres of the k objects already there.
        reach: (n, k + 1) bounding radii of those and of the new one.
        view: camera (n, 3) and axes (n, 3, 3).
    """
    screen, radius, depth = _project(trial, reach[:, -1:], *view)
    half_width = FIELD_OF_VIEW * min(1, frame[1] / frame[0])
    half_height = FIELD_OF_VIEW * min(1, frame[0] / frame[1])
    room_x = half_width - np.abs(screen[:, :, 0]) - radius
    room_y = half_height - np.abs(screen[:, :, 1]) - radius
    slack = _SCREEN_WEIGHT * np.minimum(room_x, room_y)
    their_screen, their_radius, their_depth = _project(standing, reach[:, :-1], *view)
    for other in range(standing.shape[1]):
        apart = np.hypot(*np.moveaxis(trial[:, :, :2] - standing[:, None, other, :2], 2, 0))
        gap = apart - reach[:, -1:] - reach[:, other, None] - _MIN_GAP
        apart_on_screen = np.hypot(*np.moveaxis(screen - their_screen[:, None, other], 2, 0))
        # The nearer object must leave the middle of the farther one in sight.
        nearer = np.where(depth < their_depth[:, other, None], radius, their_radius[:, other, None])
        slack = np.minimum(slack, gap)
        slack = np.minimum(slack, _SCREEN_WEIGHT * (apart_on_screen - 0.9 * nearer))
    return slack


def _project(points, reach, camera, axes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n, k, 3), (n, 1 or k) -> screen (n, k, 2) as right and up over depth, radius and depth."""
    seen = (points - camera[:, None]) @ axes.transpose(0, 2, 1)
    depth = seen[:, :, 2]
    return seen[:, :, :2] / depth[:, :, None], reach / depth, depth

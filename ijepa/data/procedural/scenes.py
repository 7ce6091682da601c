"""`scenes`: ray-cast images of simple solids on a floor, after CLEVR.

One image at a time, with supersampled rays: each object is intersected only within the rectangle
its bounding sphere projects to, and shadows only for the points whose way to the light passes
that sphere. Ray directions have unit depth, so that the ray parameter t is the depth itself.
Vectors lie component first, (3, ...), because numpy sums slowly over a last axis of three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ijepa.data.procedural.scene_layout import (
    BOUNDING,
    COLOURS,
    FIELD_OF_VIEW,
    Layouts,
    draw_layouts,
)

VERSION = 1
_FLOOR = np.array([0.50, 0.49, 0.48], dtype=np.float32)  # linear reflectance
_FILL_LIGHT = np.array([-0.68, -0.59, 0.44], dtype=np.float32)  # direction
_SKY = np.array([0.95, 0.97, 1.0], dtype=np.float32)
_PALETTE = (np.array(list(COLOURS.values()), dtype=np.float32) / 255) ** 2.2  # linear
_NOTHING = -1


@dataclass(frozen=True)
class _Solid:
    """One object, with everything a ray needs; arrays are float32."""

    kind: int
    centre: np.ndarray
    size: np.float32
    cosine: np.float32  # of the angle about the vertical
    sine: np.float32
    reach: np.float32  # radius of the bounding sphere
    colour: np.ndarray
    metal: bool


def render_scenes(indices: np.ndarray, size: tuple[int, int], seed: int) -> np.ndarray:
    """Images `indices` (n,) of data set `seed`: (n, height, width, 3) uint8."""
    layouts = draw_layouts(indices, size, seed)
    return np.stack([_render(layouts, row, size) for row in range(len(layouts.count))])


def _render(layouts: Layouts, row: int, size: tuple[int, int]) -> np.ndarray:
    """(height, width, 3) uint8 of one layout."""
    samples = 3 if max(size) <= 48 else 2  # rays a pixel and side
    camera = layouts.camera[row].astype(np.float32)
    solids = [_solid(layouts, row, slot) for slot in range(layouts.count[row])]
    rays = _rays(layouts.axes[row].astype(np.float32), size, samples)
    depth, normal, owner = _first_hits(camera, rays, layouts.axes[row], solids, size)
    point = _spread(camera) + depth * rays
    lights = _lights(layouts.light[row].astype(np.float32), size, samples)
    lit, openness = _visibility(point, normal, owner, lights, solids)
    colour = _shade(point, normal, owner, rays, lights, lit, openness, solids)
    height, width = size
    colour = colour.reshape(3, height, samples, width, samples).mean(axis=(2, 4))
    encoded = np.rint(255 * np.clip(colour, 0, 1) ** (1 / 2.2)).astype(np.uint8)
    return encoded.transpose(1, 2, 0)


def _solid(layouts: Layouts, row: int, slot: int) -> _Solid:
    angle = layouts.angle[row, slot]
    kind, size = int(layouts.solid[row, slot]), layouts.size[row, slot]
    return _Solid(
        kind=kind,
        centre=layouts.centre[row, slot].astype(np.float32),
        size=np.float32(size),
        cosine=np.float32(math.cos(angle)),
        sine=np.float32(math.sin(angle)),
        reach=np.float32(size * BOUNDING[kind]),
        colour=_PALETTE[layouts.colour[row, slot]],
        metal=bool(layouts.metal[row, slot]),
    )


def _half_extent(size: tuple[int, int]) -> tuple[float, float]:
    """(vertical, horizontal) half field of view over depth; pixels are square."""
    longer = max(size)
    return FIELD_OF_VIEW * size[0] / longer, FIELD_OF_VIEW * size[1] / longer


def _rays(axes: np.ndarray, size: tuple[int, int], samples: int) -> np.ndarray:
    """(3, H * samples, W * samples) directions of unit depth."""
    vertical, horizontal = _half_extent(size)
    rows, columns = size[0] * samples, size[1] * samples
    up = vertical * (1 - (2 * np.arange(rows, dtype=np.float32) + 1) / rows)
    right = horizontal * ((2 * np.arange(columns, dtype=np.float32) + 1) / columns - 1)
    right_axis, up_axis, forward = (_spread(axis) for axis in axes)
    return forward + up[:, None] * up_axis + right * right_axis


def _first_hits(camera, rays, axes, solids, size):
    """Depth (R, C), normal (3, R, C) and owner (R, C; -1 is the floor) of what each ray meets."""
    rows, columns = rays.shape[1:]
    # The camera looks down on a floor without end; the last rows of a wide view may pass over it.
    falling = np.minimum(rays[2], np.float32(-1e-2))
    depth = -camera[2] / falling
    normal = np.zeros_like(rays)
    normal[2] = 1
    owner = np.full((rows, columns), _NOTHING, dtype=np.int8)
    vertical, horizontal = _half_extent(size)
    for number, solid in enumerate(solids):
        right, up, ahead = axes @ (solid.centre - camera)
        nearest = ahead - solid.reach
        reach_y = rows * (solid.reach / nearest * 1.25) / (2 * vertical)
        reach_x = columns * (solid.reach / nearest * 1.25) / (2 * horizontal)
        middle_y = rows * (1 - up / ahead / vertical) / 2
        middle_x = columns * (1 + right / ahead / horizontal) / 2
        window = (
            slice(max(0, int(middle_y - reach_y)), max(0, int(middle_y + reach_y) + 1)),
            slice(max(0, int(middle_x - reach_x)), max(0, int(middle_x + reach_x) + 1)),
        )
        every = (slice(None), *window)
        hit, hit_normal = _intersect(solid, _spread(camera), rays[every])
        nearer = hit < depth[window]
        depth[window][nearer] = hit[nearer]
        normal[every][:, nearer] = hit_normal[:, nearer]
        owner[window][nearer] = number
    return depth, normal, owner


def _intersect(solid: _Solid, origin: np.ndarray, rays: np.ndarray):
    """First hit at t > 0: t (...) (inf where there is none) and the world normal (3, ...)."""
    # Object coordinates: turned about the vertical, in units of the object's size.
    local_origin = _turn(origin - _like(solid.centre, origin), solid.cosine, solid.sine)
    local_rays = _turn(rays, solid.cosine, solid.sine)
    with np.errstate(divide="ignore", invalid="ignore"):
        t, normal = _INTERSECTIONS[solid.kind](local_origin / solid.size, local_rays / solid.size)
    return t, _turn(normal, solid.cosine, -solid.sine)


def _sphere(origin, rays):
    a = _dot(rays, rays)
    b = _dot(rays, origin)
    discriminant = b * b - a * (_dot(origin, origin) - 1)
    t = (-b - np.sqrt(discriminant)) / a
    t = np.where((discriminant > 0) & (t > 0), t, np.inf)
    return t, origin + np.where(np.isfinite(t), t, 0) * rays


def _cube(origin, rays):
    half = np.float32(math.sqrt(0.5))
    inverse = 1 / rays
    near = -origin * inverse - np.abs(inverse) * half  # (3, ...) entry into each slab
    far = -origin * inverse + np.abs(inverse) * half
    enter, leave = near.max(axis=0), far.min(axis=0)
    t = np.where((enter < leave) & (enter > 0), enter, np.inf)
    return t, -np.sign(rays) * (near == enter)


def _cylinder(origin, rays):
    a = _dot(rays[:2], rays[:2])
    b = _dot(rays[:2], origin[:2])
    discriminant = b * b - a * (_dot(origin[:2], origin[:2]) - 1)
    side = (-b - np.sqrt(discriminant)) / a
    height = origin[2] + side * rays[2]
    side = np.where((discriminant > 0) & (side > 0) & (np.abs(height) <= 1), side, np.inf)
    facing = -np.sign(rays[2])  # the cap that the ray can enter through
    cap = (facing - origin[2]) / rays[2]
    across = origin[:2] + cap * rays[:2]
    cap = np.where((cap > 0) & (_dot(across, across) <= 1), cap, np.inf)
    t = np.minimum(side, cap)
    normal = origin + np.where(np.isfinite(t), t, 0) * rays
    on_cap = cap < side
    normal[:2] *= ~on_cap
    normal[2] = facing * on_cap
    return t, normal


_INTERSECTIONS = (_sphere, _cube, _cylinder)


def _lights(light: np.ndarray, size: tuple[int, int], samples: int) -> np.ndarray:
    """(3, H * samples, W * samples): each ray of a pixel sees another point of a square lamp.

    Averaged over the pixel this makes a soft shadow of `samples`^2 steps.
    """
    ticks = (np.arange(samples, dtype=np.float32) + 0.5) / samples - 0.5
    offsets = np.zeros((3, samples, samples), dtype=np.float32)
    offsets[0], offsets[1] = ticks[:, None] * 1.2, ticks * 1.2
    return _spread(light) + np.tile(offsets, (1, *size))


def _visibility(point, normal, owner, lights, solids):
    """Two (R, C) factors: 1 where the key light is seen, and how much of the sky is (0 to 1)."""
    lit = np.ones(owner.shape, dtype=np.float32)
    openness = np.ones(owner.shape, dtype=np.float32)
    towards = lights - point
    length_squared = _dot(towards, towards)
    for number, solid in enumerate(solids):
        to_centre = _spread(solid.centre) - point
        distance_squared = _dot(to_centre, to_centre)
        along = _dot(to_centre, towards)
        passes = (distance_squared - along * along / length_squared) < solid.reach**2
        candidate = passes & (along > 0) & (lit > 0)
        if candidate.any():
            start = point[:, candidate] + np.float32(2e-3) * normal[:, candidate]
            t, _ = _intersect(solid, start, towards[:, candidate])
            lit[candidate] *= t > 1
        # The share of the sky a sphere takes from a surface point, as if it were small.
        facing = np.maximum(_dot(normal, to_centre), 0) / np.sqrt(distance_squared)
        blocked = facing * solid.size**2 / np.maximum(distance_squared, solid.size**2)
        openness *= np.where(owner == number, 1, 1 - np.float32(0.9) * blocked)
    return lit, openness


def _shade(point, normal, owner, rays, lights, lit, openness, solids):
    """(3, R, C) linear colour."""
    palette = np.stack([solid.colour for solid in solids] + [_FLOOR], axis=1)  # -1 is the floor
    metal = np.array([solid.metal for solid in solids] + [False])[owner]
    on_floor = owner == _NOTHING
    base = palette[:, owner]
    towards = _unit(lights - point)
    view = -_unit(rays)
    diffuse = np.maximum(_dot(normal, towards), 0) * lit
    fill = np.maximum(_dot(normal, _spread(_FILL_LIGHT)), 0)
    light = 0.85 * diffuse + 0.14 * fill + openness * (0.27 + 0.10 * normal[2])
    colour = base * np.where(metal, 0.75 * light, light)

    solid = np.flatnonzero(~on_floor)  # highlights and mirrors: few rays need them
    colour.reshape(3, -1)[:, solid] += _gloss(
        *(values.reshape(3, -1)[:, solid] for values in (normal, view, towards, base)),
        *(values.reshape(-1)[solid] for values in (metal, lit, openness)),
    )
    # Far parts of the floor fade into the same light gray, as in a studio.
    far = np.clip((np.sqrt(_dot(point[:2], point[:2])) - 5) / 14, 0, 1) * on_floor
    return colour + far * (np.float32(0.42) - colour)


def _gloss(normal, view, towards, base, metal, lit, openness):
    """(3, n) light off the polish of solids: a highlight, and on metal a mirror image."""
    highlight = np.maximum(_dot(normal, _unit(towards + view)), 0)
    shine = np.where(metal, 0.9 * highlight**70, 0.10 * highlight**12) * (0.15 + 0.85 * lit)
    # Metal mirrors a bright sky and a gray floor, tinted by its own colour.
    mirrored_up = 2 * _dot(normal, view) * normal[2] - view[2]
    sky = np.clip(0.5 + 1.6 * mirrored_up, 0, 1)
    mirror = (0.25 + 0.75 * base) * (0.18 + 0.42 * sky * _SKY[:, None]) * openness
    return shine + metal * mirror


def _spread(vector: np.ndarray) -> np.ndarray:
    """(3,) -> (3, 1, 1), to meet an image."""
    return vector[:, None, None]


def _like(vector: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(3,) with as many axes as `other` (3, ...)."""
    return vector.reshape(3, *[1] * (other.ndim - 1))


def _turn(vectors: np.ndarray, cosine: np.float32, sine: np.float32) -> np.ndarray:
    """Rotate (3, ...) about the vertical by minus the angle."""
    x, y, z = vectors
    return np.stack([cosine * x + sine * y, cosine * y - sine * x, z])


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(k, ...), (k, ...) -> (...), k being 2 or 3."""
    total = a[0] * b[0] + a[1] * b[1]
    return total + a[2] * b[2] if len(a) == 3 else total


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.sqrt(_dot(vectors, vectors))

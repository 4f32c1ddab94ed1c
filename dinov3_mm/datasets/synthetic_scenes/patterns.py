"""Silhouettes and textures of SyntheticScenes as functions of object coordinates.

Silhouettes are signed functions of the plane: negative inside, close to a distance near the
outline, and scaled so that every shape fits the disc of radius one. Textures are functions of the
plane with values in [0, 1] that mix two colours. Both take float32 arrays and draw nothing at
random themselves.
"""

from collections.abc import Callable

import numpy as np

Array = np.ndarray
Pattern = Callable[[Array, Array], Array]


def _polar(petals: int, depth: float) -> Pattern:
    def shape(u: Array, v: Array) -> Array:
        radius = np.hypot(u, v)
        outline = (1.0 + depth * np.cos(petals * np.arctan2(v, u))) / (1.0 + depth)
        return radius - outline

    return shape


def _polygon(sides: int, stretch: float = 1.0) -> Pattern:
    angles = 2 * np.pi * np.arange(sides) / sides + np.pi / 2
    normals = np.stack([np.cos(angles + np.pi / sides), np.sin(angles + np.pi / sides)], 1)
    apothem = np.cos(np.pi / sides)

    def shape(u: Array, v: Array) -> Array:
        stretched = v * stretch
        distance = normals[0, 0] * u + normals[0, 1] * stretched
        for x, y in normals[1:]:
            np.maximum(distance, x * u + y * stretched, out=distance)
        return distance - np.float32(apothem)

    return shape


def _cross(u: Array, v: Array) -> Array:
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - 0.9, b - 0.32), np.maximum(b - 0.9, a - 0.32))


def _ring(u: Array, v: Array) -> Array:
    return np.abs(np.hypot(u, v) - 0.7) - 0.3


def _crescent(u: Array, v: Array) -> Array:
    return np.maximum(np.hypot(u, v) - 1.0, 0.75 - np.hypot(u - 0.55, v))


def _capsule(u: Array, v: Array) -> Array:
    return np.hypot(u - np.clip(u, -0.6, 0.6), v) - 0.38


def _fish(u: Array, v: Array) -> Array:
    body = (np.hypot((u - 0.2) / 0.75, v / 0.5) - 1.0) * 0.5
    tail = np.maximum(np.abs(v) - (-0.35 - u) * 0.9, np.maximum(-0.95 - u, u + 0.3))
    return np.minimum(body, tail)


def _leaf(u: Array, v: Array) -> Array:
    return np.maximum(np.hypot(u, v - 0.6), np.hypot(u, v + 0.6)) - 1.16


def _arrow(u: Array, v: Array) -> Array:
    head = np.maximum(np.abs(v) + u - 0.95, -u + 0.05) * 0.7
    shaft = np.maximum(np.abs(v) - 0.28, np.abs(u + 0.4) - 0.5)
    return np.minimum(head, shaft)


SILHOUETTES: dict[str, Pattern] = {
    "star": _polar(5, 0.45),
    "flower": _polar(7, 0.22),
    "gear": _polar(12, 0.10),
    "triangle": _polygon(3),
    "box": _polygon(4, 1.35),
    "hexagon": _polygon(6),
    "cross": _cross,
    "ring": _ring,
    "crescent": _crescent,
    "capsule": _capsule,
    "fish": _fish,
    "leaf": _leaf,
    "arrow": _arrow,
}


def _wave(x: Array) -> Array:
    """A soft square wave of period one with values in [0, 1]."""
    return 0.5 + 0.5 * np.tanh(2.5 * np.sin(2 * np.pi * x))


def _stripes(u: Array, v: Array) -> Array:
    return _wave(u)


def _dots(u: Array, v: Array) -> Array:
    du, dv = u - np.round(u), v - np.round(v)
    return 0.5 - 0.5 * np.tanh(12 * (np.hypot(du, dv) - 0.3))


def _checks(u: Array, v: Array) -> Array:
    return 0.5 + 0.5 * np.tanh(4 * np.sin(np.pi * u) * np.sin(np.pi * v))


def _rings(u: Array, v: Array) -> Array:
    return _wave(np.hypot(u, v))


def _ripples(u: Array, v: Array) -> Array:
    return _wave(u + 0.25 * np.sin(2 * np.pi * 0.5 * v))


def _zigzag(u: Array, v: Array) -> Array:
    return _wave(u + np.abs(v - np.round(v)))


def _bricks(u: Array, v: Array) -> Array:
    row = np.floor(2 * v)
    shifted = u + 0.5 * np.mod(row, 2)
    edge = np.minimum(np.abs(shifted - np.round(shifted)), np.abs(v - np.round(2 * v) / 2) * 1.5)
    return 0.5 + 0.5 * np.tanh(18 * (edge - 0.09))


def _mottle(u: Array, v: Array) -> Array:
    field = np.sin(2.1 * u + 1.3 * np.sin(1.7 * v)) + np.sin(2.6 * v + 1.1 * np.sin(2.3 * u))
    return 0.5 + 0.5 * np.tanh(1.6 * field)


def _grain(u: Array, v: Array) -> Array:
    field = np.sin(9.1 * u + 4.7 * np.sin(3.1 * v)) * np.sin(8.3 * v + 3.9 * np.sin(4.3 * u))
    return 0.5 + 0.5 * field


def _plain(u: Array, v: Array) -> Array:
    return np.full(np.broadcast(u, v).shape, 0.15, np.float32)


def _ramp(u: Array, v: Array) -> Array:
    return 0.5 + 0.5 * np.tanh(0.45 * v)


def _hatch(u: Array, v: Array) -> Array:
    return np.maximum(_wave(u + v), _wave(u - v))


def _spokes(u: Array, v: Array) -> Array:
    return 0.5 + 0.5 * np.tanh(3 * np.sin(8 * np.arctan2(v, u)))


TEXTURES: dict[str, Pattern] = {
    "stripes": _stripes,
    "dots": _dots,
    "checks": _checks,
    "rings": _rings,
    "ripples": _ripples,
    "zigzag": _zigzag,
    "bricks": _bricks,
    "mottle": _mottle,
    "grain": _grain,
    "plain": _plain,
    "ramp": _ramp,
    "hatch": _hatch,
    "spokes": _spokes,
}

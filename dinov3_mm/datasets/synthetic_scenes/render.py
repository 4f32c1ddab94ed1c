"""Painting a scene: colour, object ids and depth, from far to near with smooth outlines."""

from typing import NamedTuple

import numpy as np

from dinov3_mm.datasets.synthetic_scenes.categories import CONTEXTS
from dinov3_mm.datasets.synthetic_scenes.patterns import SILHOUETTES, TEXTURES
from dinov3_mm.datasets.synthetic_scenes.scene import (
    BACKGROUND_DEPTH,
    FOCAL_LENGTH,
    Camera,
    Scene,
    SceneObject,
)


class Rendering(NamedTuple):
    """What a camera sees.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        ids: (H, W) uint8, the object id of the front-most object, 0 for the surroundings.
        depth: (H, W) float32 distance from the camera plane in world units.
    """

    image: np.ndarray
    ids: np.ndarray
    depth: np.ndarray


def _rotate(u: np.ndarray, v: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cosine * u + sine * v, cosine * v - sine * u


def _mix(first: tuple, second: tuple, weight: np.ndarray) -> np.ndarray:
    first, second = np.float32(first), np.float32(second)
    return first + weight[..., None].astype(np.float32) * (second - first)


def _part_mask(part: str, u: np.ndarray, v: np.ndarray) -> np.ndarray | None:
    """Where the mark of an object lies, in object coordinates; ``None`` for no mark."""
    if part == "eye":
        return np.hypot(u - 0.42, v - 0.1) < 0.17
    if part == "core":
        return np.hypot(u, v) < 0.3
    if part == "rib":
        return np.abs(v) < 0.08
    if part == "band":
        return np.abs(u) < 0.2
    return None


def _paint_object(
    item: SceneObject, x: np.ndarray, y: np.ndarray, camera: Camera, canvas: Rendering, pixel: float
) -> None:
    scale = FOCAL_LENGTH * camera.zoom / item.depth
    centre_x, centre_y = (item.x - camera.x) * scale, (item.y - camera.y) * scale
    cosine, sine = np.cos(camera.roll), np.sin(camera.roll)
    screen_x, screen_y = cosine * centre_x - sine * centre_y, sine * centre_x + cosine * centre_y
    radius = item.radius * scale
    columns = np.flatnonzero(np.abs(x - screen_x) <= radius + pixel)
    rows = np.flatnonzero(np.abs(y - screen_y) <= radius + pixel)
    if columns.size == 0 or rows.size == 0:
        return
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    u, v = np.meshgrid((x[window[1]] - screen_x) / radius, (y[window[0]] - screen_y) / radius)
    u, v = _rotate(u, v, item.angle + camera.roll)
    signed = SILHOUETTES[item.silhouette](u, v)
    if item.part == "hole":
        signed = np.maximum(signed, 0.3 - np.hypot(u, v))
    cover = np.clip(0.5 - signed * np.float32(radius / pixel), 0.0, 1.0)
    s, t = _rotate(
        u * np.float32(item.frequency), v * np.float32(item.frequency), item.texture_angle
    )
    if item.texture not in ("rings", "spokes"):
        s, t = s + np.float32(item.phase[0]), t + np.float32(item.phase[1])
    colour = _mix(item.colours[0], item.colours[1], TEXTURES[item.texture](s, t))
    mark = _part_mask(item.part, u, v)
    if mark is not None:
        colour[mark] = item.colours[2]
    shade = (
        np.float32(0.82)
        - np.float32(0.18) * (u * 0.5 + v * 0.5)
        + np.float32(0.2) * np.minimum(-signed, 0.5)
    )
    colour *= shade[..., None]
    image = canvas.image[window]
    image += cover[..., None] * (colour - image)
    inside = cover > 0.5
    canvas.ids[window][inside] = item.object_id
    canvas.depth[window][inside] = item.depth


def _paint_context(scene: Scene, x: np.ndarray, y: np.ndarray, camera: Camera) -> np.ndarray:
    surroundings = CONTEXTS[scene.context]
    scale = np.float32(BACKGROUND_DEPTH / (FOCAL_LENGTH * camera.zoom))
    u, v = np.meshgrid(x, y)
    u, v = _rotate(u, v, camera.roll)
    u, v = u * scale + np.float32(camera.x), v * scale + np.float32(camera.y)
    s, t = _rotate(
        u * np.float32(surroundings.frequency),
        v * np.float32(surroundings.frequency),
        scene.context_angle,
    )
    weight = TEXTURES[surroundings.texture](
        s + np.float32(scene.context_phase[0]), t + np.float32(scene.context_phase[1])
    )
    return _mix(scene.context_colours[0], scene.context_colours[1], weight)


def render(scene: Scene, size: int, camera: Camera | None = None, time: float = 0.0) -> Rendering:
    """Paint ``scene`` as ``camera`` sees it at ``time``, on a square of ``size`` pixels."""
    camera = camera or Camera()
    pixel = 2.0 / size
    grid = ((np.arange(size, dtype=np.float32) + 0.5) * np.float32(pixel) - 1.0).astype(np.float32)
    colour = _paint_context(scene, grid, grid, camera)
    canvas = Rendering(
        colour,
        np.zeros((size, size), np.uint8),
        np.full((size, size), BACKGROUND_DEPTH, np.float32),
    )
    for item in scene.objects:
        _paint_object(item.at(time), grid, grid, camera, canvas, pixel)
    slope = 1.0 + scene.light_slope[0] * grid[None, :] + scene.light_slope[1] * grid[:, None]
    lit = colour * slope[..., None] * np.float32(scene.light)
    lit = (lit - 0.5) * np.float32(scene.contrast) + 0.5
    image = np.clip(lit * 255.0 + 0.5, 0, 255).astype(np.uint8)
    return canvas._replace(image=image)

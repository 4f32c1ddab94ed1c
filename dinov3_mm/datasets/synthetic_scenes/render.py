"""SyntheticScenes: an endless labelled source that needs no files, and the painting of a scene."""

import mmap
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from mmengine.registry import DATASETS

from dinov3_mm.datasets.order import sample_generator

from .patterns import SILHOUETTES, TEXTURES
from .scene import (
    BACKGROUND_DEPTH,
    CATEGORIES,
    CONTEXTS,
    FOCAL_LENGTH,
    Camera,
    Scene,
    SceneObject,
    draw_scene,
)

# --- Painting a scene: colour, object ids and depth, from far to near with smooth outlines ---


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


# --- The source ---


@DATASETS.register_module()
class SyntheticScenes:
    """Rendered scenes of textured shapes, each a pure function of ``(seed, index)``.

    A scene has one main object and up to three smaller ones over textured surroundings, with
    occlusion, parallax, changes of light and scale. The label is the category of the largest
    object. Categories have correlated cues (silhouette, texture, mark, hue, surroundings), none of
    which decides alone.

    Args:
        length: Number of scenes.
        seed: Selects the world; scenes of two seeds have nothing in common.
        start: Index of the first scene, so that disjoint ranges of one seed can serve training
            and testing.
        image_size: Side of the square images in pixels.
        cache: Keep rendered images in memory that worker processes share: a scene is then painted
            once a run.

    Raises:
        ValueError: If ``length`` or ``image_size`` is not positive or ``start`` is negative.
    """

    classes: tuple[str, ...] = tuple(item.name for item in CATEGORIES)
    num_classes: int = len(CATEGORIES)
    num_semantic_classes: int = len(CATEGORIES) + 1

    def __init__(
        self,
        length: int,
        seed: int = 0,
        start: int = 0,
        image_size: int = 96,
        cache: bool = False,
    ) -> None:
        if length < 1 or image_size < 8 or start < 0:
            raise ValueError(
                "SyntheticScenes needs length >= 1, image_size >= 8 and start >= 0, "
                f"got length={length}, image_size={image_size}, start={start}"
            )
        self.length = length
        self.seed = seed
        self.start = start
        self.image_size = image_size
        self.cache = cache
        self._allocate_cache()

    def _allocate_cache(self) -> None:
        """Anonymous shared memory: forked workers fill and read the same pages."""
        self._cached_images = self._cached_flags = None
        if self.cache:
            shape = (self.length, self.image_size, self.image_size, 3)
            memory = mmap.mmap(-1, int(np.prod(shape)) + self.length)
            flags_at = int(np.prod(shape))
            self._cached_images = np.frombuffer(memory, np.uint8, flags_at).reshape(shape)
            self._cached_flags = np.frombuffer(memory, np.uint8, self.length, flags_at)

    def __getstate__(self) -> dict:
        return dict(self.__dict__, _cached_images=None, _cached_flags=None)

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._allocate_cache()

    def __len__(self) -> int:
        return self.length

    def path(self, index: int) -> str:
        """Return the name of a scene for messages and result files."""
        return f"scene-{self.seed}-{self.start + self._checked(index)}"

    def scene(self, index: int) -> Scene:
        """Return the scene graph of ``index``."""
        return _scene(self.seed, self.start + self._checked(index))

    def render(self, index: int, camera: Camera | None = None, time: float = 0.0) -> Rendering:
        """Return colour, object ids and depth of a scene for any camera and time."""
        return render(self.scene(index), self.image_size, camera, time)

    def load_image(self, index: int) -> np.ndarray:
        """Return the (S, S, 3) uint8 RGB image of a scene."""
        if self._cached_flags is None:
            return self.render(index).image
        if not self._cached_flags[self._checked(index)]:
            self._cached_images[index] = self.render(index).image
            self._cached_flags[index] = 1
        return self._cached_images[index].copy()

    def label(self, index: int) -> int:
        """Return the category of the largest object."""
        return self.scene(index).main_object.category

    def semantic_mask(self, index: int) -> np.ndarray:
        """Return the (S, S) int64 map of categories plus one; 0 is the surroundings."""
        lookup = np.zeros(256, np.int64)
        for item in self.scene(index).objects:
            lookup[item.object_id] = item.category + 1
        return lookup[self.render(index).ids]

    def instances(self, index: int) -> dict[str, np.ndarray]:
        """Return the visible objects of a scene.

        Returns:
            ``ids (N,)`` and ``labels (N,)`` int64, ``boxes (N, 4)`` float32 as x1, y1, x2, y2 in
            pixels (exclusive ends), ``masks (N, S, S)`` bool, sorted by id; objects that are hidden
            altogether are left out.
        """
        ids = self.render(index).ids
        categories = {item.object_id: item.category for item in self.scene(index).objects}
        visible = [number for number in sorted(categories) if (ids == number).any()]
        masks = np.stack([ids == number for number in visible])
        boxes = []
        for mask in masks:
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
        return dict(
            ids=np.array(visible, np.int64),
            labels=np.array([categories[number] for number in visible], np.int64),
            boxes=np.array(boxes, np.float32),
            masks=masks,
        )

    def depth(self, index: int) -> np.ndarray:
        """Return the (S, S) float32 depth map in world units."""
        return self.render(index).depth

    def second_view(self, index: int) -> tuple[Rendering, Camera]:
        """Return the scene from a second, deterministic camera, and that camera."""
        rng = sample_generator(self.seed, "second-view", self.start + self._checked(index))
        camera = Camera(
            x=float(rng.uniform(-0.35, 0.35)),
            y=float(rng.uniform(-0.35, 0.35)),
            zoom=float(np.exp(rng.uniform(-0.15, 0.25))),
            roll=float(rng.uniform(-0.35, 0.35)),
        )
        return self.render(index, camera), camera

    def clip(self, index: int, num_frames: int = 8, duration: float = 2.0) -> list[Rendering]:
        """Return ``num_frames`` renderings at equal steps of time over ``duration``."""
        times = np.linspace(0.0, duration, num_frames)
        return [self.render(index, time=float(time)) for time in times]

    def facts(self, index: int) -> dict:
        """Return what a caption can say: the surroundings, and the objects from the largest on."""
        scene = self.scene(index)
        objects = sorted(scene.objects, key=lambda item: -item.apparent_radius)
        return dict(
            context=scene.context,
            objects=[
                dict(
                    category=self.classes[item.category],
                    silhouette=item.silhouette,
                    texture=item.texture,
                    part=item.part,
                    horizontal="left" if item.x < 0 else "right",
                    vertical="top" if item.y < 0 else "bottom",
                )
                for item in objects
            ],
        )

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of a set of {self.length} scenes")
        return int(index)


@lru_cache(maxsize=64)
def _scene(seed: int, index: int) -> Scene:
    return draw_scene(sample_generator(seed, "scene", index))

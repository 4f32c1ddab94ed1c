"""SyntheticScenes: an endless labelled image source that needs no files."""

import mmap
from functools import lru_cache

import numpy as np
from mmengine.registry import DATASETS

from dinov3_mm.datasets.randomness import sample_generator
from dinov3_mm.datasets.synthetic_scenes.categories import CATEGORIES
from dinov3_mm.datasets.synthetic_scenes.render import Rendering, render
from dinov3_mm.datasets.synthetic_scenes.scene import Camera, Scene, draw_scene


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

"""The scene graph of SyntheticScenes: objects, surroundings and light, and cameras on them."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .patterns import SILHOUETTES, TEXTURES

# --- The twelve categories of SyntheticScenes: which cues usually go together ---
#
# As with natural categories no single cue decides: an object takes each typical cue of its
# category with the probability in ``CUE_PROBABILITY`` and otherwise a cue drawn from all.


class Category(NamedTuple):
    """Typical cues of one category.

    Attributes:
        name: What the category is called in captions.
        silhouette: Key of ``patterns.SILHOUETTES``.
        texture: Key of ``patterns.TEXTURES``.
        part: Key of ``PARTS``, a mark on the object.
        hue: Typical hue in [0, 1).
        context: Key of ``CONTEXTS``, the surroundings it is usually seen in.
    """

    name: str
    silhouette: str
    texture: str
    part: str
    hue: float
    context: str


CATEGORIES: tuple[Category, ...] = (
    Category("fish", "fish", "ripples", "eye", 0.55, "water"),
    Category("leaf", "leaf", "stripes", "rib", 0.30, "meadow"),
    Category("flower", "flower", "spokes", "core", 0.90, "meadow"),
    Category("gear", "gear", "rings", "hole", 0.08, "workshop"),
    Category("brick", "box", "bricks", "none", 0.02, "wall"),
    Category("starfish", "star", "dots", "core", 0.06, "beach"),
    Category("moon", "crescent", "mottle", "none", 0.15, "night"),
    Category("buoy", "ring", "hatch", "none", 0.97, "water"),
    Category("pill", "capsule", "plain", "band", 0.75, "workshop"),
    Category("kite", "triangle", "checks", "rib", 0.45, "sky"),
    Category("medkit", "cross", "grain", "core", 0.65, "wall"),
    Category("sign", "arrow", "zigzag", "eye", 0.20, "night"),
)

PARTS: tuple[str, ...] = ("none", "eye", "core", "hole", "rib", "band")


class Context(NamedTuple):
    """Surroundings: texture and its frequency, brightness of the two tones, typical hue."""

    texture: str
    frequency: float
    dark: float
    bright: float
    hue: float


CONTEXTS: dict[str, Context] = {
    "water": Context("ripples", 2.2, 0.38, 0.6, 0.52),
    "meadow": Context("grain", 1.6, 0.34, 0.58, 0.28),
    "workshop": Context("checks", 3.2, 0.4, 0.56, 0.08),
    "wall": Context("bricks", 1.6, 0.38, 0.6, 0.98),
    "beach": Context("mottle", 3.0, 0.44, 0.64, 0.14),
    "night": Context("dots", 1.4, 0.3, 0.52, 0.70),
    "sky": Context("ramp", 0.8, 0.42, 0.66, 0.58),
}

CUE_PROBABILITY: dict[str, float] = {
    "silhouette": 0.9,
    "texture": 0.9,
    "part": 0.9,
    "hue": 0.8,
    "context": 0.9,
    "context_hue": 0.8,
}


# --- Objects, light and a camera ---


BACKGROUND_DEPTH = 6.0
FOCAL_LENGTH = 3.0


@dataclass(frozen=True)
class Camera:
    """A pin-hole camera that looks along the depth axis.

    Attributes:
        x, y: Position in world units; parallax moves near objects more than far ones.
        zoom: Factor on the focal length.
        roll: Rotation about the viewing axis in radians.
    """

    x: float = 0.0
    y: float = 0.0
    zoom: float = 1.0
    roll: float = 0.0


@dataclass(frozen=True)
class SceneObject:
    """One object: where it is, how it moves, what it looks like.

    Positions and radii are world units, depths distances from the camera plane; velocities are per
    unit of time.
    """

    object_id: int
    category: int
    x: float
    y: float
    depth: float
    radius: float
    angle: float
    velocity: tuple[float, float]
    spin: float
    silhouette: str
    texture: str
    part: str
    frequency: float
    phase: tuple[float, float]
    texture_angle: float
    colours: tuple[tuple[float, float, float], ...]

    def at(self, time: float) -> "SceneObject":
        """Return the object as it stands at ``time``."""
        return replace(
            self,
            x=self.x + self.velocity[0] * time,
            y=self.y + self.velocity[1] * time,
            angle=self.angle + self.spin * time,
        )

    @property
    def apparent_radius(self) -> float:
        """Radius in the image of the standard camera, in half image heights."""
        return self.radius * FOCAL_LENGTH / self.depth


@dataclass(frozen=True)
class Scene:
    """A scene: objects sorted from far to near, surroundings and light."""

    objects: tuple[SceneObject, ...]
    context: str
    context_colours: tuple[tuple[float, float, float], ...]
    context_phase: tuple[float, float]
    context_angle: float
    light: tuple[float, float, float]
    contrast: float
    light_slope: tuple[float, float]

    @property
    def main_object(self) -> SceneObject:
        """The object that appears largest; its category is the label of the scene."""
        return max(self.objects, key=lambda item: item.apparent_radius)


def _hsv(hue: float, saturation: float, value: float) -> tuple[float, float, float]:
    sector = np.mod(np.array([5.0, 3.0, 1.0]) + hue * 6.0, 6.0)
    ramp = np.clip(np.minimum(sector, 4.0 - sector), 0.0, 1.0)
    return tuple((value - value * saturation * ramp).tolist())


def _cue(rng: np.random.Generator, cue: str, typical, others):
    if rng.random() < CUE_PROBABILITY[cue]:
        return typical
    return others[rng.integers(len(others))]


def _draw_colours(rng: np.random.Generator, hue: float) -> tuple:
    if rng.random() >= CUE_PROBABILITY["hue"]:
        hue = rng.random()
    hue += rng.normal(0.0, 0.04)
    first = _hsv(hue, rng.uniform(0.45, 0.95), rng.uniform(0.65, 1.0))
    second = _hsv(hue + rng.normal(0.0, 0.12), rng.uniform(0.2, 0.9), rng.uniform(0.1, 0.45))
    accent = _hsv(hue + 0.5 + rng.normal(0.0, 0.1), rng.uniform(0.3, 0.9), rng.uniform(0.5, 1.0))
    return first, second, accent


def _draw_object(
    rng: np.random.Generator, object_id: int, category: int, apparent: float, reach: float
) -> SceneObject:
    typical = CATEGORIES[category]
    depth = rng.uniform(2.0, 5.0)
    position = rng.uniform(-reach, reach, 2) * depth / FOCAL_LENGTH
    return SceneObject(
        object_id=object_id,
        category=category,
        x=float(position[0]),
        y=float(position[1]),
        depth=float(depth),
        radius=float(apparent * depth / FOCAL_LENGTH),
        angle=float(rng.uniform(-np.pi, np.pi)),
        velocity=tuple(rng.normal(0.0, 0.15, 2).tolist()),
        spin=float(rng.normal(0.0, 0.3)),
        silhouette=_cue(rng, "silhouette", typical.silhouette, tuple(SILHOUETTES)),
        texture=_cue(rng, "texture", typical.texture, tuple(TEXTURES)),
        part=_cue(rng, "part", typical.part, PARTS),
        frequency=float(np.exp(rng.uniform(np.log(2.0), np.log(3.6)))),
        phase=tuple(rng.uniform(-4.0, 4.0, 2).tolist()),
        texture_angle=float(rng.uniform(-np.pi, np.pi)),
        colours=_draw_colours(rng, typical.hue),
    )


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene: a main object, one to three smaller ones of other categories, and light."""
    main = int(rng.integers(len(CATEGORIES)))
    apparent = rng.uniform(0.5, 0.85)
    objects = [_draw_object(rng, 1, main, apparent, reach=0.35)]
    for object_id in range(2, 2 + int(rng.integers(1, 4))):
        other = (main + int(rng.integers(1, len(CATEGORIES)))) % len(CATEGORIES)
        size = apparent * rng.uniform(0.25, 0.5)
        objects.append(_draw_object(rng, object_id, other, size, reach=0.95))
    context = _cue(rng, "context", CATEGORIES[main].context, tuple(CONTEXTS))
    surroundings = CONTEXTS[context]
    typical_hue = rng.random() < CUE_PROBABILITY["context_hue"]
    hue = surroundings.hue + rng.normal(0, 0.05) if typical_hue else rng.random()
    saturation = rng.uniform(0.05, 0.5)
    return Scene(
        objects=tuple(sorted(objects, key=lambda item: -item.depth)),
        context=context,
        context_colours=(
            _hsv(hue, saturation, surroundings.dark),
            _hsv(hue + rng.normal(0, 0.08), saturation, surroundings.bright),
        ),
        context_phase=tuple(rng.uniform(-4.0, 4.0, 2).tolist()),
        context_angle=float(rng.normal(0.0, 0.25)),
        light=tuple((rng.uniform(0.55, 1.25) * np.exp(rng.normal(0.0, 0.12, 3))).tolist()),
        contrast=float(rng.uniform(0.6, 1.2)),
        light_slope=tuple(rng.normal(0.0, 0.18, 2).tolist()),
    )

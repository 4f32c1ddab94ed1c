"""The twelve categories of SyntheticScenes: which cues usually go together.

As with natural categories no single cue decides: an object takes each typical cue of its category
with the probability in ``CUE_PROBABILITY`` and otherwise a cue drawn from all.
"""

from typing import NamedTuple


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

"""What one multi-crop draw decides, as plain data, and how the pieces are drawn.

Drawing is kept apart from applying: the same parameters can be applied by another implementation,
which is how the pixel operations are compared with torchvision.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

_RESIZED_CROP_TRIES = 10


@dataclass(frozen=True, slots=True)
class Box:
    """Rectangle in pixels: rows ``top .. top + height``, columns ``left .. left + width``."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Distortion:
    """Photometric part of a crop.

    Attributes:
        jitter (tuple[tuple[str, float], ...]): Colour operations in the order of application, each
            ``brightness``, ``contrast``, ``saturation`` or ``hue`` with its factor.
        grayscale (bool): Replace the colours by luma.
        blur_sigma (float | None): Standard deviation of the Gaussian blur in pixels.
        solarize (bool): Invert the values from the threshold on.
        dropped (tuple[int, ...]): Channels that are set to 0.
    """

    jitter: tuple[tuple[str, float], ...] = ()
    grayscale: bool = False
    blur_sigma: float | None = None
    solarize: bool = False
    dropped: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class CropParams:
    """One crop.

    Attributes:
        box (Box): Region of the image, or of the base crop ``base`` after its flip.
        flip (bool): Mirror left to right.
        distortion (Distortion): Photometric part.
        base (int | None): Index of the global crop that the region is cut from; None: the image.
    """

    box: Box
    flip: bool
    distortion: Distortion
    base: int | None = None


@dataclass(frozen=True, slots=True)
class MultiCropParams:
    """All decisions for one image.

    Attributes:
        global_crops (list[CropParams]): The two global crops.
        local_crops (list[CropParams]): The local crops.
        shared (Distortion): Colour jitter and grayscale of the whole image before cropping.
    """

    global_crops: list[CropParams]
    local_crops: list[CropParams]
    shared: Distortion = field(default_factory=Distortion)


def without_colors(params: MultiCropParams) -> MultiCropParams:
    """The geometry alone."""
    return MultiCropParams(
        *(
            [replace(crop, distortion=Distortion()) for crop in crops]
            for crops in (params.global_crops, params.local_crops)
        )
    )


class Uniforms:
    """Uniform numbers in [0, 1) taken from a generator in blocks, which is faster than singly."""

    def __init__(self, rng: np.random.Generator, block: int = 256) -> None:
        self._rng = rng
        self._block = block
        self._values = iter(())

    def __call__(self) -> float:
        for value in self._values:
            return value
        self._values = iter(self._rng.random(self._block).tolist())
        return next(self._values)

    def between(self, low: float, high: float) -> float:
        """Real number in ``[low, high)``."""
        return low + (high - low) * self()

    def below(self, bound: int) -> int:
        """Integer in ``range(bound)``."""
        return int(self() * bound)


def draw_resized_crop(
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    uniform: Uniforms,
) -> Box:
    """Region of a random resized crop: area share ``scale``, log-uniform aspect ratio ``ratio``.

    Follows torchvision's ``RandomResizedCrop``: ten tries, then the largest central region whose
    aspect ratio is allowed.
    """
    area = height * width
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_RESIZED_CROP_TRIES):
        target = area * uniform.between(*scale)
        aspect = math.exp(uniform.between(log_low, log_high))
        crop_width = round(math.sqrt(target * aspect))
        crop_height = round(math.sqrt(target / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = uniform.below(height - crop_height + 1)
            left = uniform.below(width - crop_width + 1)
            return Box(top, left, crop_height, crop_width)
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        crop_width = round(height * ratio[1])
    return Box((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


@dataclass(frozen=True, slots=True)
class ColorJitter:
    """Ranges of the colour jitter, as torchvision's ``ColorJitter`` takes them.

    Attributes:
        brightness (float): Factor in ``[max(0, 1 - brightness), 1 + brightness]``.
        contrast (float): Likewise.
        saturation (float): Likewise.
        hue (float): Shift in ``[-hue, hue]`` of a full turn, at most 0.5.

    Raises:
        ValueError: If a range is negative or ``hue > 0.5``.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation", "hue"):
            if getattr(self, name) < 0:
                raise ValueError(f"jitter {name} must be >= 0, got {getattr(self, name)}")
        if self.hue > 0.5:
            raise ValueError(f"jitter hue must be <= 0.5 of a turn, got {self.hue}")

    def draw(self, uniform: Uniforms) -> tuple[tuple[str, float], ...]:
        """Operations of positive range in random order, each with its factor."""
        drawn = []
        for name in ("brightness", "contrast", "saturation"):
            if strength := getattr(self, name):
                drawn.append((name, uniform.between(max(0.0, 1 - strength), 1 + strength)))
        if self.hue:
            drawn.append(("hue", uniform.between(-self.hue, self.hue)))
        _shuffle(drawn, uniform.below)
        return tuple(drawn)


def _shuffle(items: list, below: Callable[[int], int]) -> None:
    """Fisher-Yates in place."""
    for last in range(len(items) - 1, 0, -1):
        other = below(last + 1)
        items[last], items[other] = items[other], items[last]

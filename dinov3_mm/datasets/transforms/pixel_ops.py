"""What one multi-crop draw decides, as plain data, and the image operations that carry it out."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import torch
from torch.nn.functional import interpolate

# --- What one multi-crop draw decides, as plain data, and how the pieces are drawn ---
#
# Drawing is kept apart from applying: the same parameters can be applied by another
# implementation, which is how the pixel operations are compared with torchvision.


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


# --- Image operations of the multi-crop augmentation on HWC arrays, uint8 or float32 in 0..255 ---
#
# On uint8 they give what torchvision's PIL transforms give to within a few grey levels, several
# times faster: torch's integer bicubic kernel for resizing, OpenCV's integer kernels for colours
# and blur. The ``benchmarks/data_pipeline.py`` script measures the differences and the speed. On
# float32, the form of 16-bit and float images, they are the same operations without rounding.


LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# PIL truncates the result of a blend where OpenCV rounds it.
_TRUNCATE = -0.498
# A Gaussian tap below half a grey level of full contrast changes nothing in 8 bits.
_NEGLIGIBLE_TAP = 1 / 512
# OpenCV 5 takes no more channels for one pixel; earlier versions take more.
_MAX_CHANNELS = 128
_FAST_CHANNELS = 4


def crop_resize(image: np.ndarray, box: Box, size: int) -> np.ndarray:
    """Cut ``box`` from an ``(H, W, C)`` image and resize it to ``(size, size, C)``.

    Bicubic with antialiasing, as ``PIL.Image.resize(..., BICUBIC)`` on the cropped image; the
    result stays within 0..255.
    """
    region = image[box.top : box.top + box.height, box.left : box.left + box.width].copy()
    if box.height == size and box.width == size:
        return region
    resized = np.empty((size, size, image.shape[2]), image.dtype)
    if image.dtype == np.float32:
        return _clip(_resize_into(region, resized))
    if image.shape[2] <= _FAST_CHANNELS:
        return _resize_into(region, resized)
    # The integer kernel is six times faster on up to four channels.
    for first in range(0, image.shape[2], _FAST_CHANNELS):
        part = np.ascontiguousarray(region[..., first : first + _FAST_CHANNELS])
        target = np.empty((size, size, part.shape[2]), np.uint8)
        resized[..., first : first + _FAST_CHANNELS] = _resize_into(part, target)
    return resized


def _resize_into(region: np.ndarray, resized: np.ndarray) -> np.ndarray:
    """Fill ``resized`` with the whole of ``region``."""
    # The operator behind torch.nn.functional.interpolate, which has no ``out`` and would return
    # separate colour planes; interleaved output is twice as fast, and what OpenCV works on.
    torch.ops.aten._upsample_bicubic2d_aa.out(
        _as_nchw(region), list(resized.shape[:2]), False, out=_as_nchw(resized)
    )
    return resized


def resize_float(image: np.ndarray, size: int) -> np.ndarray:
    """Resize an ``(H, W, C)`` image to ``(size, size, C)`` float32 without rounding or clipping."""
    resized = interpolate(_as_nchw(image).float(), (size, size), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def _as_nchw(image: np.ndarray) -> torch.Tensor:
    """``(1, C, H, W)`` channels-last view of an ``(H, W, C)`` array."""
    return torch.from_numpy(image[None]).permute(0, 3, 1, 2)


def flip(image: np.ndarray) -> np.ndarray:
    """Mirror an ``(H, W, C)`` image left to right."""
    if image.shape[2] > _MAX_CHANNELS:
        return np.ascontiguousarray(image[:, ::-1])
    return cv2.flip(image, 1).reshape(image.shape)


def distort(
    image: np.ndarray, params: Distortion, blur_kernel: int, solarize_threshold: int
) -> np.ndarray:
    """Apply jitter, grayscale, blur, solarisation and dropping, in this order, to ``(H, W, C)``.

    Saturation, hue and grayscale are defined for three channels and are left out for any other
    number.
    """
    shape = image.shape
    has_colors = shape[2] == 3
    for name, factor in params.jitter:
        if name == "brightness":
            image = adjust_brightness(image, factor)
        elif name == "contrast":
            image = adjust_contrast(image, factor)
        elif has_colors:
            image = (adjust_saturation if name == "saturation" else adjust_hue)(image, factor)
    if params.grayscale and has_colors:
        image = grayscale(image)
    if params.blur_sigma is not None:
        image = gaussian_blur(image, params.blur_sigma, blur_kernel)
    if params.solarize:
        image = solarize(image, solarize_threshold)
    image = image.reshape(shape)
    if params.dropped:
        image = image.copy()
        image[..., params.dropped] = 0
    return image


def adjust_brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """``factor * image``, clipped."""
    if image.dtype == np.float32:
        return _clip(image * np.float32(factor))
    return cv2.convertScaleAbs(image, alpha=factor, beta=_TRUNCATE if factor else 0)


def adjust_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """``factor * image + (1 - factor) * mean luma``, clipped."""
    if image.ndim == 3 and image.shape[2] == 3:
        mean = float(np.dot(cv2.mean(image)[:3], LUMA))
    else:
        mean = cv2.mean(image.reshape(image.shape[0], -1))[0]
    if image.dtype == np.float32:
        return _clip(image * np.float32(factor) + np.float32((1 - factor) * mean))
    offset = (1 - factor) * int(mean + 0.5) + _TRUNCATE
    return cv2.addWeighted(image, factor, image, 0, offset)


def adjust_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """``factor * image + (1 - factor) * luma``, clipped; three channels."""
    matrix = np.empty((3, 4), np.float32)
    matrix[:, :3] = (1 - factor) * LUMA
    matrix[:, 3] = _TRUNCATE if image.dtype == np.uint8 else 0
    matrix[(0, 1, 2), (0, 1, 2)] += factor
    turned = cv2.transform(image, matrix)
    return turned if turned.dtype == np.uint8 else _clip(turned)


def adjust_hue(image: np.ndarray, factor: float) -> np.ndarray:
    """Turn the hue by ``factor`` of a full circle in HSV; three channels."""
    if image.dtype == np.float32:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0] + np.float32(factor * 360)) % 360
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(factor * 255) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def grayscale(image: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma, repeated over the three channels."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def gaussian_blur(image: np.ndarray, sigma: float, kernel_size: int) -> np.ndarray:
    """Gaussian blur of odd ``kernel_size`` with mirrored borders (the edge pixel not repeated)."""
    if image.dtype == np.float32:
        return _filter(image, cv2.getGaussianKernel(kernel_size, sigma, cv2.CV_32F))
    radius = kernel_size // 2
    reach = sigma * math.sqrt(-2 * math.log(_NEGLIGIBLE_TAP))
    kernel = cv2.getGaussianKernel(kernel_size, sigma, cv2.CV_32F)
    if reach < 1:
        return image
    if reach < radius:
        cut = radius - int(reach)
        kernel = kernel[cut:-cut] / kernel[cut:-cut].sum()
    return _filter(image, kernel)


def _filter(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Filter rows and columns of every channel with ``kernel``."""
    if image.ndim == 3 and image.shape[2] > _MAX_CHANNELS:
        starts = range(0, image.shape[2], _MAX_CHANNELS)
        parts = [image[..., start : start + _MAX_CHANNELS] for start in starts]
        return np.dstack([_filter(np.ascontiguousarray(part), kernel) for part in parts])
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REFLECT_101)


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Invert every value from ``threshold`` on."""
    if image.dtype == np.float32:
        return np.where(image < threshold, image, 255 - image)
    values = np.arange(256)
    return cv2.LUT(image, np.where(values < threshold, values, 255 - values).astype(np.uint8))


def to_chw(image: np.ndarray) -> np.ndarray:
    """``(H, W, C)`` to contiguous ``(C, H, W)``."""
    if image.shape[2] > _MAX_CHANNELS:
        return np.ascontiguousarray(image.transpose(2, 0, 1))
    planes = np.empty((image.shape[2], *image.shape[:2]), image.dtype)
    cv2.split(image, list(planes))
    return planes


def _clip(image: np.ndarray) -> np.ndarray:
    """Clip a fresh float image to 0..255 in place."""
    return np.clip(image, 0, 255, out=image)

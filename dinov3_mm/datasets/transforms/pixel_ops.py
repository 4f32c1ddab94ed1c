"""Image operations of the multi-crop augmentation on HWC arrays, uint8 or float32 in 0..255.

On uint8 they give what torchvision's PIL transforms give to within a few grey levels, several times
faster: torch's integer bicubic kernel for resizing, OpenCV's integer kernels for colours and blur.
The ``benchmarks/data_pipeline.py`` script measures the differences and the speed. On float32, the
form of 16-bit and float images, they are the same operations without rounding.
"""

import math

import cv2
import numpy as np
import torch
from torch.nn.functional import interpolate

from dinov3_mm.datasets.transforms.params import Box, Distortion

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

"""Colour changes of images for dense heads, as in DINOv3's linear segmentation protocol."""

from typing import Any

import numpy as np
import torch
from mmengine.registry import TRANSFORMS
from torchvision.transforms.v2 import functional as F


@TRANSFORMS.register_module()
class DINOv3PhotoMetricDistortion:
    """Brightness, contrast, saturation and hue, each changed with probability one half.

    Contrast comes before or after saturation and hue, by a coin. Between the steps values are
    clipped and truncated to uint8. mmseg's ``PhotoMetricDistortion`` has the same course; this one
    turns hue through the full circle in place of a tenth of it, and changes saturation by blending
    with the grey image.

    Args:
        brightness_delta: largest amount that is added, in grey levels.
        contrast_range: factors of the values.
        saturation_range: factors of the distance to grey.
        hue_delta: largest turn, as a share of the circle; at most 0.5.

    Raises:
        ValueError: If ``hue_delta`` is not in 0..0.5 or a range does not ascend from 0.
    """

    def __init__(
        self,
        *,
        brightness_delta: float = 32.0,
        contrast_range: tuple[float, float] = (0.5, 1.5),
        saturation_range: tuple[float, float] = (0.5, 1.5),
        hue_delta: float = 0.5,
    ) -> None:
        for name, (low, high) in (("contrast", contrast_range), ("saturation", saturation_range)):
            if not 0 <= low <= high:
                raise ValueError(f"{name}_range is {(low, high)}; expected 0 <= low <= high")
        if not 0 <= hue_delta <= 0.5:
            raise ValueError(f"hue_delta is {hue_delta}; expected 0 to 0.5, a share of the circle")
        self.brightness_delta = brightness_delta
        self.contrast_range = tuple(contrast_range)
        self.saturation_range = tuple(saturation_range)
        self.hue_delta = hue_delta

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Change ``results['img']``, an image (H, W, 3) of uint8, channels blue, green, red.

        Raises:
            ValueError: If it is another kind of image.
        """
        image = results["img"]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"DINOv3PhotoMetricDistortion got {image.dtype} of shape {image.shape}; expected "
                "uint8 (H, W, 3). Leave it out for images of other kinds"
            )
        delta = self._draw(-self.brightness_delta, self.brightness_delta)
        contrast = self._draw(*self.contrast_range)
        first = bool(np.random.randint(2))
        saturation = self._draw(*self.saturation_range)
        hue = self._draw(-self.hue_delta, self.hue_delta)
        image = _affine(image, 1.0, delta)
        if first:
            image = _affine(image, contrast, None)
        image = _colours(image, saturation, hue)
        if not first:
            image = _affine(image, contrast, None)
        results["img"] = image
        return results

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(brightness_delta={self.brightness_delta}, "
            f"contrast_range={self.contrast_range}, saturation_range={self.saturation_range}, "
            f"hue_delta={self.hue_delta})"
        )

    @staticmethod
    def _draw(low: float, high: float) -> float | None:
        """A number between two, or None half of the time."""
        return np.random.uniform(low, high) if np.random.randint(2) else None


def _affine(image: np.ndarray, factor: float | None, offset: float | None) -> np.ndarray:
    """``image * factor + offset``; None leaves one out, and both leave the image."""
    if factor in (None, 1.0) and offset is None:
        return image
    values = image.astype(np.float32) * (1.0 if factor is None else factor) + (offset or 0.0)
    return np.clip(values, 0, 255).astype(np.uint8)


def _colours(image: np.ndarray, saturation: float | None, hue: float | None) -> np.ndarray:
    """Saturation, then hue."""
    if saturation is None and hue is None:
        return image
    rgb = torch.from_numpy(np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1)))
    if saturation is not None:
        rgb = F.adjust_saturation(rgb, saturation)
    if hue is not None:
        rgb = F.adjust_hue(rgb, hue)
    return np.ascontiguousarray(rgb.numpy().transpose(1, 2, 0)[..., ::-1])

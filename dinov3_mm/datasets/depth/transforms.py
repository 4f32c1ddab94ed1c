"""Augmentations of images with depth, and the resizing of the depth evaluations.

Images are (H, W, 3) of uint8 or float32 from 0 to 255; those that come out are float32.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mmengine.registry import TRANSFORMS
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

# x and y from which and to which NYUv2's images of 640 x 480 hold a picture, the ends exclusive.
_NYU_COLUMNS, _NYU_ROWS = (43, 608), (45, 472)
_NYU_SIZE = (480, 640)


def _to_tensor(array: np.ndarray) -> Tensor:
    """(H, W) or (H, W, C) to (C, H, W), float32."""
    array = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), np.float32))


def _to_array(tensor: Tensor) -> np.ndarray:
    """The inverse; one channel becomes (H, W)."""
    array = tensor.numpy().transpose(1, 2, 0)
    return np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array)


@TRANSFORMS.register_module()
class NYUBorderCrop:
    """Cuts off the white border of NYUv2's images, of image and maps."""

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        height, width = results["img"].shape[:2]
        top, bottom = (y * height // _NYU_SIZE[0] for y in _NYU_ROWS)
        left, right = (x * width // _NYU_SIZE[1] for x in _NYU_COLUMNS)
        for key in ("img", *results.get("seg_fields", [])):
            results[key] = np.ascontiguousarray(results[key][top:bottom, left:right])
        results["img_shape"] = results["img"].shape[:2]
        return results

    def __repr__(self) -> str:
        return "NYUBorderCrop()"


@TRANSFORMS.register_module()
class RandomDepthRotation:
    """Turns image (bilinear) and maps (nearest) around their middle; corners become 0.

    Args:
        prob: probability.
        max_angle: the angle is uniform from minus to plus this, in degrees.
    """

    def __init__(self, *, prob: float = 0.5, max_angle: float = 2.5) -> None:
        self.prob = prob
        self.max_angle = max_angle

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        if np.random.rand() >= self.prob:
            return results
        angle = np.random.uniform(-self.max_angle, self.max_angle)
        for key in ("img", *results.get("seg_fields", [])):
            mode = InterpolationMode.BILINEAR if key == "img" else InterpolationMode.NEAREST
            results[key] = _to_array(F.rotate(_to_tensor(results[key]), angle, mode))
        return results

    def __repr__(self) -> str:
        return f"RandomDepthRotation(prob={self.prob}, max_angle={self.max_angle})"


@TRANSFORMS.register_module()
class RandomGammaBrightness:
    """Gamma on values from 0 to 255, then a factor for all channels and one for each.

    Args:
        prob: probability.
        gamma, brightness, color: ranges of the exponent, the common and the channels' factors.
    """

    def __init__(
        self,
        *,
        prob: float = 0.5,
        gamma: Sequence[float] = (0.9, 1.1),
        brightness: Sequence[float] = (0.75, 1.25),
        color: Sequence[float] = (0.9, 1.1),
    ) -> None:
        self.prob = prob
        self.gamma = tuple(gamma)
        self.brightness = tuple(brightness)
        self.color = tuple(color)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        if np.random.rand() >= self.prob:
            return results
        image = results["img"].astype(np.float32) ** np.float32(np.random.uniform(*self.gamma))
        image *= np.float32(np.random.uniform(*self.brightness))
        image *= np.random.uniform(*self.color, size=image.shape[2]).astype(np.float32)
        results["img"] = np.minimum(image, 255.0)
        return results

    def __repr__(self) -> str:
        return (
            f"RandomGammaBrightness(prob={self.prob}, gamma={self.gamma}, "
            f"brightness={self.brightness}, color={self.color})"
        )


@TRANSFORMS.register_module()
class ResizeImageOnly:
    """Resizes the image, bilinear and antialiased, in floating point; maps keep their size.

    Args:
        size: length of the short side, the long side rounded down, or (height, width).
    """

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = [size] if isinstance(size, int) else list(size)
        if len(self.size) not in (1, 2) or min(self.size) < 1:
            raise ValueError(f"size is {size}; expected the short side, or (height, width)")

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        image = F.resize(_to_tensor(results["img"]), self.size, antialias=True)
        results["img"] = _to_array(image)
        results["img_shape"] = results["img"].shape[:2]
        return results

    def __repr__(self) -> str:
        return f"ResizeImageOnly(size={self.size})"

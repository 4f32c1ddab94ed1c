"""Images of any size for a backbone that takes multiples of its patch size."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def pad_to_center(images: Tensor, multiple: int) -> Tensor:
    """Put images in the middle of the next larger multiple, surrounded by zeros.

    Of an odd rest, right and bottom get the pixel more. Zeros are grey in normalised images.

    Args:
        images: (B, C, H, W).
        multiple: of which both sides become multiples, in pixels.
    """
    height, width = (-side % multiple for side in images.shape[-2:])
    left, top = width // 2, height // 2
    return F.pad(images, (left, width - left, top, height - top))


def stretch(images: Tensor, multiple: int) -> Tensor:
    """Resize images (B, C, H, W) bilinearly to the next larger multiple."""
    size = tuple(side + -side % multiple for side in images.shape[-2:])
    if size == tuple(images.shape[-2:]):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def keep(images: Tensor, multiple: int) -> Tensor:
    """Leave images as they are; the backbone drops pixels that fill no patch."""
    return images


INPUT_SIZES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "pad": pad_to_center,
    "stretch": stretch,
    "keep": keep,
}

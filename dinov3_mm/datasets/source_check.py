"""A look at a source before training, so that unsuitable data ends a run before it starts."""

import numpy as np
from mmengine.logging import print_log

from dinov3_mm.datasets.sources import BrokenImageError, ImageSource

_PROBES = 64
_TOLERATED_SHARE = 0.1


def check_source(source: ImageSource, min_image_size: int, small_images: str = "error") -> None:
    """Read the headers of up to 64 images spread over the source.

    Sources without ``probe_size`` have one image loaded instead. Small images are no rarity in a
    photo collection, and upsampling a few of them does no harm; a source where more than a tenth
    of the probed images is small is most likely paired with the wrong crop size.

    Args:
        source (ImageSource): The images.
        min_image_size (int): Smallest side in pixels that is not small.
        small_images (str): ``'error'``, or ``'upscale'`` to accept any size.

    Raises:
        ValueError: If more than a tenth of the probed images is small and ``small_images`` is
            ``'error'``, or if no probed image can be read.
    """
    if small_images not in ("error", "upscale"):
        raise ValueError(f"small_images must be 'error' or 'upscale', got {small_images!r}")
    sizes, broken = _probe(source)
    if not sizes:
        raise ValueError(f"none of {len(broken)} probed images can be read, e.g. {broken[0]}")
    small = [(path, size) for path, size in sizes if min(size) < min_image_size]
    if not small or small_images == "upscale":
        return
    path, (height, width) = small[0]
    facts = (
        f"{len(small)} of {len(sizes)} probed images are smaller than the crop size of "
        f"{min_image_size} px, e.g. {path} of {width}x{height} px"
    )
    if len(small) > _TOLERATED_SHARE * len(sizes):
        raise ValueError(
            f"{facts}; use smaller crops, or small_images='upscale' in the data loader config to "
            "train on enlarged images"
        )
    print_log(f"{facts}; they will be enlarged", logger="current")


def _probe(source: ImageSource) -> tuple[list[tuple[str, tuple[int, int]]], list[str]]:
    """Paths with (height, width) of the readable probes, and messages about the others."""
    has_headers = hasattr(source, "probe_size")
    sizes, broken = [], []
    number = min(len(source), _PROBES)
    for index in np.linspace(0, len(source) - 1, number).round().astype(int).tolist():
        try:
            size = source.probe_size(index) if has_headers else source.load_image(index).shape[:2]
        except BrokenImageError as error:
            broken.append(str(error))
            continue
        sizes.append((source.path(index), size))
        if not has_headers:
            break
    return sizes, broken

"""A look at a source before training, so that unsuitable data ends a run before it starts."""

from typing import NamedTuple

import numpy as np
from mmengine.logging import print_log

from dinov3_mm.datasets.images import BrokenImageError, ImageHeader
from dinov3_mm.datasets.multiband import UNCHANGED
from dinov3_mm.datasets.sources import BatchMixture, ImageSource, WeightedConcat

_PROBES = 64
_LOADED_PROBES = 8
_TOLERATED_SHARE = 0.1


class _Probe(NamedTuple):
    index: int
    path: str
    header: ImageHeader


def check_source(source: ImageSource, min_image_size: int, small_images: str = "error") -> int:
    """Read the headers of up to 64 images spread over the source.

    Of files whose pixels are kept as they are, one is decoded as well; sources without ``probe``
    have one image loaded instead. Small images are no rarity in a photo collection, and
    upsampling a few of them does no harm; a source where more than a tenth of the probed images is
    small is most likely paired with the wrong crop size.

    Args:
        source (ImageSource): The images.
        min_image_size (int): Smallest side in pixels that is not small.
        small_images (str): ``'error'``, or ``'upscale'`` to accept any size.

    Returns:
        int: Channels of the images.

    Raises:
        ImportError: If a package is missing that the files need.
        ValueError: If no probed image can be read, if the images differ in their channels or lack
            chosen ones, or if more than a tenth of them is small and ``small_images`` is
            ``'error'``.
    """
    if small_images not in ("error", "upscale"):
        raise ValueError(f"small_images must be 'error' or 'upscale', got {small_images!r}")
    if isinstance(source, (BatchMixture, WeightedConcat)):
        return _check_parts(source, min_image_size, small_images)
    probes, broken = _probe(source)
    if not probes:
        raise ValueError(f"none of {len(broken)} probed images can be read, e.g. {broken[0]}")
    chosen = _format_of(source, "channels") if hasattr(source, "probe") else None
    channels = _check_channels(probes, chosen)
    if _format_of(source, "color") == UNCHANGED:
        _check_pixels(source, probes)
    if small_images == "error":
        _check_sizes(probes, min_image_size)
    return channels


def _check_parts(
    source: BatchMixture | WeightedConcat, min_image_size: int, small_images: str
) -> int:
    """Check every part of a mixture; all must have equally many channels."""
    channels = [check_source(part, min_image_size, small_images) for part in source.parts]
    if len(set(channels)) > 1:
        raise ValueError(
            f"the parts of the {type(source).__name__} have {channels} channels; choose equally "
            "many in each (color and channels of the sources)"
        )
    return channels[0]


def _probe(source: ImageSource) -> tuple[list[_Probe], list[str]]:
    """The readable probes, and messages about the others."""
    has_headers = hasattr(source, "probe")
    probes, broken = [], []
    number = min(len(source), _PROBES)
    for index in np.linspace(0, len(source) - 1, number).round().astype(int).tolist():
        try:
            if has_headers:
                header = source.probe(index)
            else:
                shape = source.load_image(index).shape
                header = ImageHeader(*shape[:2], shape[2] if len(shape) > 2 else 1)
        except BrokenImageError as error:
            broken.append(str(error))
            continue
        probes.append(_Probe(index, source.path(index), header))
        if not has_headers:
            break
    return probes, broken


def _format_of(source: ImageSource, name: str) -> object:
    """Value of a source's pixel format; None for sources that have no files."""
    return getattr(getattr(source, "format", None), name, None)


def _check_channels(probes: list[_Probe], chosen: list[int] | None) -> int:
    """Number of channels of all images, given the chosen ones of the files (None: all)."""
    examples: dict[int, list[str]] = {}
    for _, path, header in probes:
        examples.setdefault(header.channels, []).append(path)
    fewest = min(examples)
    if chosen is None and len(examples) == 1:
        return fewest
    if chosen is not None and fewest > max(chosen):
        return len(chosen)
    counts = "; ".join(
        f"{count} channels in {len(paths)} of {len(probes)} probed images, e.g. {paths[0]}"
        for count, paths in sorted(examples.items())
    )
    if chosen is not None:
        raise ValueError(f"not all images have the channels={chosen} (from 0): {counts}")
    raise ValueError(
        f"the images differ in their channels: {counts}. Choose channels that all of them have "
        f"with source.channels, e.g. channels={list(range(fewest))}, or take the others out"
    )


def _check_pixels(source: ImageSource, probes: list[_Probe]) -> None:
    """Decode one image: a header does not tell whether pixels fit value_range or need a codec."""
    broken = []
    for probe in probes[:_LOADED_PROBES]:
        try:
            source.load_image(probe.index)
            return
        except BrokenImageError as error:
            broken.append(str(error))
    raise ValueError(f"none of {len(broken)} probed images can be read, e.g. {broken[0]}")


def _check_sizes(probes: list[_Probe], min_image_size: int) -> None:
    """Raise if many images are smaller than the crops, tell if few are."""
    small = [probe for probe in probes if min(probe.header[:2]) < min_image_size]
    if not small:
        return
    _, path, (height, width, _) = small[0]
    facts = (
        f"{len(small)} of {len(probes)} probed images are smaller than the crop size of "
        f"{min_image_size} px, e.g. {path} of {width}x{height} px"
    )
    if len(small) > _TOLERATED_SHARE * len(probes):
        raise ValueError(
            f"{facts}; use smaller crops, or small_images='upscale' in the data loader config to "
            "train on enlarged images"
        )
    print_log(f"{facts}; they will be enlarged", logger="current")

"""Mean and standard deviation of every channel of a source."""

from typing import NamedTuple

import numpy as np
from mmengine.logging import print_log

from .images import BrokenImageError
from .sources import ImageSource


class ChannelStatistics(NamedTuple):
    """Statistics of all pixels of some images, on the scale on which a source's values are 0..1.

    Attributes:
        mean: of each channel.
        std: of each channel, the population's.
        num_images: that were read.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_images: int

    def config_lines(self) -> str:
        """Arguments ``mean`` and ``std`` of a data preprocessor, a line each."""
        return "\n".join(
            f"{name}=[{', '.join(f'{value:.4g}' for value in values)}],"
            for name, values in (("mean", self.mean), ("std", self.std))
        )


def channel_statistics(source: ImageSource, num_images: int | None = None) -> ChannelStatistics:
    """Per-channel statistics of a source in float64, every pixel counted once.

    Args:
        source (ImageSource): The images.
        num_images (int | None): Images to read, spread evenly over the source; None: all.
            Unreadable ones are left out and logged.

    Raises:
        ValueError: If ``num_images < 1``, if no image can be read, or if two of them differ in
            their channels.
    """
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images must be at least 1, got {num_images}")
    number = min(num_images or len(source), len(source))
    count, read = 0, 0
    mean = deviations = np.zeros(0)
    for index in np.linspace(0, len(source) - 1, number).round().astype(int).tolist():
        try:
            image = source.load_image(index)
        except BrokenImageError as error:
            print_log(f"left out of the statistics: {error}", logger="current")
            continue
        pixels = image.reshape(-1, image.shape[2]).astype(np.float64) / 255
        if read and len(mean) != pixels.shape[1]:
            raise ValueError(
                f"{source.path(index)} has {pixels.shape[1]} channels, the images before it "
                f"{len(mean)}; choose channels that all of them have with channels=[...]"
            )
        own_mean = pixels.mean(axis=0)
        own_deviations = ((pixels - own_mean) ** 2).sum(axis=0)
        if not read:
            mean, deviations = np.zeros_like(own_mean), np.zeros_like(own_mean)
        # Chan et al.: sums of squared deviations of two groups of pixels, joined without
        # the cancellation of a difference of large sums.
        total = count + len(pixels)
        shift = own_mean - mean
        mean = mean + shift * len(pixels) / total
        deviations = deviations + own_deviations + shift**2 * count * len(pixels) / total
        count, read = total, read + 1
    if not read:
        raise ValueError(f"none of {number} images can be read")
    std = np.sqrt(deviations / count)
    return ChannelStatistics(tuple(mean.tolist()), tuple(std.tolist()), read)

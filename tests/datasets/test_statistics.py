"""Channel statistics against numpy on all pixels at once."""

import numpy as np
import pytest

from dinov3_mm.datasets import BrokenImageError, channel_statistics


class Images:
    """Images of different sizes; None cannot be read."""

    def __init__(self, *images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def path(self, index):
        return f"image-{index}"

    def load_image(self, index):
        if self.images[index] is None:
            raise BrokenImageError(self.path(index), "gone")
        return self.images[index]


def images(dtype, channels=5, count=7):
    rng = np.random.default_rng(0)
    shapes = [(10 + 3 * i, 40 - 2 * i, channels) for i in range(count)]
    # One channel hardly varies: sums of squares would lose its deviation.
    spread = np.array([255, 100, 10, 2, 1])[:channels]
    return [(200 - spread / 2 + spread * (rng.random(s) - 0.5)).astype(dtype) for s in shapes]


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_every_pixel_counts_once(dtype):
    pictures = images(dtype)
    pixels = np.concatenate([p.reshape(-1, 5) for p in pictures]).astype(np.float64) / 255
    statistics = channel_statistics(Images(*pictures))
    assert np.abs(np.array(statistics.mean) - pixels.mean(0)).max() < 1e-12
    assert np.abs(np.array(statistics.std) - pixels.std(0)).max() < 1e-12
    assert statistics.num_images == 7


def test_a_part_of_the_images_and_broken_ones():
    pictures = images(np.uint8)
    chosen = channel_statistics(Images(*pictures), num_images=3)
    assert chosen == channel_statistics(Images(pictures[0], None, pictures[3], pictures[6]))
    assert chosen.num_images == 3


def test_config_lines():
    lines = channel_statistics(Images(*images(np.uint8, channels=2))).config_lines()
    arguments = eval(f"dict({lines})")
    assert list(arguments) == ["mean", "std"] and len(arguments["mean"]) == 2


def test_refusals():
    with pytest.raises(ValueError, match="none of 2 images can be read"):
        channel_statistics(Images(None, None))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        channel_statistics(Images(*images(np.uint8)), num_images=0)
    odd = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="image-1 has 3 channels, the images before it 5"):
        channel_statistics(Images(images(np.uint8)[0], odd))

"""Features, views and hooks for images that are not 8-bit RGB."""

import numpy as np
import pytest
import torch

from dinov3_mm.evaluation import ImageSet, RandomViews, extract_features
from tests.checkpoints.toys import toy_backbone
from tests.datasets.photos import photo


class Bands:
    """Images of ``channels`` bands, every one another mixture of a photograph's colours."""

    def __init__(self, channels: int, dtype: type, length: int = 4) -> None:
        self.channels, self.dtype, self.length = channels, dtype, length
        self.mixture = np.random.default_rng(0).dirichlet(np.ones(3), channels).T

    def __len__(self) -> int:
        return self.length

    def path(self, index: int) -> str:
        return f"bands-{index}"

    def load_image(self, index: int) -> np.ndarray:
        image = (photo(60, 80, index).astype(np.float64) @ self.mixture).clip(0, 255)
        return image.astype(self.dtype)


KINDS = [(1, np.uint8), (4, np.uint8), (8, np.uint8), (1, np.float32), (8, np.float32)]


@pytest.mark.parametrize(("channels", "dtype"), KINDS)
def test_inputs_keep_channels_and_type(channels, dtype):
    source = Bands(channels, dtype)
    for images in (ImageSet(source, 32, 40), RandomViews(source, 32, 0)):
        image = images[1]
        assert image.shape == (channels, 32, 32)
        assert image.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
        assert image.min() >= 0 and image.max() <= 255 and image.float().std() > 5


@pytest.mark.parametrize("channels", [1, 5])
def test_float_inputs_are_8_bit_ones_without_rounding(channels):
    sets = [
        (ImageSet(source, 32, 40), RandomViews(source, 32, 0))
        for source in (Bands(channels, np.float32), Bands(channels, np.uint8))
    ]
    for exact, rounded in zip(*sets):
        difference = (exact[0] - rounded[0].float()).abs()
        assert 0.1 < difference.mean() < 1.5


def test_channels_are_treated_alike():
    """A view of many channels is, up to contrast, the views of its parts."""
    source = Bands(8, np.float32)
    view = RandomViews(source, 32, 0)[2].flatten(1)
    one = Bands(1, np.float32)
    one.mixture = source.mixture[:, 6:7]
    alone = RandomViews(one, 32, 0)[2].flatten()
    inside = (view[6] > 0) & (view[6] < 255) & (alone > 0) & (alone < 255)
    assert torch.corrcoef(torch.stack([view[6][inside], alone[inside]]))[0, 1] > 0.9999


@pytest.mark.parametrize(("channels", "dtype"), KINDS)
def test_features_are_normalised_per_channel(channels, dtype):
    backbone = toy_backbone(in_channels=channels)
    mean, std = (
        [0.1 * (1 + c % 5) for c in range(channels)],
        [0.2 + 0.05 * (c % 3) for c in range(channels)],
    )
    images = ImageSet(Bands(channels, dtype), 32)
    features = extract_features(backbone, images, mean=mean, std=std)
    stack = torch.stack([images[index] for index in range(4)]).double() / 255
    view = (1, -1, 1, 1)
    normal = (stack - torch.tensor(mean).double().view(view)) / torch.tensor(std).double().view(
        view
    )
    with torch.no_grad():
        expected = backbone.forward_tokens(normal.float()).cls
    torch.testing.assert_close(features.cls, expected, atol=1e-5, rtol=1e-5)


def test_disagreeing_channels_are_named():
    images = ImageSet(Bands(4, np.uint8), 32)
    with pytest.raises(ValueError, match=r"images have 4 channels, mean and std 3 and 3 values"):
        extract_features(toy_backbone(in_channels=4), images)
    with pytest.raises(ValueError, match=r"the backbone takes 3 channels: give the statistics"):
        extract_features(toy_backbone(), images, mean=[0.5] * 4, std=[0.2] * 4)

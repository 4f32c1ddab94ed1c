"""Resampling of the learned position embedding, against torch's interpolation called by hand."""

import pytest
import torch
from torch.nn import functional as F

from dinov3_mm.models.layers import resample_position_embedding
from tests.golden import assert_parity

GRIDS = [(16, 16), (37, 36), (20, 30), (1, 50), (60, 74), (2, 2)]


def by_hand(embedding, side, **target):
    """(1, N, D) to (1, N', D) by torch."""
    image = embedding.mT.reshape(1, -1, side, side)
    return F.interpolate(image, mode="bicubic", align_corners=False, **target).flatten(2).mT


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_the_trained_grid_is_left_alone(offset):
    embedding = torch.randn(1, 37 * 37, 4)
    assert resample_position_embedding(embedding, (37, 37), offset=offset) is embedding


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("antialias", [False, True])
def test_by_size(grid, antialias):
    embedding = torch.randn(1, 37 * 37, 4)
    expected = by_hand(embedding, 37, size=grid, antialias=antialias)
    assert_parity(resample_position_embedding(embedding, grid, antialias=antialias), expected)


@pytest.mark.parametrize("grid", GRIDS)
def test_by_factor(grid):
    embedding = torch.randn(1, 37 * 37, 4)
    factors = [(grid[0] + 0.1) / 37, (grid[1] + 0.1) / 37]
    expected = by_hand(embedding, 37, scale_factor=factors)
    actual = resample_position_embedding(embedding, grid, offset=0.1)
    assert_parity(actual, expected)
    assert actual.shape == (1, grid[0] * grid[1], 4)
    assert not torch.allclose(actual, resample_position_embedding(embedding, grid), atol=1e-3)


def keys_kernel(distance: torch.Tensor, a: float = -0.75) -> torch.Tensor:
    """Weights of cubic convolution (Keys 1981)."""
    d = distance.abs()
    inner = (a + 2) * d**3 - (a + 3) * d**2 + 1
    outer = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return torch.where(d <= 1, inner, torch.where(d < 2, outer, torch.zeros_like(d)))


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_the_factor_places_the_sampling_points(offset):
    # Point i lies at (i + 0.5) / factor - 0.5, in cells of the stored grid. All columns are equal.
    values = torch.randn(37, dtype=torch.float64)
    embedding = values.repeat_interleave(37)[None, :, None]
    actual = resample_position_embedding(embedding, (16, 16), offset=offset).view(16, 16)
    points = (torch.arange(16, dtype=torch.float64) + 0.5) * 37 / (16 + offset) - 0.5
    weights = keys_kernel(points[:, None] - torch.arange(37))
    assert_parity(actual[1:-1, 5], (weights @ values)[1:-1])


def test_every_grid_has_its_size():
    embedding = torch.zeros(1, 37 * 37, 1)
    for length in range(1, 200):
        resampled = resample_position_embedding(embedding, (length, 3), offset=0.1)
        assert resampled.shape[1] == 3 * length


def test_16_bit_values_are_resampled_in_fp32():
    embedding = torch.randn(1, 25, 4).bfloat16()
    actual = resample_position_embedding(embedding, (7, 3), antialias=True)
    assert actual.dtype == torch.float32
    assert_parity(actual, by_hand(embedding.float(), 5, size=(7, 3), antialias=True))
    assert resample_position_embedding(embedding.double(), (7, 3)).dtype == torch.float64


@pytest.mark.parametrize("rule", [{"offset": 0.1}, {"antialias": True}])
def test_gradients_reach_the_embedding(rule):
    embedding = torch.randn(1, 25, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda tensor: resample_position_embedding(tensor, (3, 7), **rule), embedding
    )


def test_an_offset_that_changes_the_size_is_an_error():
    with pytest.raises(ValueError, match=r"\(5, 6\) instead of \(4, 5\)"):
        resample_position_embedding(torch.zeros(1, 9, 2), (4, 5), offset=1.2)

"""Two-crop retrieval and effective rank against closed forms."""

import numpy as np
import pytest
import torch

from dinov3_mm.evaluation.retrieval import RandomViews, two_crop_retrieval
from dinov3_mm.models.pretraining.diagnostics import effective_rank
from tests.evaluation.toys import UnlabelledSquares


def test_retrieval_counts_own_images():
    first = torch.eye(6)
    second = torch.eye(6)[[0, 1, 2, 4, 3, 5]]  # images 3 and 4 are swapped
    assert two_crop_retrieval(3 * first, second) == pytest.approx(100 * 4 / 6)
    with pytest.raises(ValueError, match="two equal"):
        two_crop_retrieval(first, second[:5])


def test_views_are_functions_of_seed_index_and_view():
    source = UnlabelledSquares(4)
    one, again = RandomViews(source, 32, 0), RandomViews(source, 32, 0, cache=True)
    assert torch.equal(one[2], again[2]) and torch.equal(one[2], again[2])
    for other in (RandomViews(source, 32, 1), RandomViews(source, 32, 0, seed=1)):
        assert not torch.equal(one[2], other[2])
    assert one[0].shape == (3, 32, 32) and one[0].dtype == torch.uint8


def test_views_differ_in_crop_colour_and_grey():
    views = RandomViews(UnlabelledSquares(200), 16, 0)
    stack = torch.stack([views[i] for i in range(200)]).float()
    grey = (stack.amax(1) - stack.amin(1)).amax((1, 2)) <= 1
    assert 0.1 < grey.float().mean() < 0.3
    assert len(torch.unique(stack.flatten(1), dim=0)) == 200


class WideImage:
    """One wide gradient image, for the range of crops."""

    def __len__(self) -> int:
        return 2

    def load_image(self, index: int) -> np.ndarray:
        ramp = np.linspace(0, 255, 90, dtype=np.uint8)
        return np.repeat(np.tile(ramp, (30, 1))[..., None], 3, axis=2)


def test_crops_fit_any_aspect_ratio():
    for seed in range(50):
        assert RandomViews(WideImage(), 24, 0, seed=seed)[0].shape == (3, 24, 24)


def test_retrieval_needs_two_images_and_a_sane_area():
    with pytest.raises(ValueError, match="at least two"):
        RandomViews(UnlabelledSquares(1), 32, 0)
    with pytest.raises(ValueError, match="min_area"):
        RandomViews(UnlabelledSquares(3), 32, 0, min_area=0)


def test_rank_of_known_spectra():
    basis = torch.linalg.qr(torch.randn(40, 8)).Q
    assert effective_rank(basis) == pytest.approx(8, rel=1e-4)
    assert effective_rank(basis[:, :1] @ torch.randn(1, 8)) == pytest.approx(1, abs=1e-3)
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    shares = values / values.sum()
    entropy = -(shares * shares.log()).sum()
    turned = basis[:, :4] * values @ torch.linalg.qr(torch.randn(4, 4)).Q
    assert effective_rank(turned) == pytest.approx(entropy.exp().item(), rel=1e-4)
    assert effective_rank(torch.ones(30, 5)) == pytest.approx(1, abs=1e-3)  # a collapse
    with pytest.raises(ValueError, match="non-empty"):
        effective_rank(torch.zeros(0, 5))

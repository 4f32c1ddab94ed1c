"""Losses of depth: recorded values and gradients, invariances, closed forms.

``heads_depth_metrics`` is trimmed of maps that follow from the others.
"""

import pytest
import torch

from tests.golden import assert_parity, load_golden
from tests.hosts.lane import require_hosts

require_hosts()

from dinov3_mm.models.depth import (  # noqa: E402
    DINOv3DepthGradientLoss,
    DINOv3DepthL1Loss,
    DINOv3GradientMatchingLoss,
    DINOv3ScaleShiftLoss,
    DINOv3SigLoss,
)
from dinov3_mm.models.depth.losses import least_squares  # noqa: E402

ALL = [
    DINOv3SigLoss,
    DINOv3DepthL1Loss,
    DINOv3DepthGradientLoss,
    DINOv3ScaleShiftLoss,
    DINOv3GradientMatchingLoss,
]


def recorded():
    _, golden = load_golden("heads_depth_metrics")
    return (
        golden["in.pred"].clamp(0.001, 10),
        golden["in.gt"],
        golden["out.mask_full"].bool(),
        golden,
    )


def maps(seed: int = 0, batch: int = 2):
    generator = torch.Generator().manual_seed(seed)
    pred, target = (1 + 5 * torch.rand(batch, 1, 24, 20, generator=generator) for _ in range(2))
    return pred, target, torch.rand(batch, 1, 24, 20, generator=generator) < 0.8


@pytest.mark.parametrize(
    "loss, name",
    [
        (DINOv3SigLoss(), "sigloss"),
        (DINOv3DepthL1Loss(), "l1"),
        (DINOv3DepthGradientLoss(), "grad_loss"),
        (DINOv3DepthGradientLoss(log=True), "grad_log_loss"),
    ],
)
def test_recorded_values(loss, name):
    pred, target, mask, golden = recorded()
    assert_parity(loss(pred, target, mask), golden[f"out.{name}"])


def test_recorded_gradient_and_warm_up():
    pred, target, mask, golden = recorded()
    pred.requires_grad_()
    loss = DINOv3SigLoss(warm_up=2)
    loss(pred, target, mask).backward()
    assert_parity(pred.grad, golden["out.sigloss_grad"])
    steps = [loss(pred, target, mask, step=torch.tensor(i)).detach() for i in range(4)]
    assert_parity(torch.stack(steps), golden["out.sigloss_seq"])


@pytest.mark.parametrize("kind", ALL)
def test_unmeasured_truth_does_not_matter(kind):
    pred, target, mask = maps()
    loss = kind()
    expected = loss(pred, target, mask)
    for value in (0.0, 1e6, torch.nan, torch.inf):
        assert torch.equal(loss(pred, target.masked_fill(~mask, value), mask), expected)
    pred = pred.masked_fill(~mask, 3.7)
    assert torch.equal(loss(pred, target, mask), expected)


@pytest.mark.parametrize("kind", ALL)
def test_nothing_measured_gives_zero_and_finite_gradients(kind):
    pred, target, mask = maps()
    pred.requires_grad_()
    value = kind()(pred, target, torch.zeros_like(mask))
    value.backward()
    assert value == 0
    assert not pred.grad.any()


@pytest.mark.parametrize("kind", ALL)
def test_a_perfect_prediction_costs_nothing(kind):
    _, target, mask = maps()
    pred = target.clone().requires_grad_()
    value = kind()(pred, target, mask)
    value.backward()
    assert value == 0
    assert pred.grad.isfinite().all()


@pytest.mark.parametrize("kind", [DINOv3ScaleShiftLoss, DINOv3GradientMatchingLoss])
@pytest.mark.parametrize("align", ["robust", "least_squares"])
@pytest.mark.parametrize("space", ["depth", "disparity"])
def test_scale_and_shift_of_an_image_do_not_matter(kind, align, space):
    pred, target, mask = maps()
    loss = kind(align=align, space=space)
    scale, shift = torch.tensor([0.3, 2.0]), torch.tensor([0.5, 0.1])
    changed = pred if space == "depth" else 1 / pred
    changed = changed * scale[:, None, None, None] + shift[:, None, None, None]
    changed = changed if space == "depth" else 1 / changed
    expected = loss(pred, target, mask)
    assert expected > 0.001
    torch.testing.assert_close(loss(changed, target, mask), expected, rtol=1e-4, atol=1e-5)


def test_least_squares_against_lstsq():
    pred, target, mask = maps()
    scale, shift = least_squares(pred, target, mask)
    for i in range(2):
        x, y = pred[i][mask[i]].double(), target[i][mask[i]].double()
        solution = torch.linalg.lstsq(torch.stack((x, torch.ones_like(x)), 1), y[:, None]).solution
        torch.testing.assert_close(torch.stack((scale[i], shift[i])), solution[:, 0].float())


def test_least_squares_of_a_constant_is_the_mean_truth():
    _, target, mask = maps()
    scale, shift = least_squares(torch.full_like(target, 2.5), target, mask)
    assert not scale.any()
    torch.testing.assert_close(shift[0], target[0][mask[0]].mean())


def test_trimming_leaves_out_the_largest_residuals():
    target = torch.arange(1.0, 11.0).reshape(1, 1, 2, 5)
    pred = target.clone()
    pred[..., -1, -1] = 500.0  # an outlier of the truth, as the loss sees it
    mask = torch.ones_like(target, dtype=torch.bool)
    options = dict(space="depth", align="robust")
    # Median 5 (lower of the two in the middle); deviations of the truth sum to 25, of pred to 515.
    deviation = (target[..., :].flatten()[:9] - 5).abs()
    by_hand = (deviation / 51.5 - deviation / 2.5).abs().sort().values
    expected = by_hand[:8].sum() / (2 * 10)
    torch.testing.assert_close(
        DINOv3ScaleShiftLoss(trim=0.2, **options)(pred, target, mask), expected
    )
    last = abs(495 / 51.5 - 5 / 2.5)
    expected = (by_hand.sum() + last) / (2 * 10)
    torch.testing.assert_close(
        DINOv3ScaleShiftLoss(trim=0.0, **options)(pred, target, mask), expected
    )


def test_gradient_matching_by_hand():
    # Residuals 0, 0, 2, 0 in a row of deviation-normalised maps: slopes 0, 2, 2 at full, 2 at half.
    loss = DINOv3GradientMatchingLoss(space="depth", num_scales=2)
    residuals = torch.tensor([0.0, 0.0, 2.0, 0.0]).reshape(1, 1, 1, 4)
    loss.residuals = lambda *_: residuals
    mask = torch.ones_like(residuals, dtype=torch.bool)
    assert loss(residuals, residuals, mask).item() == pytest.approx(4 / 4 + 2 / 2)


def test_weights_and_precision():
    pred, target, mask = maps()
    once = DINOv3DepthL1Loss()(pred, target, mask)
    assert DINOv3DepthL1Loss(loss_weight=3.0)(pred, target, mask) == 3 * once
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert DINOv3DepthL1Loss()(pred.bfloat16(), target, mask).dtype == torch.float32


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DINOv3SigLoss(loss_name="sig"), "must contain 'loss'"),
        (lambda: DINOv3ScaleShiftLoss(trim=1.0), "trim is 1.0"),
        (lambda: DINOv3ScaleShiftLoss(space="dept"), "did you mean 'depth'"),
        (lambda: DINOv3GradientMatchingLoss(align="robst"), "did you mean 'robust'"),
    ],
)
def test_options_that_are_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()

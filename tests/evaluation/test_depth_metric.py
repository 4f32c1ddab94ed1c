"""Depth metrics: recorded values, the crops at full size, alignment, blocks of canopy height."""

import pytest
import torch

from dinov3_mm.evaluation.depth_metric import (
    SCORES,
    DINOv3CanopyMetric,
    DINOv3DepthMetric,
    eigen_crop,
    garg_crop,
    scale_and_shift,
    valid_depth,
)
from tests.acceptance.label_cases import logged
from tests.golden import load_golden


def recorded():
    _, golden = load_golden("heads_depth_metrics")
    return golden["in.pred"][0, 0], golden["in.gt"][0, 0], golden


def sample(pred: torch.Tensor, target: torch.Tensor) -> dict:
    return {"pred_depth_map": {"data": pred[None]}, "gt_depth_map": {"data": target[None]}}


def test_recorded_masks():
    _, target, golden = recorded()
    valid = valid_depth(target, 0.001, 10.0)
    assert torch.equal(valid, golden["out.mask_full"][0, 0].bool())
    assert torch.equal(valid & eigen_crop(48, 64), golden["out.mask_eigen"][0, 0].bool())


@pytest.mark.parametrize("align, name", [(None, "metrics"), ("least_squares", "metrics_aligned")])
def test_recorded_scores(align, name):
    pred, target, golden = recorded()
    metric = DINOv3DepthMetric(SCORES, crop="eigen", align=align)
    metric.process({}, [sample(pred, target)])
    found = metric.evaluate(1)
    assert set(found) == {f"depth/{score}" for score in SCORES}
    for score, expected in zip(SCORES, golden[f"out.{name}"].tolist()):
        assert found[f"depth/{score}"] == pytest.approx(expected, rel=1e-5, abs=1e-5), score


def test_recorded_alignment():
    pred, target, golden = recorded()
    mask = golden["out.mask_eigen"][0, 0].bool()
    found = torch.stack(scale_and_shift(pred[mask], target[mask])).float()
    expected = torch.stack((golden["out.scale"], golden["out.shift"]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_crops_at_full_size():
    rows, columns = (eigen_crop(480, 640).any(dim).nonzero()[[0, -1], 0] for dim in (1, 0))
    assert (rows.tolist(), columns.tolist()) == ([45, 470], [41, 600])
    rows, columns = (garg_crop(375, 1242).any(dim).nonzero()[[0, -1], 0] for dim in (1, 0))
    assert (rows.tolist(), columns.tolist()) == ([153, 370], [44, 1196])


def test_images_count_the_same_and_empty_ones_do_not():
    metric = DINOv3DepthMetric(["mae"])
    one, two, empty = torch.full((4, 4), 2.0), torch.full((8, 8), 2.0), torch.zeros(4, 4)
    metric.process({}, [sample(one + 1, one), sample(two + 2, two), sample(one, empty)])
    with logged() as lines:
        assert metric.evaluate(3) == {"depth/mae": pytest.approx(1.5)}
    message = "1 of 3 images have no depth between 0.001 and 10.0 and do not count in the score"
    assert lines.warnings == [message]


def test_predictions_are_resized_and_limited_to_the_range():
    metric = DINOv3DepthMetric(["mae"], max_depth=5.0)
    metric.process({}, [sample(torch.full((3, 4), 50.0), torch.full((6, 8), 4.0))])
    assert metric.evaluate(1)["depth/mae"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(scores=["rsme"]), "did you mean 'rmse'"),
        (dict(crop="eigne"), "did you mean 'eigen'"),
        (dict(align="least_square"), "did you mean 'least_squares'"),
        (dict(min_depth=5.0, max_depth=1.0), "no range"),
    ],
)
def test_options_that_are_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        DINOv3DepthMetric(**options)


def test_depth_in_another_unit_is_noticed():
    metric = DINOv3DepthMetric()
    metric.process({}, [sample(torch.ones(4, 4), torch.full((4, 4), 1500.0))])
    with pytest.raises(ValueError, match="depth_scale"):
        metric.evaluate(1)


def test_samples_without_truth():
    with pytest.raises(ValueError, match="LoadDepthMap"):
        DINOv3DepthMetric().process({}, [{"img_path": "a.png", "pred_depth_map": {}}])


def test_canopy_height_by_hand():
    # Blocks of 2 x 2: heights 0, 2, 4, 6; predictions 1 too high; a fifth column is no block.
    heights = torch.tensor([[0.0, 2.0], [4.0, 6.0]]).repeat_interleave(2, 0).repeat_interleave(2, 1)
    target = torch.cat((heights, torch.full((4, 1), 9.0)), 1)
    pred = target + 1
    target[0, 0] = -1  # not measured; three of four pixels are enough
    metric = DINOv3CanopyMetric(block_size=2)
    metric.process({}, [sample(pred, target)])
    found = metric.evaluate(1)
    assert found["canopy/mae"] == pytest.approx(1.0)
    assert found["canopy/block_r2"] == pytest.approx(1 - 4 / 20)


def test_canopy_blocks_that_were_hardly_measured_do_not_count():
    target = torch.zeros(2, 6)
    target[:, 2:4], target[:, 4:] = 4.0, -1.0
    target[0, 4] = 50.0
    metric = DINOv3CanopyMetric(block_size=2)
    metric.process({}, [sample(target.clamp_min(0), target)])
    assert metric.evaluate(1) == {"canopy/mae": 0.0, "canopy/block_r2": 1.0}


def test_canopy_maps_without_measurement():
    metric = DINOv3CanopyMetric(block_size=2)
    metric.process({}, [sample(torch.ones(4, 4), -torch.ones(4, 4))])
    with pytest.raises(ValueError, match="depth_scale"):
        metric.evaluate(1)

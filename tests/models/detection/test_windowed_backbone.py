"""Windows and global view of a backbone."""

import pytest
import torch
from torch.nn import functional as F

import dinov3_mm.hosts  # noqa: F401
from tests.checkpoints.toys import redraw
from tests.golden import assert_parity
from tests.hosts.lane import require_hosts
from tests.models.detection import toys

require_hosts()

from dinov3_mm.models.detection import DINOv3WindowedBackbone  # noqa: E402
from dinov3_mm.models.detection.inputs import split_side  # noqa: E402


def build(num_windows, **vit):
    windowed = DINOv3WindowedBackbone(toys.vit(**vit), num_windows=num_windows)
    windowed.init_weights()
    return redraw(windowed)


@pytest.mark.parametrize(
    ("length", "count", "expected"),
    [
        (112, 2, [64, 48]),
        (2048, 3, [688, 688, 672]),
        (96, 3, [32, 32, 32]),
        (64, 3, [32, 32]),
        (16, 2, [16]),
    ],
)
def test_sides(length, count, expected):
    assert split_side(length, count, 16) == expected


@pytest.mark.parametrize("size", [(112, 144), (96, 96), (48, 16)])
def test_each_window_is_seen_alone(size):
    windowed = build(2)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    rows, columns = (split_side(side, 2, 16) for side in size)
    with torch.no_grad():
        (features,) = windowed(x)
        for row in range(len(rows)):
            for column in range(len(columns)):
                top, left = sum(rows[:row]), sum(columns[:column])
                window = x[:, :, top : top + rows[row], left : left + columns[column]]
                expected = torch.cat(windowed.backbone(window), dim=1)
                here = features[:, 128:, top // 16 :, left // 16 :]
                here = here[:, :, : rows[row] // 16, : columns[column] // 16]
                assert_parity(here, expected)
        small = F.interpolate(x, (rows[0], columns[0]), mode="bilinear", antialias=True)
        overview = torch.cat(windowed.backbone(small), dim=1)
    grid = (size[0] // 16, size[1] // 16)
    expected = F.interpolate(overview, grid, mode="bilinear")
    assert_parity(features[:, :128], expected)


def test_equal_windows_share_a_call(monkeypatch):
    windowed, batches = build(2), []
    forward = windowed.backbone.forward
    monkeypatch.setattr(
        windowed.backbone, "forward", lambda x: batches.append(tuple(x.shape)) or forward(x)
    )
    windowed(torch.randn(1, 3, 96, 96))
    assert batches == [(5, 3, 48, 48)]  # four windows and the global view


def test_no_windows_are_the_maps_themselves():
    windowed = build(None)
    x = torch.randn(1, 3, 40, 50)
    (features,) = windowed(x)
    assert features.shape == (1, windowed.out_channels, 3, 4) == (1, 128, 3, 4)
    assert torch.equal(features, torch.cat(windowed.backbone(F.pad(x, (0, 14, 0, 8))), dim=1))


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_flow_only_into_a_backbone_that_trains(frozen):
    windowed = build(2, frozen_stages=4 if frozen else -1).train()
    (features,) = windowed(torch.randn(1, 3, 64, 64))
    assert features.requires_grad != frozen


@pytest.mark.parametrize(
    ("backbone", "num_windows", "message"),
    [
        (toys.vit(out_type="cls_token"), 2, "out_type='cls_token'"),
        ({"type": "DINOv3ConvNeXt", "arch": {"depths": [1] * 4, "dims": [8] * 4}}, 2, "ConvNeXt"),
        (toys.vit(), 0, "num_windows is 0; expected 1 or more, or None"),
    ],
)
def test_other_backbones_are_refused(backbone, num_windows, message):
    with pytest.raises(ValueError, match=message):
        DINOv3WindowedBackbone(backbone, num_windows=num_windows)

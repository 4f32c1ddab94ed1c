"""A pyramid over several layers is the plain one over their concatenation."""

import pytest
import torch

import dinov3_mm.hosts  # noqa: F401
from dinov3_mm.models.adapters import SimpleFeaturePyramid
from tests.checkpoints.toys import redraw
from tests.hosts.lane import require_hosts

require_hosts()

from dinov3_mm.models.detection import DINOv3ConcatPyramid  # noqa: E402

MAPS = [torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)]


def test_levels():
    neck = redraw(DINOv3ConcatPyramid(8, 6, strides=(8, 16), num_outs=3))
    plain = SimpleFeaturePyramid(8, 6, strides=(8, 16), num_outs=3)
    plain.load_state_dict(neck.state_dict())
    assert neck.strides == (8, 16, 32)
    for level, expected in zip(neck(MAPS), plain(torch.cat(MAPS, 1)), strict=True):
        assert torch.equal(level, expected)


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (MAPS[:1], "1 maps .* 4 channels together, expected .* in_channels=8"),
        ([MAPS[0], MAPS[1][..., :3]], r"sizes \[\(6, 3\), \(6, 5\)\]"),
    ],
)
def test_other_maps_are_refused(maps, message):
    with pytest.raises(ValueError, match=message):
        DINOv3ConcatPyramid(8, 6)(maps)

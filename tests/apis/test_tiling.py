"""Tiles: a backbone without context sees no difference, one with context does."""

import pytest
import torch

from dinov3_mm.features.tokens import Tiling
from tests.apis.toys import MeanPatches, toy_extractor, toy_pictures


@pytest.mark.parametrize("overlap", [0, 8, 24, None])
@pytest.mark.parametrize("size", [(64, 64), (72, 104), (32, 120), (16, 24)])
def test_tokens_without_context_are_stitched_exactly(size, overlap):
    (image,) = toy_pictures(1, *size)
    whole = toy_extractor(MeanPatches(), image_size="native")(image)
    backbone = MeanPatches()
    tiled = toy_extractor(backbone, image_size="native", tile=32, overlap=overlap)(image)
    torch.testing.assert_close(tiled.patches, whole.patches, atol=1e-5, rtol=0)
    assert tiled.grids == whole.grids
    assert max(max(shape[2:]) for shape in backbone.passes) <= 32
    if max(size) <= 32:
        assert torch.equal(tiled.cls, whole.cls)


def test_cls_and_registers_are_means_over_the_tiles():
    (image,) = toy_pictures(1, 32, 64)
    tiled = toy_extractor(image_size="native", tile=32, overlap=0, layers=1)
    halves = tiled([image[:, :32], image[:, 32:]])
    features = tiled(image)
    torch.testing.assert_close(features.cls[0], halves.cls.mean(0))
    torch.testing.assert_close(features.registers[0], halves.registers.mean(0))
    torch.testing.assert_close(features.layers[1].cls[0], halves.layers[1].cls.mean(0))
    left = features.feature_maps[0, :, :, :4]
    torch.testing.assert_close(left, halves.feature_maps[0])
    whole = toy_extractor(image_size="native")(image)
    assert (features.patches - whole.patches).abs().max() > 1e-2


def test_tiles_cover_the_image_and_share_at_least_the_overlap():
    tiling = Tiling(64, 16, 16)
    starts = sorted({y for y, _ in tiling.positions(208, 64)})
    assert starts == [0, 48, 96, 144]
    assert tiling.positions(64, 48) == [(0, 0)]
    assert Tiling(64, 0, 16).positions(64, 160) == [(0, 0), (0, 64), (0, 96)]

"""Baselines with known values and the table that compares them with a backbone."""

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console

from dinov3_mm.datasets.evaluation_images import ImageSet
from dinov3_mm.evaluation import table as tables
from dinov3_mm.evaluation.table import (
    colour_histogram,
    random_init_backbone,
    raw_patches,
    raw_pixels,
)
from dinov3_mm.models.backbones import DINOv3ViT
from tests.evaluation.toys import ColourSquares

ARCH = {"embed_dims": 48, "num_layers": 2, "num_heads": 3, "num_registers": 2}


class Halves:
    """Left half black, right half white."""

    def __len__(self) -> int:
        return 1

    def load_image(self, index: int) -> np.ndarray:
        image = np.zeros((32, 32, 3), np.uint8)
        image[:, 16:] = 255
        return image


def test_colour_histogram_of_two_colours():
    histogram = colour_histogram(ImageSet(Halves(), 32), bins=4)[0]
    assert histogram.shape == (64,) and histogram.norm() == pytest.approx(1)
    assert histogram[0] == histogram[63] == pytest.approx(0.5**0.5)


def test_colour_histogram_is_numpys():
    images = ImageSet(ColourSquares(3), 32)
    for image, actual in zip((images[i] for i in range(3)), colour_histogram(images, bins=8)):
        pixels = image.flatten(1).T.numpy()
        expected, _ = np.histogramdd(pixels, bins=8, range=[(0, 256)] * 3)
        np.testing.assert_allclose(actual.numpy() ** 2, expected.flatten() / 1024, atol=1e-6)


def test_raw_pixels_and_patches():
    images = ImageSet(Halves(), 32)
    pixels = raw_pixels(images, 4)[0].view(3, 4, 4)
    expected = torch.tensor([-0.5, -0.5, 0.5, 0.5]).expand(3, 4, 4)
    torch.testing.assert_close(pixels, expected)
    patches = raw_patches(images, 16)[0]
    assert patches.shape == (4, 768)
    assert patches.mean(1).tolist() == [0, 1, 0, 1]  # row-major


def test_random_init_is_the_same_architecture_with_other_weights():
    backbone = DINOv3ViT(arch=ARCH, drop_path_rate=0.1)
    backbone.init_weights()
    state = torch.get_rng_state()
    fresh, again = random_init_backbone(backbone, 3), random_init_backbone(backbone, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert fresh.arch_settings == backbone.arch_settings and not fresh.training
    first, second, own = (dict(m.named_parameters()) for m in (fresh, again, backbone))
    assert first.keys() == own.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "patch_embed.proj.weight"
    assert not torch.equal(first[name], own[name])


@pytest.fixture(scope="module")
def result():
    backbone = DINOv3ViT(arch=ARCH)
    backbone.init_weights()
    sources = ColourSquares(64), ColourSquares(32, seed=1)
    return tables.representation_table(backbone, *sources, image_size=32, k=(3, 5), dense=True)


def test_table_compares_all_representations(result):
    assert [row.name for row in result.rows] == [
        "raw pixels",
        "colour histogram",
        "random init, CLS",
        "random init, mean patches",
        "trained, CLS",
        "trained, mean patches",
    ]
    assert result.chance == 25.0 and result["raw pixels"].dims == 768
    assert result["colour histogram"].best == 100.0  # colour is the class
    assert list(result.dense) == ["raw pixels", "random init", "trained"]
    raw = result.dense["raw pixels"]
    assert raw.patch_miou > raw.chance_miou + 30  # the labelled half is one flat colour
    with pytest.raises(KeyError, match="colour histogram"):
        result["nothing"]


def test_table_prints_and_serialises(result):
    stored = json.loads(json.dumps(result.to_dict()))
    assert stored["rows"][1]["top1"] == {"3": 100.0, "5": 100.0}
    text = io.StringIO()
    result.print(Console(file=text, width=100))
    for expected in ("chance", "trained, mean patches", "k=5", "patch mIoU", "100.0"):
        assert expected in text.getvalue()

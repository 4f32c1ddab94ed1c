"""Colour changes of the segmentation protocol."""

import colorsys

import numpy as np
import pytest
import torch

from dinov3_mm.datasets.transforms import DINOv3PhotoMetricDistortion
from dinov3_mm.datasets.transforms import host_steps as photometric

RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (6, 7, 3), dtype=np.uint8)


def draws(monkeypatch, transform, values, coin):
    """Let a transform draw brightness, contrast, saturation and hue from ``values``."""
    left = list(values)
    monkeypatch.setattr(transform, "_draw", lambda *_: left.pop(0))
    monkeypatch.setattr(np.random, "randint", lambda *_: coin)
    return transform({"img": IMAGE.copy()})["img"]


def test_brightness_and_contrast_truncate(monkeypatch):
    out = draws(monkeypatch, DINOv3PhotoMetricDistortion(), (-20.5, 1.5, None, None), 1)
    darker = np.clip(IMAGE.astype(float) - 20.5, 0, 255).astype(np.uint8)
    expected = np.clip(darker.astype(float) * 1.5, 0, 255).astype(np.uint8)
    assert (out == expected).all()


def test_hue_turns_the_circle(monkeypatch):
    """Half a circle, against the standard library."""
    out = draws(monkeypatch, DINOv3PhotoMetricDistortion(), (None, None, None, 0.5), 0)
    for blue_green_red, found in zip(IMAGE.reshape(-1, 3), out.reshape(-1, 3)):
        h, s, v = colorsys.rgb_to_hsv(*(blue_green_red[::-1] / 255))
        expected = np.array(colorsys.hsv_to_rgb((h + 0.5) % 1, s, v))[::-1] * 255
        assert np.abs(found - expected).max() <= 1.01


def test_saturation_blends_with_grey(monkeypatch):
    out = draws(monkeypatch, DINOv3PhotoMetricDistortion(), (None, None, 0.5, None), 0)
    grey = IMAGE[..., ::-1] @ np.array([0.299, 0.587, 0.114])
    expected = 0.5 * IMAGE + 0.5 * grey[..., None]
    assert np.abs(out - expected).max() <= 1.5


def test_contrast_comes_first_or_last(monkeypatch):
    """Clipping makes the order visible."""
    values = (None, 1.5, 1.5, 0.3)
    outputs = [draws(monkeypatch, DINOv3PhotoMetricDistortion(), values, coin) for coin in (0, 1)]
    assert (outputs[0] != outputs[1]).any()


def test_half_of_the_changes_are_made(monkeypatch):
    np.random.seed(0)
    counts = np.zeros(4)
    names = ["_affine", "_colours"]
    seen = {name: [] for name in names}
    for name in names:
        original = getattr(photometric, name)
        monkeypatch.setattr(
            photometric,
            name,
            lambda image, a, b, original=original, name=name: (
                seen[name].append((a, b)) or original(image, a, b)
            ),
        )
    transform = DINOv3PhotoMetricDistortion()
    for _ in range(400):
        seen["_affine"].clear(), seen["_colours"].clear()
        out = transform({"img": IMAGE.copy()})["img"]
        assert out.dtype == np.uint8 and out.shape == IMAGE.shape
        (saturation, hue), (_, delta) = seen["_colours"][0], seen["_affine"][0]
        contrast = seen["_affine"][1][0]
        counts += [value is not None for value in (delta, contrast, saturation, hue)]
        assert delta is None or abs(delta) <= 32
        assert hue is None or abs(hue) <= 0.5
    assert (np.abs(counts / 400 - 0.5) < 0.1).all(), counts


def test_refusals():
    with pytest.raises(ValueError, match="hue_delta is 18"):
        DINOv3PhotoMetricDistortion(hue_delta=18)
    with pytest.raises(ValueError, match="contrast_range"):
        DINOv3PhotoMetricDistortion(contrast_range=(1.5, 0.5))
    with pytest.raises(ValueError, match=r"expected uint8 \(H, W, 3\)"):
        DINOv3PhotoMetricDistortion()({"img": torch.zeros(4, 4, 3).numpy()})

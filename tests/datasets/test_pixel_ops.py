"""Each operation against torchvision's PIL implementation with the same parameters."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dinov3_mm.datasets.transforms import pixel_ops
from dinov3_mm.datasets.transforms.pixel_ops import Box, Distortion
from tests.datasets.photos import photo

IMAGES = [photo(index=index) for index in range(3)]


def mean_difference(ours, theirs):
    theirs = np.asarray(theirs, np.float32)
    assert ours.dtype == np.uint8 and ours.shape == theirs.shape
    return np.abs(ours - theirs).mean()


@pytest.mark.parametrize("size", [32, 96, 224])
def test_crop_resize(size):
    box = Box(10, 20, 90, 120)
    for image in IMAGES:
        theirs = tv.resized_crop(
            Image.fromarray(image), 10, 20, 90, 120, [size, size], InterpolationMode.BICUBIC
        )
        assert mean_difference(pixel_ops.crop_resize(image, box, size), theirs) < 0.1


def test_crop_of_the_target_size_is_copied():
    image = IMAGES[0]
    crop = pixel_ops.crop_resize(image, Box(3, 5, 64, 64), 64)
    assert (crop == image[3:67, 5:69]).all()
    assert not np.shares_memory(crop, image)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_resizing_any_number_of_channels(channels):
    image = np.random.default_rng(0).integers(0, 256, (50, 60, channels), dtype=np.uint8)
    planes = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    expected = torch.nn.functional.interpolate(planes, (32, 32), mode="bicubic", antialias=True)
    ours = pixel_ops.to_chw(pixel_ops.crop_resize(image, Box(0, 0, 50, 60), 32))
    assert (ours == expected[0].numpy()).all()
    exact = torch.nn.functional.interpolate(
        planes.float(), (32, 32), mode="bicubic", antialias=True
    )
    ours = pixel_ops.to_chw(pixel_ops.resize_float(image, 32))
    assert ours.dtype == np.float32
    assert np.abs(ours - exact[0].numpy()).max() < 1e-3


# Bounds: brightness and contrast differ where OpenCV's float32 and PIL's truncation disagree,
# saturation by 10-bit coefficients, hue by the 256 (OpenCV) or 255 (PIL) steps of 8-bit HSV.
@pytest.mark.parametrize(
    ("name", "factors", "bound"),
    [
        ("brightness", (0.6, 0.9, 1.0, 1.4), 0.05),
        ("contrast", (0.6, 0.9, 1.0, 1.4), 0.05),
        ("saturation", (0.8, 1.0, 1.2), 0.3),
        ("hue", (-0.1, -0.03, 0.0, 0.07, 0.1), 1.0),
    ],
)
def test_jitter(name, factors, bound):
    for image in IMAGES:
        for factor in factors:
            ours = getattr(pixel_ops, f"adjust_{name}")(image.copy(), factor)
            theirs = getattr(tv, f"adjust_{name}")(Image.fromarray(image), factor)
            assert mean_difference(ours, theirs) < bound, factor


def test_grayscale_solarize_flip():
    for image in IMAGES:
        pil = Image.fromarray(image)
        assert mean_difference(pixel_ops.grayscale(image), tv.rgb_to_grayscale(pil, 3)) < 0.02
        for threshold in (0, 100, 128, 256):
            theirs = tv.solarize(pil, threshold)
            assert mean_difference(pixel_ops.solarize(image, threshold), theirs) == 0
        assert mean_difference(pixel_ops.flip(image), tv.horizontal_flip(pil)) == 0


@pytest.mark.parametrize("sigma", [0.1, 0.25, 0.3, 0.5, 0.8, 1.1, 1.5, 2.0])
def test_blur(sigma):
    for image in IMAGES:
        theirs = tv.gaussian_blur(Image.fromarray(image), [9, 9], [sigma, sigma])
        ours = pixel_ops.gaussian_blur(image, sigma, 9)
        assert mean_difference(ours, theirs) < 0.15
        assert np.abs(ours.astype(int) - np.asarray(theirs)).max() <= 1


def test_distortion_applies_in_order():
    distortion = Distortion(
        (("hue", 0.05), ("contrast", 1.3), ("brightness", 0.8), ("saturation", 1.2)),
        blur_sigma=1.0,
        solarize=True,
    )
    pil = Image.fromarray(IMAGES[0])
    pil = tv.adjust_contrast(tv.adjust_hue(pil, 0.05), 1.3)
    pil = tv.adjust_saturation(tv.adjust_brightness(pil, 0.8), 1.2)
    pil = tv.solarize(tv.gaussian_blur(pil, [9, 9], [1.0, 1.0]), 128)
    assert mean_difference(pixel_ops.distort(IMAGES[0], distortion, 9, 128), pil) < 2.0


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_other_channel_numbers_get_brightness_and_contrast_only(channels):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, channels), dtype=np.uint8)
    colors = Distortion((("saturation", 1.2), ("hue", 0.1)), grayscale=True)
    assert (pixel_ops.distort(image, colors, 9, 128) == image).all()
    both = Distortion((("brightness", 0.7), ("contrast", 1.3)))
    ours = pixel_ops.distort(image, both, 9, 128)
    dark = np.floor(image * 0.7)
    expected = np.clip(np.floor(1.3 * dark - 0.3 * int(dark.mean() + 0.5)), 0, 255)
    assert ours.shape == image.shape
    # A level of rounding in the first operation may become two after the second.
    assert np.abs(ours - expected).max() <= 2


def test_inputs_are_left_alone():
    image = IMAGES[0].copy()
    full = Distortion((("hue", 0.1), ("brightness", 1.2)), True, 1.0, True)
    pixel_ops.distort(image, full, 9, 128)
    pixel_ops.crop_resize(image, Box(0, 0, 100, 100), 50)
    assert (image == IMAGES[0]).all()

"""Operations on float32 images: against torchvision on float tensors, and the 8-bit ones."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from dinov3_mm.datasets.transforms import pixel_ops
from dinov3_mm.datasets.transforms.pixel_ops import Box, Distortion
from tests.datasets.photos import photo

IMAGE = photo().astype(np.float32)
# torchvision's float images are in 0..1.
TENSOR = torch.from_numpy(IMAGE.transpose(2, 0, 1).copy()) / 255
MANY = (1, 2, 4, 5, 8, 13, 150)


def many_channels(channels, dtype=np.float32, height=40, width=50):
    values = np.random.default_rng(channels).random((height, width, channels)) * 255
    return values.astype(dtype)


def difference(ours, theirs):
    """Largest difference in grey levels to a ``(C, H, W)`` tensor in 0..1."""
    assert ours.dtype == np.float32 and ours.flags.c_contiguous
    return np.abs(ours - 255 * theirs.permute(1, 2, 0).numpy()).max()


@pytest.mark.parametrize("size", [32, 224])
def test_crop_resize(size):
    theirs = tv.resized_crop(TENSOR, 10, 20, 90, 120, [size, size], InterpolationMode.BICUBIC)
    ours = pixel_ops.crop_resize(IMAGE, Box(10, 20, 90, 120), size)
    assert difference(ours, theirs.clamp(0, 1)) < 1e-3


def test_resizing_keeps_the_range():
    edge = np.zeros((20, 20, 2), np.float32)
    edge[:, 10:] = 255
    ours = pixel_ops.crop_resize(edge, Box(0, 0, 20, 20), 50)
    assert ours.min() == 0 and ours.max() == 255
    # bicubic would overshoot
    assert pixel_ops.resize_float(edge, 50).max() > 256


# torchvision's contrast takes the mean of luma in 0..1 unrounded, its hue another HSV formula.
@pytest.mark.parametrize(
    ("name", "factors", "bound"),
    [
        ("brightness", (0.0, 0.6, 1.0, 1.4), 1e-3),
        ("contrast", (0.6, 1.0, 1.4), 2e-2),
        ("saturation", (0.0, 0.8, 1.0, 1.2), 3e-2),
        ("hue", (-0.1, 0.0, 0.07, 0.1), 2e-2),
    ],
)
def test_jitter(name, factors, bound):
    for factor in factors:
        ours = getattr(pixel_ops, f"adjust_{name}")(IMAGE.copy(), factor)
        theirs = getattr(tv, f"adjust_{name}")(TENSOR, factor)
        assert difference(ours, theirs) < bound, factor


def test_grayscale_solarize_flip():
    assert difference(pixel_ops.grayscale(IMAGE), tv.rgb_to_grayscale(TENSOR, 3)) < 3e-2
    ours = pixel_ops.solarize(IMAGE, 128)
    assert difference(ours, tv.solarize(TENSOR, 128 / 255)) < 1e-3
    assert difference(pixel_ops.flip(IMAGE), tv.horizontal_flip(TENSOR)) < 1e-4


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.8, 2.0])
def test_blur(sigma):
    theirs = tv.gaussian_blur(TENSOR, [9, 9], [sigma, sigma])
    assert difference(pixel_ops.gaussian_blur(IMAGE, sigma, 9), theirs) < 1e-3


DISTORTION = Distortion(
    (("contrast", 1.3), ("hue", 0.1), ("brightness", 0.8), ("saturation", 1.2)),
    grayscale=True,
    blur_sigma=1.0,
    solarize=True,
)


@pytest.mark.parametrize("channels", MANY)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_every_operation_takes_any_number_of_channels(channels, dtype):
    """Channel by channel, except for contrast, whose mean is over all channels."""
    image = many_channels(channels, dtype)
    plain = Distortion((("brightness", 0.8),), blur_sigma=1.0, solarize=True)
    ours = pixel_ops.distort(pixel_ops.flip(image), plain, 9, 128)
    small = pixel_ops.to_chw(pixel_ops.crop_resize(image, Box(1, 2, 30, 40), 16))
    assert ours.shape == image.shape and ours.dtype == small.dtype == dtype
    rounding = 1 if dtype == np.uint8 else 1e-3
    for channel in range(channels):
        one = np.ascontiguousarray(image[..., channel : channel + 1])
        alone = pixel_ops.distort(pixel_ops.flip(one), plain, 9, 128)
        assert np.abs(ours[..., channel] - alone[..., 0].astype(np.float32)).max() <= rounding
        alone = pixel_ops.crop_resize(one, Box(1, 2, 30, 40), 16)[..., 0]
        assert np.abs(small[channel] - alone.astype(np.float32)).max() < 1e-3


@pytest.mark.parametrize("channels", MANY)
def test_float_is_8_bit_without_rounding(channels):
    image = many_channels(channels, np.uint8)
    both = Distortion((("brightness", 0.8), ("contrast", 1.3)), blur_sigma=1.0)
    rounded = pixel_ops.distort(image, both, 9, 128).astype(np.float32)
    exact = pixel_ops.distort(image.astype(np.float32), both, 9, 128)
    # Up to a level each in brightness, the mean for the contrast, contrast (x 1.3) and blur.
    assert 0.1 < np.abs(rounded - exact).max() < 3.5


def test_colour_operations_need_three_channels():
    image = many_channels(5)
    colours = Distortion((("saturation", 1.2), ("hue", 0.1)), grayscale=True)
    assert (pixel_ops.distort(image, colours, 9, 128) == image).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_dropped_channels_are_black_after_everything_else(dtype):
    image = many_channels(5, dtype)
    full = pixel_ops.distort(image, DISTORTION, 9, 128)
    dropped = Distortion(
        DISTORTION.jitter, blur_sigma=1.0, solarize=True, dropped=(0, 3), grayscale=True
    )
    ours = pixel_ops.distort(image, dropped, 9, 128)
    assert not ours[..., [0, 3]].any()
    assert (ours[..., [1, 2, 4]] == full[..., [1, 2, 4]]).all()


def test_inputs_are_left_alone():
    for image in (many_channels(3), many_channels(8), many_channels(8, np.uint8)):
        copy = image.copy()
        pixel_ops.distort(image, DISTORTION, 9, 128)
        pixel_ops.distort(image, Distortion(dropped=(0,)), 9, 128)
        pixel_ops.crop_resize(image, Box(0, 0, 40, 40), 20)
        assert (image == copy).all()

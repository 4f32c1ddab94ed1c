"""From images of any form to inputs: geometry, against torchvision, PIL and transformers."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DINOv3ViTImageProcessor

from dinov3_mm import make_transform
from dinov3_mm.checkpoints import Statistics
from dinov3_mm.features.preparation import (
    ImagePreparation,
    UnsuitableImageError,
    from_array,
    load_pixels,
    parse_image_size,
)
from tests.apis.toys import toy_pictures


def preparation(size, resize="squash", channels=3, **options):
    return ImagePreparation(channels, 16, size, resize, **options)


def no_files(path):
    raise AssertionError(f"{path} was read")


@pytest.mark.parametrize("size", [(224, 224), (96, 160)])
def test_squash_is_the_reference_preprocessing(size):
    (picture,) = toy_pictures(1, 120, 200)
    plain = Statistics((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    expected = make_transform(plain, size)(picture) * 255
    torch.testing.assert_close(
        preparation(size)(from_array(picture)).float(), expected, atol=1e-4, rtol=0
    )


def test_squash_against_transformers():
    (picture,) = toy_pictures(1, 120, 200)
    processor = DINOv3ViTImageProcessor(image_mean=[0, 0, 0], image_std=[1, 1, 1])
    theirs = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"][0] * 255
    ours = preparation((224, 224))(from_array(picture))
    # transformers resizes floats. On 8 bits, as in the reference, two passes round; PIL does too.
    difference = ours - theirs
    assert difference.abs().max() <= 1.001 and abs(difference.mean()) <= 0.05
    pil = np.asarray(Image.fromarray(picture).resize((224, 224), 2)).transpose(2, 0, 1)
    assert (ours - torch.from_numpy(pil.astype(np.float32))).abs().mean() <= 0.01


@pytest.mark.parametrize("interpolation, resample", [("bilinear", 2), ("bicubic", 3)])
def test_short_side_crop_against_pil(interpolation, resample):
    (picture,) = toy_pictures(1, 120, 200)
    ours = preparation((64, 64), "short_side_crop", interpolation=interpolation)
    resized = Image.fromarray(picture).resize((107, 64), resample)
    expected = np.asarray(resized)[:, 22:86].transpose(2, 0, 1)  # round((107 - 64) / 2) = 22
    difference = ours(from_array(picture)).numpy().astype(int) - expected
    assert abs(difference).max() <= 1


def test_short_side_crop_covers_any_size():
    picture = from_array(toy_pictures(1, 120, 200)[0])
    for size in ((64, 32), (32, 64), (48, 240)):
        assert preparation(size, "short_side_crop")(picture).shape == (3, *size)


def test_native_crop_keeps_the_upper_left_pixels():
    picture = from_array(toy_pictures(1, 120, 200)[0])
    cropped = preparation(None, "crop")(picture)
    assert torch.equal(cropped, picture[:, :112, :192])


def test_native_pad_repeats_the_border():
    picture = from_array(toy_pictures(1, 120, 200)[0])
    padded = preparation(None, "pad")(picture)
    assert padded.shape == (3, 128, 208)
    assert torch.equal(padded[:, :120, :200], picture)
    assert (padded[:, 120:, :200] == picture[:, -1:]).all()
    assert preparation(None, "pad")(picture[:, :5, :5]).shape == (3, 16, 16)


def test_float_pixels_of_many_channels_are_not_rounded():
    image = np.random.default_rng(0).uniform(0, 255, (50, 70, 5)).astype(np.float32)
    prepared = preparation((32, 32), channels=5)(from_array(image))
    expected = torch.nn.functional.interpolate(
        from_array(image)[None], (32, 32), mode="bilinear", antialias=True
    )[0]
    torch.testing.assert_close(prepared, expected, atol=1e-3, rtol=0)
    assert prepared.dtype == torch.float32


def test_forms_of_an_image_are_equal(tmp_path):
    (picture,) = toy_pictures(1)
    Image.fromarray(picture).save(tmp_path / "a.png")
    expected = torch.from_numpy(picture).permute(2, 0, 1)
    read = lambda path: np.asarray(Image.open(path))  # noqa: E731
    for form in (
        picture,
        picture[::-1][::-1],
        Image.fromarray(picture),
        expected,
        expected.float(),
        picture.astype(np.float64),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
    ):
        assert torch.equal(load_pixels(form, read).float(), expected.float())
    assert load_pixels(picture[..., 0], no_files).shape == (1, 40, 56)


@pytest.mark.parametrize(
    "image, error, message",
    [
        (np.zeros((4, 4, 3), np.float32) + 0.5, ValueError, "0..255 scale"),
        (np.zeros((4, 4, 3), np.float32) - 1.0, ValueError, "not normalised"),
        (np.zeros((4, 4, 3), np.int64), TypeError, "uint8, or floating point"),
        (np.zeros((2, 4, 4, 3), np.uint8), ValueError, r"shape \(2, 4, 4, 3\)"),
        (torch.zeros(3, 0, 4, dtype=torch.uint8), ValueError, r"shape \(3, 0, 4\)"),
        ({"image": 1}, TypeError, "an image is a dict; expected a path"),
        ("nowhere/cat.jpg", FileNotFoundError, "no image at nowhere/cat.jpg"),
        ("/tmp", ValueError, "is a folder.*extract_features.py"),
    ],
)
def test_what_is_no_image(image, error, message):
    with pytest.raises(error, match=message):
        load_pixels(image, no_files)


def test_images_that_do_not_fit():
    grey = from_array(np.zeros((40, 40), np.uint8))
    with pytest.raises(UnsuitableImageError, match=r"1 channel\(s\), the backbone takes 3"):
        preparation((32, 32))(grey)
    tiny = from_array(np.zeros((40, 10, 3), np.uint8))
    with pytest.raises(UnsuitableImageError, match=r"40x10 pixels is smaller than one patch of 16"):
        preparation(None, "crop")(tiny)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            dict(size=(230, 224)),
            "image_size 230 is not a multiple of the patch size 16; use 224 or",
        ),
        (dict(size=(8, 16)), "use 16"),
        (dict(size=None), "image_size='native' goes with crop or pad"),
        (dict(size=(32, 32), resize="pad"), "goes with squash or short_side_crop"),
        (dict(size=(32, 32), interpolation="bicubik"), "did you mean 'bicubic'"),
    ],
)
def test_wrong_geometry(arguments, message):
    with pytest.raises(ValueError, match=message):
        preparation(**arguments)


def test_image_sizes():
    assert parse_image_size(None, 16) == (256, 256) and parse_image_size(None, 14) == (224, 224)
    assert parse_image_size(None, 32) == (256, 256) and parse_image_size(None, 8) == (256, 256)
    assert parse_image_size(64, 16) == (64, 64) and parse_image_size((32, 64), 16) == (32, 64)
    assert parse_image_size("native", 16) is None
    for wrong in ("big", (1, 2, 3), 0, 2.5, (16, "x")):
        with pytest.raises(ValueError, match="expected a side in pixels"):
            parse_image_size(wrong, 16)

"""The transform for inference against PIL, torchvision's functions and arithmetic."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from dinov3_mm import make_transform
from dinov3_mm.checkpoints import Statistics, export_backbone
from tests.checkpoints.toys import toy_backbone
from tests.golden import max_difference

SATELLITE = ((0.430, 0.411, 0.296), (0.213, 0.156, 0.143))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture
def pixels():
    """A photo-like image (60, 90, 3) uint8: noise on a gradient."""
    rows, columns = np.mgrid[:60, :90]
    smooth = np.stack((rows * 4, columns * 2, (rows + columns)), axis=-1)
    noise = np.random.default_rng(0).integers(-20, 20, smooth.shape)
    return (smooth + noise).clip(0, 255).astype(np.uint8)


def normalised(chw, mean, std):
    values = chw.double() / 255
    return (values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.mark.parametrize(
    ("name", "statistics"),
    [
        ("dinov3_vitl16_sat493m", SATELLITE),
        ("dinov3_vitl16_lvd1689m", IMAGENET),
        ("dinov3_vitl16", IMAGENET),
        ("dinov3_convnext_tiny", IMAGENET),
    ],
)
def test_squash_resize_and_the_statistics_of_the_name(name, statistics, pixels):
    actual = make_transform(name, 32)(Image.fromarray(pixels))
    resized = TF.resize(
        torch.from_numpy(pixels).permute(2, 0, 1), [32, 32], InterpolationMode.BILINEAR
    )
    assert actual.dtype == torch.float32
    assert max_difference(actual, normalised(resized, *statistics)) < 1e-6
    by_pil = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BILINEAR)
    by_pil = normalised(torch.from_numpy(np.array(by_pil)).permute(2, 0, 1), *statistics)
    # PIL rounds between its two passes: at most one grey level apart.
    assert max_difference(actual, by_pil) <= 1.01 / 255 / min(statistics[1])


def test_every_form_of_an_image_gives_the_same(pixels):
    transform = make_transform("dinov3_vits16", (32, 48))
    expected = transform(Image.fromarray(pixels))
    assert expected.shape == (3, 32, 48)
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(transform(pixels), expected)
    assert torch.equal(transform(chw), expected)
    assert torch.equal(transform(chw[None].repeat(2, 1, 1, 1))[1], expected)
    with_alpha = Image.fromarray(np.dstack((pixels, pixels[..., 0])))
    assert torch.equal(transform(with_alpha), expected)
    grey = Image.fromarray(pixels[..., 0])
    assert torch.equal(transform(grey), transform(np.repeat(pixels[..., :1], 3, axis=2)))
    palette = Image.fromarray(pixels).quantize(16)
    assert torch.equal(transform(palette), transform(palette.convert("RGB")))


def test_default_sizes_and_other_resizes(pixels):
    assert make_transform("dinov3_vits16")(pixels).shape == (3, 256, 256)
    assert make_transform("dinov2_vits14")(pixels).shape == (3, 224, 224)
    assert make_transform("dinov3_vits16", resize="none")(pixels).shape == (3, 60, 90)
    cropped = make_transform("dinov3_vits16", 60, resize="crop")(pixels)
    whole = make_transform("dinov3_vits16", resize="none")(pixels)
    assert torch.equal(cropped, whole[:, :, 15:75])


def test_a_file_brings_its_own_statistics(pixels, tmp_path):
    custom = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    path = export_backbone(toy_backbone(), tmp_path / "b.safetensors", {"statistics": custom})
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = normalised(chw, *custom.values())
    assert max_difference(make_transform(path, resize="none")(pixels), expected) < 1e-6
    statistics = Statistics(*map(tuple, custom.values()))
    assert max_difference(make_transform(statistics, resize="none")(pixels), expected) < 1e-6


def test_what_is_no_8_bit_rgb_image_is_refused(pixels):
    transform = make_transform("dinov3_vits16", 32)
    with pytest.raises(TypeError, match=r"float32 .*expected a PIL image"):
        transform(torch.zeros(3, 8, 8))
    with pytest.raises(TypeError, match=r"\(3, 60, 90\)|\(90, 3, 60\)"):
        transform(pixels.transpose(2, 0, 1))
    with pytest.raises(TypeError, match="'I;16'"):
        transform(Image.fromarray(pixels[..., 0].astype(np.uint16)))
    with pytest.raises(TypeError, match="got str"):
        transform("photo.jpg")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": (1, 2, 3)}, "expected a number of pixels"),
        ({"resize": "squeeze"}, r"'squeeze'; expected one of \('squash'"),
        ({"size": 32, "resize": "none"}, "takes no size"),
        ({"size": (32, 48), "resize": "crop"}, "squares"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_transform("dinov3_vits16", **arguments)


def test_unknown_names(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        make_transform(tmp_path / "absent.pth")

"""Colours applied batched on the device against those that the worker applies image by image."""

import numpy as np
import pytest
import torch

from dinov3_mm.datasets import MultiCrop, MultiResolutionCrop, sample_generator
from dinov3_mm.datasets.collate import MultiCropCollate, stack_colors
from dinov3_mm.datasets.transforms import pixel_ops
from dinov3_mm.datasets.transforms.pixel_ops import Distortion
from dinov3_mm.engine.training_state import read_training_state, write_training_state
from dinov3_mm.models.pretraining import MultiCropPreprocessor
from dinov3_mm.models.pretraining.colors import apply_colors
from tests.datasets.photos import photo

SIZES = {"global_size": 64, "local_size": 32, "num_local": 4}
# Grey levels. A blur may fall on the other side of a half, and a later operation doubles that.
TOLERANCE = 2
SETTINGS = {"blur_kernel": 9, "solarize_threshold": 128}


def applied(images: np.ndarray, drawn: list[Distortion]) -> np.ndarray:
    """(n, H, W, C) images distorted in one batch."""
    crops = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    colors = {"global_crops": drawn, "local_crops": [], **SETTINGS}
    stacked = stack_colors([{**colors, "global_crops": [each]} for each in drawn], crops.shape[1])
    result = apply_colors(crops, stacked["global_crops"], **SETTINGS)
    assert result.dtype == crops.dtype
    return result.numpy().transpose(0, 2, 3, 1)


def random_images(count: int, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 48, 40, channels), dtype=np.uint8)


SINGLE = {
    "brightness": [Distortion(jitter=(("brightness", f),)) for f in (0.0, 0.6, 0.93, 1.4)],
    "contrast": [Distortion(jitter=(("contrast", f),)) for f in (0.0, 0.6, 0.93, 1.4)],
    "saturation": [Distortion(jitter=(("saturation", f),)) for f in (0.0, 0.8, 0.93, 1.2)],
    "hue": [Distortion(jitter=(("hue", f),)) for f in (-0.5, -0.1, 0.037, 0.1)],
    "grayscale": [Distortion(grayscale=True), Distortion()],
    "blur": [Distortion(blur_sigma=s) for s in (0.1, 0.4, 0.7, 1.2, 2.0)],
    "solarize": [Distortion(solarize=True), Distortion()],
    "dropped": [Distortion(dropped=(0, 2)), Distortion(dropped=(1,)), Distortion()],
}


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_an_operation_alone(name, dtype):
    drawn = SINGLE[name]
    images = random_images(len(drawn)).astype(dtype)
    ours = applied(images, drawn).astype(np.float64)
    theirs = [pixel_ops.distort(i, d, 9, 128) for i, d in zip(images, drawn)]
    difference = np.abs(ours - np.stack(theirs).astype(np.float64))
    if dtype == np.float32:
        assert difference.max() <= 2e-3
    else:
        assert difference.max() <= (name in ("blur", "hue"))
        assert (difference > 0).mean() < 1e-3


def test_every_color_turns_alike():
    """All 16.8 million colours through the hue, in steps of 3."""
    levels = np.arange(0, 256, 3, dtype=np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 86, 3)
    drawn = [Distortion(jitter=(("hue", 0.09),))]
    difference = applied(cube, drawn)[0].astype(int) - pixel_ops.adjust_hue(cube[0], 0.09)
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 1e-5


def batches(transform_of, image: np.ndarray, count: int = 12, iteration: int = 0, **settings):
    """The collated batch of both places, for the same positions."""
    results = []
    for place in ("worker", "device"):
        transform = transform_of(color_on=place, **settings)
        sides = [variant.global_size for variant in transform.variants]
        collate = MultiCropCollate(sides, 16, global_batch_size=count)
        first = iteration * count
        samples = [
            {
                **transform.at(iteration)(image, sample_generator(0, "augment", position)),
                "position": position,
                "broken": [],
            }
            for position in range(first, first + count)
        ]
        results.append(collate(samples))
    return results


def received(batch: dict, channels: int = 3) -> dict:
    preprocessor = MultiCropPreprocessor([0.5] * channels, [0.25] * channels)
    keys = [key for key in ("global_crops", "local_crops", "gram_crops") if key in batch]
    return preprocessor.receive(batch, keys)


def assert_alike(worker: dict, device: dict, channels: int = 3) -> None:
    assert "colors" not in worker and "colors" in device
    undistorted = device["global_crops"].clone()
    result = received(device, channels)
    assert torch.equal(device["global_crops"], undistorted)
    for key, crops in result.items():
        difference = (crops.double() - worker[key].double()).abs()
        assert crops.dtype == worker[key].dtype
        assert difference.max() <= TOLERANCE, key
        assert (difference > 1).double().mean() < 1e-4
        if key != "gram_crops":
            assert (device[key].double() - worker[key].double()).abs().mean() > 2
    assert torch.equal(worker["masks"], device["masks"])


def test_a_batch_has_the_colors_of_the_worker():
    assert_alike(*batches(lambda **s: MultiCrop(**SIZES, **s), photo(), count=24))


def test_multi_resolution():
    sets = [
        dict(global_size=64, local_size=32, gram_size=96, ratio=0.5),
        dict(global_size=96, local_size=48, gram_size=64, ratio=0.5),
    ]
    sides = set()
    for iteration in range(4):
        pair = batches(
            lambda **s: MultiResolutionCrop(sets, num_local=2, gram_no_distortions=True, **s),
            photo(),
            count=4,
            iteration=iteration,
        )
        sides.add(pair[1]["global_crops"].shape[-1])
        assert_alike(*pair)
    assert sides == {64, 96}


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_any_number_of_bands(channels, dtype):
    image = photo()[..., [0, 1, 2, 1, 0, 2, 1][:channels]].astype(dtype)
    pair = batches(lambda **s: MultiCrop(**SIZES, channel_drop_prob=0.3, **s), image, count=8)
    assert_alike(*pair, channels=channels)


def test_what_is_drawn_does_not_depend_on_the_place():
    drawn = [
        MultiCrop(**SIZES, color_on=place).draw(375, 500, sample_generator(0, "augment", 3))
        for place in ("worker", "device")
    ]
    assert drawn[0] == drawn[1]


def test_a_stored_batch_is_distorted_alike(tmp_path):
    """Captures of a step store its batches."""
    _, batch = batches(lambda **s: MultiCrop(**SIZES, **s), photo(), count=2)
    del batch["broken"]
    write_training_state(tmp_path / "batch.pt", {"batch": batch})
    again = read_training_state(tmp_path / "batch.pt")["batch"]
    for key, crops in received(batch).items():
        assert torch.equal(crops, received(again)[key])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(color_on="gpu"), "color_on='gpu'; known: device, worker"),
        (dict(color_on="devise"), "did you mean 'device'"),
        (dict(color_on="device", share_color_jitter=True), "colours the whole image"),
        (dict(color_on="device", local_from_global=True), "cuts local crops from distorted"),
        (dict(color_on="device", gram_size=96), "set gram_no_distortions=True"),
        (dict(color_on="device", blur_kernel=65), "blur_kernel of 65 does not fit crops of 32 px"),
    ],
)
def test_what_does_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        MultiCrop(**SIZES, **settings)


def test_colors_of_another_batch_are_refused():
    _, batch = batches(lambda **s: MultiCrop(**SIZES, **s), photo(), count=2)
    colors = batch["colors"]["local_crops"]
    with pytest.raises(ValueError, match=r"drawn for 8 crops \(jitter\), the batch has 4"):
        apply_colors(batch["global_crops"], colors, **SETTINGS)
    with pytest.raises(ValueError, match="drawn for 3 channels, the crops have 2"):
        apply_colors(batch["local_crops"][:, :2], colors, **SETTINGS)
    del colors["solarize"]
    with pytest.raises(ValueError, match="lack solarize"):
        apply_colors(batch["local_crops"], colors, **SETTINGS)

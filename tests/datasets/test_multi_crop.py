"""Statistics of the drawn parameters, geometry of the crops, and every option."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn.functional import interpolate
from torchvision.transforms import v2

from dinov3_mm.datasets import MultiCrop, sample_generator
from dinov3_mm.datasets.transforms import pixel_ops
from dinov3_mm.datasets.transforms.pixel_ops import Box, Uniforms, draw_resized_crop
from tests.datasets.photos import photo
from tests.golden import load_golden

GOLDEN, _ = load_golden("ssl_masking_data")
SMALL = {"global_size": 32, "local_size": 16, "num_local": 4}
PLAIN = {"jitter_prob": 0, "grayscale_prob": 0, "blur_probs": (0, 0, 0), "solarize_prob": 0}


def draws(transform, count=1000):
    return [transform.draw(375, 500, sample_generator(0, "augment", i)) for i in range(count)]


def test_probabilities_are_those_measured_on_the_reference():
    expected = GOLDEN["augmentation_pipeline_300_images_4_local"]
    drawn = draws(MultiCrop(**SMALL))
    crops = [crop for item in drawn for crop in item.global_crops + item.local_crops]
    blurred = sum(crop.distortion.blur_sigma is not None for crop in crops) / len(drawn)
    jittered = sum(bool(crop.distortion.jitter) for crop in crops) / len(drawn)
    assert abs(blurred - expected["expected_blur"]) < 0.12
    assert abs(jittered - expected["expected_jitter"]) < 0.12

    def share(predicate, chosen):
        return np.mean([predicate(crop) for crop in chosen])

    first, second = zip(*(item.global_crops for item in drawn))
    rates = GOLDEN["gaussian_blur_observed_application_rate_2000_draws"]
    assert share(lambda crop: crop.distortion.blur_sigma is not None, first) == 0
    assert (
        abs(
            share(lambda crop: crop.distortion.blur_sigma is not None, second)
            - rates["nominal_p=0.1"]
        )
        < 0.04
    )
    assert share(lambda crop: crop.distortion.solarize, first) == 0
    assert abs(share(lambda crop: crop.distortion.solarize, second) - 0.2) < 0.05
    assert abs(share(lambda crop: crop.distortion.grayscale, crops) - 0.2) < 0.025
    assert abs(share(lambda crop: crop.flip, crops) - 0.5) < 0.03


def test_jitter_factors_and_order():
    jitters = [
        crop.distortion.jitter for item in draws(MultiCrop(**SMALL)) for crop in item.global_crops
    ]
    jitters = [dict(jitter) for jitter in jitters if jitter]
    ranges = {
        "brightness": (0.6, 1.4),
        "contrast": (0.6, 1.4),
        "saturation": (0.8, 1.2),
        "hue": (-0.1, 0.1),
    }
    for name, (low, high) in ranges.items():
        values = np.array([jitter[name] for jitter in jitters])
        assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3
    orders = [tuple(jitter) for jitter in jitters]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3
    sigmas = [
        crop.distortion.blur_sigma
        for item in draws(MultiCrop(**SMALL))
        for crop in item.local_crops
    ]
    sigmas = [sigma for sigma in sigmas if sigma is not None]
    assert stats.kstest(sigmas, "uniform", (0.1, 1.9)).pvalue > 1e-3


@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
@pytest.mark.parametrize("shape", [(375, 500), (100, 900), (900, 100)])
def test_resized_crop_is_distributed_as_torchvisions(scale, shape):
    uniform = Uniforms(np.random.default_rng(0))
    boxes = [draw_resized_crop(*shape, scale, (3 / 4, 4 / 3), uniform) for _ in range(1500)]
    ours = np.array([(box.top, box.left, box.height, box.width) for box in boxes])
    image = torch.zeros(1, *shape)
    peer = v2.RandomResizedCrop(32, scale)
    theirs = [peer.make_params([image]) for _ in range(1500)]
    theirs = np.array(
        [[item[key] for key in ("top", "left", "height", "width")] for item in theirs]
    )
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert (ours[:, 0] + ours[:, 2] <= shape[0]).all()
    assert (ours[:, 1] + ours[:, 3] <= shape[1]).all()


def test_aspect_ratio_is_log_uniform():
    uniform = Uniforms(np.random.default_rng(0))
    boxes = [
        draw_resized_crop(2000, 2000, (0.1, 0.3), (3 / 4, 4 / 3), uniform) for _ in range(4000)
    ]
    logs = np.log([box.width / box.height for box in boxes])
    limit = np.log(4 / 3)
    assert stats.kstest(logs, "uniform", (-limit, 2 * limit)).pvalue > 1e-3


def test_output_shapes_are_the_references():
    expected = GOLDEN["augmentation_pipeline_300_images_4_local"]["output_keys"]
    sample = MultiCrop(**SMALL, gram_size=64)(photo(), np.random.default_rng(0))
    shapes = {key: [list(crop.shape) for crop in crops] for key, crops in sample.items()}
    assert shapes["global_crops"] == expected["global_crops"]
    assert shapes["local_crops"] == expected["local_crops"]
    assert shapes["gram_crops"] == expected["gram_teacher_crops"]


def test_crops_are_a_function_of_the_generator():
    transform = MultiCrop(**SMALL)
    first, again, other = (
        transform(photo(), sample_generator(0, "augment", index)) for index in (3, 3, 4)
    )
    for key in first:
        assert all((a == b).all() for a, b in zip(first[key], again[key]))
        assert any((a != b).any() for a, b in zip(first[key], other[key]))


def test_crops_show_the_drawn_regions():
    transform = MultiCrop(**SMALL, **PLAIN)
    image = photo()
    params = transform.draw(*image.shape[:2], np.random.default_rng(0))
    sample = transform.apply(image, params)
    crops = zip(
        params.global_crops + params.local_crops, sample["global_crops"] + sample["local_crops"]
    )
    for crop, ours in crops:
        box = crop.box
        region = image[box.top : box.top + box.height, box.left : box.left + box.width]
        region = region[:, ::-1] if crop.flip else region
        planes = torch.from_numpy(region.transpose(2, 0, 1).copy())[None].float()
        expected = interpolate(planes, ours.shape[1:], mode="bicubic", antialias=True)[0]
        assert np.abs(ours - expected.clamp(0, 255).numpy()).max() <= 2


def test_undistorted_gram_crops():
    transform = MultiCrop(**SMALL, gram_size=64, gram_no_distortions=True)
    image = photo()
    params = transform.draw(*image.shape[:2], np.random.default_rng(1))
    sample = transform.apply(image, params)
    plain = MultiCrop(**SMALL, gram_size=64, gram_no_distortions=True, **PLAIN)
    for crop, gram, distorted in zip(
        params.global_crops, sample["gram_crops"], sample["global_crops"]
    ):
        base = pixel_ops.crop_resize(image, crop.box, 64)
        base = pixel_ops.flip(base) if crop.flip else base
        assert (gram == pixel_ops.to_chw(base)).all()
        small = pixel_ops.crop_resize(base, Box(0, 0, 64, 64), 32)
        expected = pixel_ops.distort(small, crop.distortion, 9, 128)
        assert (distorted == pixel_ops.to_chw(expected)).all()
    sample = plain(image, np.random.default_rng(1))
    assert all(crop.dtype == np.uint8 for crops in sample.values() for crop in crops)


@pytest.mark.parametrize(("gram_size", "resampled"), [(64, "global_crops"), (16, "gram_crops")])
def test_distorted_gram_crops_are_one_crop_at_two_sizes(gram_size, resampled):
    """Resampling after normalisation is a float resize of the 0..255 crop, as both are linear."""
    transform = MultiCrop(**SMALL, gram_size=gram_size)
    sample = transform(photo(), np.random.default_rng(2))
    kept = "gram_crops" if resampled == "global_crops" else "global_crops"
    mean = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
    deviation = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
    for small, large in zip(sample[resampled], sample[kept]):
        assert small.dtype == np.float32 and large.dtype == np.uint8
        normalised = (torch.from_numpy(large).float() - mean) / deviation
        expected = interpolate(normalised[None], small.shape[1:], mode="bicubic", antialias=True)[0]
        ours = (torch.from_numpy(small) - mean) / deviation
        assert (ours - expected).abs().max() < 1e-4


def test_shared_color_jitter():
    transform = MultiCrop(**SMALL, share_color_jitter=True)
    drawn = draws(transform, 300)
    crops = [crop for item in drawn for crop in item.global_crops + item.local_crops]
    assert not any(crop.distortion.jitter or crop.distortion.grayscale for crop in crops)
    assert abs(np.mean([bool(item.shared.jitter) for item in drawn]) - 0.8) < 0.1
    params = next(item for item in drawn if item.shared.grayscale)
    sample = transform.apply(photo(375, 400), params)
    for crop in sample["global_crops"] + sample["local_crops"]:
        assert (crop == crop[:1]).all()


def test_local_crops_from_global_crops():
    transform = MultiCrop(96, 32, 4, local_from_global=True, **PLAIN)
    for index in range(20):
        rng = sample_generator(0, "augment", index)
        image = photo(300, 300)
        params = transform.draw(300, 300, rng)
        sample = transform.apply(image, params)
        assert [crop.base for crop in params.local_crops] == [0, 0, 1, 1]
        for crop, local in zip(params.local_crops, sample["local_crops"]):
            top, left = crop.box.top, crop.box.left
            assert top % 16 == 0 and top < 64 and left % 16 == 0 and left < 64
            window = sample["global_crops"][crop.base][:, top : top + 32, left : left + 32]
            assert (local == window).all()


def test_image_smaller_than_the_crops_is_enlarged():
    sample = MultiCrop(64, 32, 2)(photo(20, 30), np.random.default_rng(0))
    assert sample["global_crops"][0].shape == (3, 64, 64)


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_other_channel_numbers(channels):
    image = np.random.default_rng(0).integers(0, 256, (60, 80, channels), dtype=np.uint8)
    for seed in range(5):
        sample = MultiCrop(**SMALL, gram_size=48)(image, np.random.default_rng(seed))
        assert sample["local_crops"][0].shape == (channels, 16, 16)
        assert sample["gram_crops"][0].shape == (channels, 48, 48)


@pytest.mark.parametrize("channels", [1, 4, 8])
def test_float_images_give_the_8_bit_crops_without_rounding(channels):
    image = photo()[..., [0, 1, 2, 1, 0, 2, 2, 1][:channels]]
    transform = MultiCrop(**SMALL, jitter_prob=0, solarize_prob=0, gram_size=48)
    for seed in range(3):
        rounded = transform(image, np.random.default_rng(seed))
        exact = transform(image.astype(np.float32), np.random.default_rng(seed))
        for key, crops in exact.items():
            for ours, theirs in zip(crops, rounded[key]):
                assert ours.dtype == np.float32 and ours.shape == theirs.shape
                assert 0.05 < np.abs(ours - theirs).mean() < 0.6


def test_dropped_channels():
    transform = MultiCrop(**SMALL, channel_drop_prob=0.3)
    rngs = [sample_generator(0, "augment", index) for index in range(400)]
    crops = [
        crop.distortion.dropped
        for rng in rngs
        for item in [transform.draw(60, 80, rng, 8)]
        for crop in item.global_crops + item.local_crops
    ]
    rates = np.mean([[channel in dropped for channel in range(8)] for dropped in crops], axis=0)
    assert np.abs(rates - 0.3).max() < 0.04
    image = np.full((60, 80, 8), 100.0, np.float32)
    plain = MultiCrop(**SMALL, **PLAIN, channel_drop_prob=0.3)
    sample = plain(image, np.random.default_rng(0))
    drawn = plain.draw(60, 80, np.random.default_rng(0), 8)
    for crop, params in zip(sample["global_crops"], drawn.global_crops):
        assert np.flatnonzero(crop.max((1, 2)) == 0).tolist() == list(params.distortion.dropped)
    assert any(params.distortion.dropped for params in drawn.global_crops)


def test_one_channel_stays():
    transform = MultiCrop(**SMALL, channel_drop_prob=1.0)
    drawn = [transform.draw(60, 80, sample_generator(0, "augment", i), 4) for i in range(100)]
    kept = [set(range(4)) - set(c.distortion.dropped) for d in drawn for c in d.local_crops]
    assert all(len(channels) == 1 for channels in kept)
    assert set.union(*kept) == {0, 1, 2, 3}
    single = transform.draw(60, 80, np.random.default_rng(0), 1)
    assert single.global_crops[0].distortion.dropped == ()


def test_without_dropping_the_draws_do_not_depend_on_the_channels():
    one, eight = (MultiCrop().draw(60, 80, np.random.default_rng(0), n) for n in (1, 8))
    assert one == eight


def test_blur_variants():
    assert MultiCrop().blur_probs == (0.0, 0.9, 0.5)
    assert MultiCrop(blur_probs="paper").blur_probs == (1.0, 0.1, 0.5)
    assert MultiCrop(blur_probs=[0, 1, 0]).blur_probs == (0, 1, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_size": 0}, "global_size must be a positive integer, got 0"),
        ({"num_local": 0}, "num_local must be a positive integer, got 0"),
        ({"global_scale": (0.5, 0.2)}, "global_scale must be"),
        ({"local_scale": (0.0, 0.2)}, "local_scale must be"),
        ({"jitter_prob": 1.2}, r"jitter_prob must be in \[0, 1\], got 1\.2"),
        ({"jitter": {"hue": 0.7}}, "hue must be <= 0.5"),
        ({"blur_probs": "official"}, "three probabilities or 'paper'"),
        ({"blur_kernel": 8}, "blur_kernel must be odd"),
        ({"channel_drop_prob": 2}, "channel_drop_prob must be in"),
        ({"local_from_global": True, "num_local": 3}, "even num_local, got 3"),
        ({"local_from_global": True, "global_size": 96}, "local_size \\+ 16"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiCrop(**arguments)


def test_bad_images():
    with pytest.raises(
        TypeError, match=r"uint8 or float32 in 0\.\.255, got uint16 of shape \(8, 8, 3\)"
    ):
        MultiCrop()(np.zeros((8, 8, 3), np.uint16), np.random.default_rng(0))
    with pytest.raises(TypeError, match=r"got uint8 of shape \(8, 8\)"):
        MultiCrop()(np.zeros((8, 8), np.uint8), np.random.default_rng(0))

"""Normalisation on the device and the refusal of anything but a collated batch."""

import pytest
import torch
from torchvision.transforms.v2.functional import normalize

from dinov3_mm.models.pretraining import MultiCropPreprocessor
from tests.golden import assert_parity

from .toy import toy_batch

MEAN, STD = (0.43, 0.411, 0.296), (0.213, 0.156, 0.143)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crops_are_normalised_like_torchvision(dtype):
    batch = toy_batch(gram=True)
    keys = ("global_crops", "local_crops", "gram_crops")
    given = {key: batch[key].to(dtype) for key in keys}
    copies = {key: value.clone() for key, value in given.items()}
    preprocessor = MultiCropPreprocessor(MEAN, STD)
    result = preprocessor({**batch, **given}, training=True)
    assert result["data_samples"] is None
    for key in keys:
        assert_parity(result["inputs"][key], normalize(batch[key].float() / 255, MEAN, STD))
        assert torch.equal(given[key], copies[key])
    assert result["inputs"].keys() == {*keys, "masks", "mask_indices", "masks_weight"}
    assert preprocessor.statistics == (list(MEAN), list(STD))
    assert not preprocessor.state_dict()


def test_any_number_of_channels():
    batch = toy_batch()
    for key in ("global_crops", "local_crops"):
        batch[key] = batch[key][:, :1]
    assert MultiCropPreprocessor([0.5], [0.25])(batch)["inputs"]["global_crops"].shape[1] == 1


def test_statistics_of_released_models_by_name():
    preprocessor = MultiCropPreprocessor(statistics="SAT-493M")
    assert preprocessor.statistics == (list(MEAN), list(STD))
    assert MultiCropPreprocessor(statistics="LVD-1689M").statistics == (
        MultiCropPreprocessor().statistics
    )
    with pytest.raises(ValueError, match=r"trained on 'SAT493M'; did you mean 'SAT-493M'"):
        MultiCropPreprocessor(statistics="SAT493M")
    with pytest.raises(ValueError, match="give one or the other"):
        MultiCropPreprocessor(MEAN, STD, statistics="SAT-493M")
    with pytest.raises(ValueError, match="mean and std belong together"):
        MultiCropPreprocessor(MEAN)


def without(key):
    return {name: value for name, value in toy_batch().items() if name != key}


@pytest.mark.parametrize(
    "data, error, message",
    [
        ([torch.zeros(1)], TypeError, "got list"),
        (without("masks"), ValueError, "lacks the tensors masks; it has"),
        ({**toy_batch(), "global_crops": [1, 2]}, ValueError, "lacks the tensors global_crops"),
        (
            {**toy_batch(), "local_crops": torch.zeros(6, 4, 16, 16)},
            ValueError,
            r"local_crops has shape \(6, 4, 16, 16\), expected \(n, 3, H, W\)",
        ),
        (
            {**toy_batch(), "global_crops": torch.zeros(6, 3, 32, 32, dtype=torch.int32)},
            TypeError,
            "global_crops must be uint8 or float32 in 0..255, got torch.int32",
        ),
    ],
)
def test_other_data_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        MultiCropPreprocessor()(data)


@pytest.mark.parametrize("mean, std", [((123.0,) * 3, (58.0,) * 3), ((0.5,), (0.2,) * 3), ((), ())])
def test_bad_statistics(mean, std):
    with pytest.raises(ValueError, match="one value per channel for images in"):
        MultiCropPreprocessor(mean, std)

"""Feature extraction: values, order, modes, random state, precision and ranks."""

import random

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from dinov3_mm.datasets.evaluation_images import ImageSet
from dinov3_mm.features.frozen import (
    evaluating,
    extract_features,
    preserved_random_state,
    shard_indices,
)
from dinov3_mm.models.backbones.zoo import IMAGENET_MEAN, IMAGENET_STD
from tests.evaluation.toys import ColourSquares, MeanColour


def _expected(images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    stack = torch.stack([images[i] for i in range(len(images))]).double() / 255
    mean = torch.tensor(IMAGENET_MEAN).double().view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).double().view(3, 1, 1)
    normal = (stack - mean) / std
    patches = normal.unfold(2, 16, 16).unfold(3, 16, 16).mean((4, 5))
    return normal.mean((2, 3)), patches.flatten(2).transpose(1, 2)


def test_values_and_order_do_not_depend_on_the_batch_size():
    images = ImageSet(ColourSquares(11), 32)
    cls, patches = _expected(images)
    for batch_size in (3, 64):
        backbone = MeanColour()
        features = extract_features(backbone, images, patches=True, batch_size=batch_size)
        torch.testing.assert_close(features.cls.double(), cls, atol=1e-5, rtol=0)
        torch.testing.assert_close(features.patches.double(), patches, atol=1e-5, rtol=0)
        torch.testing.assert_close(features.mean_patch, features.patches.mean(1))
        assert max(backbone.batches) <= batch_size and sum(backbone.batches) == 11
    assert extract_features(MeanColour(), images).patches is None


def test_statistics_are_those_given():
    images = ImageSet(ColourSquares(2), 32)
    plain = extract_features(MeanColour(), images, mean=(0, 0, 0), std=(1, 1, 1))
    expected = torch.stack([images[i].float().mean((1, 2)) / 255 for i in range(2)])
    torch.testing.assert_close(plain.cls, expected)


def test_modes_gradients_and_random_state_are_left_alone():
    backbone = MeanColour().train()
    backbone.drop.eval()
    state = torch.get_rng_state()
    features = extract_features(backbone, ImageSet(ColourSquares(5), 32), num_workers=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert backbone.training and not backbone.drop.training
    assert not features.cls.requires_grad and backbone.weight.grad is None


def test_modes_come_back_after_an_error():
    backbone = MeanColour().train()
    with pytest.raises(RuntimeError), evaluating(backbone):
        assert not backbone.drop.training
        raise RuntimeError
    assert backbone.training and backbone.drop.training


def test_bf16_autocast_returns_fp32():
    backbone, images = MeanColour(), ImageSet(ColourSquares(3), 32)
    features = extract_features(backbone, images, amp_dtype=torch.bfloat16)
    assert backbone.dtypes == [torch.bfloat16] and features.cls.dtype == torch.float32
    extract_features(backbone, images)
    assert backbone.dtypes[-1] == torch.float32


def test_worker_processes_give_the_same():
    images = ImageSet(ColourSquares(5), 32)
    alone = extract_features(MeanColour(), images, batch_size=2)
    state = torch.get_rng_state()
    workers = extract_features(MeanColour(), images, batch_size=2, num_workers=1)
    assert torch.equal(alone.cls, workers.cls)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_state_is_preserved():
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    random.seed(3)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    with preserved_random_state():
        draw()
    inside = draw()
    random.setstate(before[0])
    np.random.set_state(before[1])
    torch.set_rng_state(before[2])
    assert draw() == inside


def test_one_rank_has_everything():
    assert shard_indices(5) == [0, 1, 2, 3, 4]


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=3)
    source = ColourSquares(8)
    backbone = MeanColour()
    images = ImageSet(source, 32, cache=True)
    features = extract_features(backbone, images, patches=True, batch_size=2)
    torch.save((features, backbone.batches, source.loads), f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


def test_ranks_share_the_work_and_all_get_the_result(tmp_path):
    mp.start_processes(_rank, args=(str(tmp_path),), nprocs=3, start_method="fork")
    alone = extract_features(MeanColour(), ImageSet(ColourSquares(8), 32), patches=True)
    for rank, loads in enumerate((3, 3, 2)):  # 9 places for 8 images: rank 2 repeats its last
        features, batches, loaded = torch.load(tmp_path / f"{rank}.pth", weights_only=False)
        assert batches == [2, 1] and loaded == loads
        for actual, expected in zip(features, alone):
            torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)

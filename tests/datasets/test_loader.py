"""The whole loader: ranks, resume, workers, broken files, and errors before training."""

import gc
import logging

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from PIL import Image
from torch.utils.data import get_worker_info

from dinov3_mm.datasets import ImageFolder, MultiCrop, MultiCropDataset, build_pretrain_dataloader
from dinov3_mm.datasets.loader import init_worker
from dinov3_mm.datasets.sources import BrokenImageError
from tests.datasets.photos import photo

BATCH, ITERS, IMAGES = 12, 3, 15


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Fifteen images, two of them truncated."""
    root = tmp_path_factory.mktemp("images")
    for index in range(IMAGES):
        path = root / f"{index:02d}.jpg"
        Image.fromarray(photo(60 + index, 80, index)).save(path)
        if index in (3, 9):
            path.write_bytes(path.read_bytes()[:1000])
    return root


def make_cfg(folder, **changes):
    cfg = {
        "source": {"type": "ImageFolder", "root": str(folder)},
        "transform": {"global_size": 32, "local_size": 16, "num_local": 2, "gram_size": 48},
        "masking": {"patch_size": 4},
        "num_workers": 0,
    }
    return Config({**cfg, **changes})


def make_loader(folder, changes=None, **arguments):
    options = {"global_batch_size": BATCH, "seed": 5, "max_iters": ITERS, **arguments}
    return build_pretrain_dataloader(make_cfg(folder, **(changes or {})), **options)


@pytest.fixture(scope="module")
def reference(folder):
    """Batches of one process without workers."""
    return list(make_loader(folder))


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        same = torch.equal(actual[key], value) if torch.is_tensor(value) else actual[key] == value
        assert same, key


def test_batch(reference):
    shapes = {key: tuple(value.shape) for key, value in reference[0].items() if key != "iteration"}
    masked = shapes.pop("mask_indices")
    assert shapes.pop("masks_weight") == masked == (reference[0]["num_masked"].item(),)
    assert shapes == {
        "global_crops": (24, 3, 32, 32),
        "local_crops": (24, 3, 16, 16),
        "gram_crops": (24, 3, 48, 48),
        "masks": (24, 64),
        "num_masked": (1,),
        "positions": (12,),
    }
    assert [batch["iteration"] for batch in reference] == [0, 1, 2]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_see_what_one_process_sees(folder, reference, world):
    ranks = [list(make_loader(folder, rank=rank, world_size=world)) for rank in range(world)]
    share = BATCH // world
    for expected, parts in zip(reference, zip(*ranks)):
        assert torch.equal(torch.cat([part["positions"] for part in parts]), expected["positions"])
        for key in ("global_crops", "local_crops", "gram_crops", "masks"):
            joined = torch.cat([part[key].unflatten(0, (2, share)) for part in parts], dim=1)
            assert torch.equal(joined.flatten(0, 1), expected[key]), key
        assert sum(part["num_masked"] for part in parts) == expected["num_masked"]


def test_micro_batches_see_what_one_batch_sees(folder, reference):
    micro = list(make_loader(folder, accumulate=2))
    assert len(micro) == 2 * ITERS
    for index, expected in enumerate(reference):
        parts = micro[2 * index : 2 * index + 2]
        assert [part["iteration"] for part in parts] == [index, index]
        joined = torch.cat([part["global_crops"].unflatten(0, (2, 6)) for part in parts], dim=1)
        assert torch.equal(joined.flatten(0, 1), expected["global_crops"])


def test_resume_continues(folder, reference):
    resumed = list(make_loader(folder, start_iter=1))
    assert len(resumed) == ITERS - 1
    for actual, expected in zip(resumed, reference[1:]):
        assert_same(actual, expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, reference, workers):
    state = torch.get_rng_state()
    loader = make_loader(folder, {"num_workers": workers, "prefetch_factor": 1})
    for actual, expected in zip(loader, reference, strict=True):
        assert_same(actual, expected)
    assert torch.equal(torch.get_rng_state(), state), "the loader drew from the global generator"


def test_seed_matters(folder, reference):
    batch = next(iter(make_loader(folder, seed=6)))
    assert not torch.equal(batch["global_crops"], reference[0]["global_crops"])
    assert not torch.equal(batch["masks"], reference[0]["masks"])


def test_every_epoch_shows_every_image_once(folder):
    dataset = MultiCropDataset(ImageFolder(str(folder)), MultiCrop(32, 16, 2), seed=0)
    epochs = [[dataset.source_index(e * IMAGES + i) for i in range(IMAGES)] for e in range(4)]
    assert all(sorted(epoch) == list(range(IMAGES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_counted_and_logged_once(folder, workers):
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    loader = make_loader(folder, {"num_workers": workers}, max_iters=5)
    batches = list(loader)
    logger.removeHandler(handler)
    records = [text for text in records if "unreadable" in text]
    assert len(batches) == 5 and "broken" not in batches[0]
    # 60 positions are four epochs of 15 images; a replacement may be broken again.
    assert loader.num_broken >= 8
    assert len(records) == 2
    assert {name for name in ("03.jpg", "09.jpg") for text in records if name in text} == {
        "03.jpg",
        "09.jpg",
    }
    assert all("OSError: image file is truncated" in text for text in records)


class _OneImage:
    def __len__(self):
        return 1

    def load_image(self, index):
        return photo()


def test_augmentation_follows_seed_and_position():
    transform = MultiCrop(32, 16, 2)
    samples = [
        MultiCropDataset(_OneImage(), transform, seed)[position]["global_crops"][0]
        for seed, position in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert (samples[0] == samples[1]).all()
    assert (samples[0] != samples[2]).any() and (samples[0] != samples[3]).any()


class _AllBroken:
    def __len__(self):
        return 10

    def path(self, index):
        return f"{index}.jpg"

    def load_image(self, index):
        raise BrokenImageError(self.path(index), "no disk")


def test_a_source_that_breaks_altogether_ends_the_run():
    dataset = MultiCropDataset(_AllBroken(), MultiCrop(32, 16, 2), seed=0)
    with pytest.raises(RuntimeError, match=r"images in a row could not be read, .*jpg: no disk"):
        dataset[0]


def test_worker_setup():
    class Probe(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            assert get_worker_info() is not None
            return gc.isenabled(), torch.get_num_threads()

    gc.disable()
    try:
        loader = torch.utils.data.DataLoader(
            Probe(), num_workers=1, worker_init_fn=init_worker, collate_fn=lambda items: items
        )
        assert list(loader) == [[(True, 1)], [(True, 1)]]
    finally:
        gc.enable()


def write_images(root, sizes):
    root.mkdir()
    for index, side in enumerate(sizes):
        Image.fromarray(np.zeros((side, side + 5, 3), np.uint8)).save(root / f"{index:03d}.png")


def test_small_images(tmp_path):
    write_images(tmp_path / "small", [20] * 5)
    with pytest.raises(
        ValueError, match=r"5 of 5 probed .* crop size of 32 px, e\.g\. .*000\.png of 25x20 px; use"
    ):
        make_loader(tmp_path / "small")
    assert len(list(make_loader(tmp_path / "small", {"small_images": "upscale"}))) == ITERS
    assert len(list(make_loader(tmp_path / "small", {"min_image_size": 16}))) == ITERS
    write_images(tmp_path / "few", [40] * 20 + [20])
    assert len(list(make_loader(tmp_path / "few"))) == ITERS
    with pytest.raises(ValueError, match="'error' or 'upscale', got 'skip'"):
        make_loader(tmp_path / "few", {"small_images": "skip"})


def test_unreadable_folder(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"none of 1 probed images can be read, e\.g\. .*a\.jpg"):
        make_loader(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sorce": {}}, "unknown key 'sorce' in train_dataloader; did you mean 'source'"),
        ({"masking": {"mask_ration": 1}}, "did you mean 'mask_ratio'"),
        (
            {"masking": {"patch_size": 14}},
            "global_size=32 is not divisible by the patch size 14; use 28",
        ),
        (
            {"transform": {"global_size": 32, "local_size": 18}, "masking": {"patch_size": 4}},
            "local_size=18 is not divisible by the patch size 4; use 16 or 20",
        ),
        (
            {"transform": {"global_size": 32, "local_size": 16, "gram_size": 50}},
            "gram_size=50 is not divisible by the patch size 4; use 48 or 52",
        ),
    ],
)
def test_config_errors(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        make_loader(folder, changes)


def test_local_crops_may_end_in_a_part_of_a_patch_if_told(folder):
    transform = {"global_size": 32, "local_size": 18, "partial_patches": True}
    loader = make_loader(folder, {"transform": transform, "masking": {"patch_size": 4}})
    assert next(iter(loader))["local_crops"].shape[-2:] == (18, 18)
    with pytest.raises(ValueError, match="gram_size=50 is not divisible"):
        make_loader(folder, {"transform": {**transform, "gram_size": 50}})


def test_batch_that_cannot_be_cut(folder):
    with pytest.raises(ValueError, match=r"not divisible by world_size \* accumulate = 5 \* 1"):
        make_loader(folder, world_size=5)
    with pytest.raises(ValueError, match="needs a 'source'"):
        build_pretrain_dataloader({}, global_batch_size=2, max_iters=1)

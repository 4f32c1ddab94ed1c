"""Batch layout against the order and the invariants of the reference."""

import numpy as np
import pytest
import torch

from dinov3_mm.datasets import MultiCropCollate
from tests.golden import load_golden

GOLDEN, _ = load_golden("ssl_masking_data")


def make_samples(count, first=0, size=64, num_local=4, gram=False):
    """Crops filled with ``10 * crop + sample``."""

    def crops(number, side):
        return [
            [np.full((3, side, side), 10 * c + b, np.uint8) for c in range(number)]
            for b in range(count)
        ]

    globals_, locals_, grams = crops(2, size), crops(num_local, 32), crops(2, 2 * size)
    samples = []
    for b in range(count):
        sample = {"position": first + b, "broken": []}
        sample.update(global_crops=globals_[b], local_crops=locals_[b])
        if gram:
            sample["gram_crops"] = grams[b]
        samples.append(sample)
    return samples


def make_collate(size=64, batch=3, **kwargs):
    return MultiCropCollate(size, 16, global_batch_size=batch, **kwargs)


def test_crops_are_stacked_crop_major():
    expected_globals, expected_locals = GOLDEN["collate_order"].values()
    batch = make_collate()(make_samples(3, gram=True))
    as_reference = [v % 10 + 100 * (v // 10) for v in batch["global_crops"][:, 0, 0, 0].tolist()]
    assert as_reference == expected_globals
    as_reference = [v % 10 + 100 * (v // 10) for v in batch["local_crops"][:, 0, 0, 0].tolist()]
    assert as_reference == expected_locals
    assert batch["gram_crops"].shape == (6, 3, 128, 128)
    assert batch["global_crops"].dtype == torch.uint8


@pytest.mark.parametrize(
    "case",
    [c for c in GOLDEN["collate"] if not c["local_batch_size"]],
    ids=lambda c: f"{c['img']}px",
)
def test_mask_tensors(case):
    count = case["loader_batch"]
    collate = make_collate(
        case["img"], count, mask_probability=case["mask_probability"], mask_ratio=case["ratio"]
    )
    batch = collate(make_samples(count, size=case["img"]))
    masks = batch["masks"]
    assert list(masks.shape) == case["masks_shape"]
    assert batch["num_masked"].tolist() == case["n_masked_patches"]
    assert masks.flatten()[batch["mask_indices"]].all()
    assert batch["mask_indices"].tolist() == masks.flatten().nonzero()[:, 0].tolist()
    assert batch["masks_weight"].sum().item() == pytest.approx(case["sum_masks_weight"], rel=1e-6)
    rows = batch["mask_indices"] // case["n_tokens"]
    assert torch.allclose(batch["masks_weight"], 1 / masks.sum(1).float()[rows])
    dtypes = {"masks": "collated_masks", "mask_indices": "mask_indices_list"}
    dtypes.update(masks_weight="masks_weight", num_masked="n_masked_patches")
    for ours, theirs in dtypes.items():
        assert str(batch[ours].dtype) == case["dtypes"][theirs]


def test_iteration_and_masks_follow_from_positions():
    collate = make_collate(batch=12, accumulate=2)
    batch = collate(make_samples(3, first=30))
    assert batch["iteration"] == 2
    assert batch["positions"].tolist() == [30, 31, 32]
    whole = collate(make_samples(6, first=30))["masks"].unflatten(0, (2, 6))
    assert torch.equal(batch["masks"].unflatten(0, (2, 3)), whole[:, :3])
    assert not torch.equal(collate(make_samples(6, first=24))["masks"].unflatten(0, (2, 6)), whole)


def test_positions_outside_one_micro_batch_are_an_error():
    with pytest.raises(ValueError, match=r"one micro batch of 6, got \[4, 5, 6\]"):
        make_collate(batch=12, accumulate=2)(make_samples(3, first=4))
    with pytest.raises(ValueError, match=r"consecutive positions .* got \[0, 2\]"):
        make_collate()(make_samples(3)[::2])


def test_messages_about_broken_images_are_forwarded():
    samples = make_samples(3)
    samples[1]["broken"] = ["a.jpg: bad"]
    assert make_collate()(samples)["broken"] == ["a.jpg: bad"]

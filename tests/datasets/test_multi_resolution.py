"""Several sets of crop sizes: the reference's sequence of choices, batches of one size."""

import numpy as np
import pytest
from PIL import Image

from dinov3_mm.datasets import MultiResolutionCrop, build_pretrain_dataloader
from tests.golden import load_golden

GOLDEN, _ = load_golden("ssl_masking_data")
OFFICIAL_RATIOS = (0.3, 0.3, 0.3, 0.05, 0.05)
SETS = [
    dict(global_size=32, local_size=16, gram_size=48, ratio=0.5),
    dict(global_size=48, local_size=16, gram_size=64, ratio=0.3),
    dict(global_size=64, local_size=32, gram_size=96, ratio=0.2),
]


def test_choices_are_those_of_the_reference():
    sets = [
        dict(global_size=16 * (k + 2), local_size=16, ratio=ratio)
        for k, ratio in enumerate(OFFICIAL_RATIOS)
    ]
    crop = MultiResolutionCrop(sets)
    chosen = [crop.variants.index(crop.at(it)) for it in range(200)]
    assert chosen == GOLDEN["combined_loader"]["first_200_choices"]


def test_any_iteration_first_gives_the_same_choice():
    late, early = MultiResolutionCrop(SETS), MultiResolutionCrop(SETS)
    size_late = late.at(5000).global_size
    sizes = [early.at(it).global_size for it in range(5001)]
    assert sizes[5000] == size_late
    assert [late.at(it).global_size for it in range(100)] == sizes[:100]


@pytest.fixture
def images(tmp_path):
    for index in range(6):
        Image.fromarray(np.full((80, 80, 3), 40 * index, np.uint8)).save(tmp_path / f"{index}.png")
    return tmp_path


def _loader(images, **changes):
    return build_pretrain_dataloader(
        dict(
            source=dict(type="ImageFolder", root=str(images)),
            transform=dict(type="MultiResolutionCrop", size_sets=SETS, num_local=2),
            num_workers=0,
        ),
        **{"global_batch_size": 4, "max_iters": 12, **changes},
    )


def test_batches_of_one_size_and_masks_that_fit(images):
    reference = MultiResolutionCrop(SETS)
    sides = set()
    for iteration, batch in enumerate(_loader(images)):
        side = reference.at(iteration).global_size
        sides.add(side)
        assert batch["global_crops"].shape == (8, 3, side, side)
        assert batch["gram_crops"].shape[-1] == reference.at(iteration).gram_size
        assert batch["masks"].shape == (8, (side // 16) ** 2)
    assert sides == {32, 48, 64}


def test_ranks_and_micro_batches_make_the_same_choice(images):
    whole = list(_loader(images))
    for options in (dict(rank=1, world_size=2), dict(accumulate=2)):
        parts = list(_loader(images, **options))
        per_step = len(parts) // len(whole)
        for index, part in enumerate(parts):
            assert (
                part["global_crops"].shape[-1] == whole[index // per_step]["global_crops"].shape[-1]
            )


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([], "at least one"),
        ([dict(global_size=32, local_size=16)], "ratio"),
        ([dict(global_size=32, local_size=16, ratio=0.4)], "sum to 1"),
        ([dict(global_size=32, local_size=16, ratio=1.0, size=3)], "size"),
        ([dict(SETS[0], ratio=0.5), dict(global_size=48, local_size=16, ratio=0.5)], "gram_size"),
    ],
)
def test_bad_sets(sets, message):
    with pytest.raises(ValueError, match=message):
        MultiResolutionCrop(sets)

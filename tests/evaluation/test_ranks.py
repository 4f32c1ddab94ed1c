"""Evaluations shared by ranks: equal to one process, ended by an error on any, on one device."""

import time

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from dinov3_mm.datasets.evaluation_images import ImageSet
from dinov3_mm.engine.hooks.evaluation import DenseProbeHook, KNNEvalHook, RetrievalEvalHook
from dinov3_mm.evaluation.dense_probe import PatchClassifier, RidgeStatistics, _confusions
from dinov3_mm.evaluation.knn import knn_hits, nearest_neighbours
from dinov3_mm.features.frozen import OtherRankError, extract_features, share_of, together
from tests.evaluation.toys import ColourSquares, MeanColour

STATISTICS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
# Neither 41 nor 15 nor 13 divides by the ranks; three images on four ranks leave one without any.
TRAIN = {"type": "ColourSquares", "length": 41}
TEST = {"type": "ColourSquares", "length": 15, "seed": 1}
FEW = {"type": "ColourSquares", "length": 3, "seed": 1}


def make_hooks(test: dict) -> list:
    labelled = {"interval": 1, "train_source": TRAIN, "test_source": test, "image_size": 32}
    views = {"type": "UnlabelledSquares", "length": 13}
    return [
        KNNEvalHook(**labelled, k=(3, 5), **STATISTICS),
        DenseProbeHook(**labelled, **STATISTICS),
        DenseProbeHook(**labelled, normalization="l2", **STATISTICS),
        RetrievalEvalHook(1, views, 32, **STATISTICS),
    ]


class Mixed(MeanColour):
    """Mean colours turned and bent, so that scores are neither perfect nor chance."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.turn = nn.Parameter(torch.randn(3, 2, generator=generator))

    def forward_tokens(self, images):
        cls, patches = super().forward_tokens(images)
        return type(super().forward_tokens(images))(
            *((3 * tokens @ self.turn).sin() for tokens in (cls, patches))
        )


def scores(test: dict) -> list[dict]:
    results = []
    for hook in make_hooks(test):
        hook.dtype = "fp32"
        together("preparing", hook.prepare)
        results.append(hook.evaluate(Mixed()))
    return results


def join(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, rank=rank, world_size=world_size)


def _score(rank: int, world_size: int, folder: str, test: dict) -> None:
    join(rank, world_size, folder)
    torch.save(scores(test), f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("world_size", "test"), [(2, TEST), (4, FEW)])
def test_ranks_get_the_scores_of_one_process(world_size, test, tmp_path):
    arguments = (world_size, str(tmp_path), test)
    mp.start_processes(_score, args=arguments, nprocs=world_size, start_method="fork")
    expected = scores(test)
    assert 20 < expected[1]["patch_miou"] < 100 and 0 < expected[3]["cls_top1"] <= 100
    for rank in range(world_size):
        actual = torch.load(tmp_path / f"{rank}.pth", weights_only=False)
        for mine, theirs in zip(actual, expected, strict=True):
            rounded = mine.pop("effective_rank", 0), theirs.get("effective_rank", 0)
            assert rounded[0] == pytest.approx(rounded[1], rel=1e-5)
            assert mine == {k: v for k, v in theirs.items() if k != "effective_rank"}


class BrokenAt(ColourSquares):
    """An image that cannot be read, in the share of the last rank."""

    def load_image(self, index):
        if index == self.length - 1:
            raise OSError("image 15 is gone")
        return super().load_image(index)


class BrokenMasks(ColourSquares):
    def semantic_mask(self, index):
        if index == self.length - 1:
            raise OSError("mask 15 is gone")
        return super().semantic_mask(index)


def _fail(rank: int, folder: str) -> None:
    join(rank, 2, folder)
    images = ImageSet(BrokenAt(16), 32)
    forwards = MeanColour()
    steps = {
        "image": lambda: extract_features(forwards, images, batch_size=2),
        "mask": lambda: together("preparing", lambda: dense(BrokenMasks(16)).prepare()),
        "scores": lambda: together("judging", lambda: 1 / rank),
    }
    told = {}
    for name, step in steps.items():
        began = time.monotonic()
        try:
            step()
        except Exception as error:
            told[name] = type(error).__name__, str(error), time.monotonic() - began
    told["forwards"] = len(forwards.batches)
    torch.save(told, f"{folder}/{rank}.pth")
    torch.distributed.destroy_process_group()


def dense(source) -> DenseProbeHook:
    config = {"type": lambda: source}
    hook = DenseProbeHook(1, config, config, 32, **STATISTICS)
    hook.dtype = "fp32"
    return hook


def test_an_error_on_one_rank_ends_all(tmp_path):
    mp.start_processes(_fail, args=(str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=False) for rank in (0, 1))
    assert second["image"][:2] == ("OSError", "image 15 is gone")
    assert first["image"][:2] == (
        "OtherRankError",
        "extraction failed on rank 1: OSError: image 15 is gone",
    )
    # As many forwards on both, those after the error of a blank image: a sharded one waits in each.
    assert first["forwards"] == second["forwards"] == 4
    assert (
        second["mask"][1] == "mask 15 is gone" and "preparing failed on rank 1" in first["mask"][1]
    )
    assert first["scores"][0] == "ZeroDivisionError" and "on rank 0" in second["scores"][1]
    # Far below the half hour after which a collective gives up.
    assert max(told[name][2] for told in (first, second) for name in ("image", "mask")) < 300


def test_shares_have_all_rows_once():
    assert share_of(5) == range(5)
    assert issubclass(OtherRankError, RuntimeError)


def test_nothing_goes_to_the_host():
    """A tensor on the meta device cannot be copied from it, so any transfer in between raises."""
    backbone = Mixed().to("meta")
    images = ImageSet(ColourSquares(9), 32)
    with pytest.raises(NotImplementedError, match="no data"):
        extract_features(backbone, images)  # to the CPU: the test can fail
    features = extract_features(backbone, images, patches=True, batch_size=4, device=None)
    assert features.cls.device.type == features.patches.device.type == "meta"
    assert features.cls.shape == (9, 2) and features.patches.shape == (9, 4, 2)
    labels = torch.arange(9) % 4
    hits = knn_hits(features.cls, labels.to("meta"), features.cls, labels, (3, 5), 4)
    assert hits.device.type == "meta" and hits.shape == (2, 2)
    values, indices = nearest_neighbours(features.cls, features.cls, 2)
    assert values.device.type == indices.device.type == "meta"


def test_sums_and_scores_of_the_probe_are_not_read_either():
    patches = torch.empty(6, 4, 8, device="meta")
    labels, masks = torch.zeros(6, 4).long(), torch.zeros(6, 32, 32, dtype=torch.uint8)
    on_device = labels.flatten().to("meta")
    sums = RidgeStatistics.of_classes(patches.flatten(0, 1), on_device, torch.ones(5))
    weight, bias = (sums + sums).solve(0.1 * sums.weight * sums.mean_variance)
    assert weight.device.type == bias.device.type == "meta" and weight.shape == (8, 5)
    like = torch.empty(8, device="meta")
    fitted = PatchClassifier("standardize", like, like, weight.float(), bias.float(), 0.1, 0.0)
    counted = _confusions(fitted, patches, labels, masks, 2, 5)
    assert [c.device.type for c in counted] == ["meta", "meta"] and counted[0].shape == (5, 5)

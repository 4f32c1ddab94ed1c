"""A cache over a folder that changes: files by what they are, labels as they are now."""

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from dinov3_mm.datasets.class_names import follow_classes
from dinov3_mm.datasets.label_audit import look_at_labels
from dinov3_mm.engine.config import ConfigError
from dinov3_mm.engine.config.host import set_data_root
from dinov3_mm.engine.feature_cache import compute, use_feature_cache
from dinov3_mm.features.frozen import OtherRankError
from tests.acceptance import label_cases
from tests.downstream.steps import CONFIGS
from tests.hosts.lane import require_hosts
from tests.shrink import shrink

require_hosts()

SIDE = 32
CLASSES = ("apple", "pear")


def picture(value: int) -> Image.Image:
    """Noise around a grey, a function of the value."""
    noise = np.random.default_rng(value).integers(0, 40, (SIDE, SIDE, 3))
    return Image.fromarray((value % 200 + noise).astype(np.uint8))


def write_folder(root: Path, count: int = 4) -> Path:
    for split in ("train", "val"):
        for number in range(count):
            path = root / split / CLASSES[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(10 * number + (split == "val")).save(path)
    return root


def config(data: Path, tmp_path: Path, **loader) -> Config:
    """The shipped config of folders, as it is but for its size."""
    cfg = shrink(
        Config.fromfile(CONFIGS / "classification/linear_vits16_folder.py"), "classification"
    )
    set_data_root(cfg, str(data))
    for name in ("train_dataloader", "val_dataloader"):
        cfg[name].update(num_workers=0, persistent_workers=False, batch_size=2, **loader)
        for step in cfg[name].dataset.pipeline:
            step.update({k: 32 for k in ("scale", "crop_size") if k in step})
    cfg.work_dir = str(tmp_path / "work")
    return cfg


def cache(cfg: Config, folder: Path, **options):
    """Lines, the images that were computed, and the data set of training."""
    torch.manual_seed(0)  # random weights: the same backbone each time
    computed = []
    samples = compute._Computation.samples

    def spy(self, prepared):
        names = [item["data_samples"].img_path for item in prepared]
        computed.extend(Path(name).name for name in names)
        return samples(self, prepared)

    compute._Computation.samples = spy
    try:
        lines = use_feature_cache(cfg, str(folder), **options)
    finally:
        compute._Computation.samples = samples
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return lines, computed, DATASETS.build(cfg.train_dataloader.dataset)


def content(dataset) -> dict[str, tuple[int, torch.Tensor]]:
    """Label and features of each image."""
    found = {}
    for sample in map(dataset.__getitem__, range(len(dataset))):
        (call,) = sample["features"].calls
        label = sample["data_samples"].gt_label.item()
        found[Path(sample["data_samples"].img_path).name] = label, call.outputs[-1]
    return found


def leaf(part):
    return part if isinstance(part, torch.Tensor) else leaf(part[-1])


def test_labels_are_those_of_now(tmp_path):
    data = write_folder(tmp_path / "data")
    _, _, dataset = cache(config(data, tmp_path), tmp_path / "cache")
    assert {name: label for name, (label, _) in content(dataset).items()} == {
        "0.png": 0,
        "1.png": 1,
        "2.png": 0,
        "3.png": 1,
    }
    for split in ("train", "val"):
        (data / split / "apple").rename(data / split / "zucchini")
        picture(7).save(data / split / "pear" / "4.png")
    lines, _, dataset = cache(config(data, tmp_path), tmp_path / "cache")
    assert {name: label for name, (label, _) in content(dataset).items()} == {
        "0.png": 1,
        "1.png": 0,
        "2.png": 1,
        "3.png": 0,
        "4.png": 0,
    }
    assert dataset.metainfo["classes"] == ("pear", "zucchini")
    assert any(re.match("3 images are new: .*4.png", line) for line in lines), lines
    fresh = content(cache(config(data, tmp_path), tmp_path / "fresh")[2])
    for name, (label, features) in content(dataset).items():
        assert fresh[name][0] == label
        torch.testing.assert_close(leaf(features), leaf(fresh[name][1]))


def test_labels_of_cached_validation_follow_the_names_of_training(tmp_path):
    data = write_folder(tmp_path / "data")
    shutil.rmtree(data / "val/apple")  # pear is 0 there by position
    cfg = config(data, tmp_path)
    cache(cfg, tmp_path / "cache")
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        validation = DATASETS.build(cfg.val_dataloader.dataset)
    follow_classes(validation, CLASSES, owner="the training set", where="validation")
    assert {label for label, _ in content(validation).values()} == {1}


def test_label_maps_of_a_cache_are_looked_at_with_their_own_palette(tmp_path):
    """The data set behind cached features has no pipeline, and the palette stands in one."""
    case = next(case for case in label_cases.LABELS if case.name == "0 and 255")
    folder = label_cases.write_folder("segmentation", case, tmp_path / "data")
    cfg = label_cases.config_of("segmentation", case)
    for step in cfg.train_dataloader.dataset.pipeline:
        step.update({"palette": [0, 255]} if step["type"] == "LoadLabelMap" else {})
    set_data_root(cfg, str(folder))
    _, _, dataset = cache(cfg, tmp_path / "cache")
    facts = look_at_labels("training", dataset, max_maps=10, max_seconds=30)
    assert facts.uses_palette and not facts.wrong and set(facts.pixels) == {0, 1}


def test_a_changed_image_is_computed_anew_and_the_others_are_kept(tmp_path):
    data = write_folder(tmp_path / "data")
    cache(config(data, tmp_path), tmp_path / "cache")
    picture(99).save(data / "train/apple/2.png")
    (data / "train/pear/1.png").unlink()
    lines, computed, dataset = cache(config(data, tmp_path), tmp_path / "cache")
    assert set(computed) == {"2.png"}
    assert any("1 images have changed since: computed anew" in line for line in lines), lines
    assert any("1 images in" in line and "are not used" in line for line in lines), lines
    fresh = content(cache(config(data, tmp_path), tmp_path / "fresh")[2])
    found = content(dataset)
    assert found.keys() == fresh.keys()
    for name, (_, features) in found.items():
        torch.testing.assert_close(leaf(features), leaf(fresh[name][1]))
    assert cache(config(data, tmp_path), tmp_path / "cache")[1] == []


def test_a_file_with_its_old_size_and_time_is_noticed_on_request(tmp_path):
    data = write_folder(tmp_path / "data")
    cache(config(data, tmp_path), tmp_path / "cache", content=True)
    path = data / "train/apple/0.png"
    before, old = path.stat(), path.read_bytes()
    path.write_bytes(old + b"0")
    path.write_bytes(old[:-1] + bytes([old[-1] ^ 1]))  # a byte behind the picture
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache(config(data, tmp_path), tmp_path / "cache")[1] == []
    assert set(cache(config(data, tmp_path), tmp_path / "cache", content=True)[1]) == {"0.png"}
    # A time alone is no other content.
    os.utime(path)
    assert cache(config(data, tmp_path), tmp_path / "cache", content=True)[1] == []


def test_a_moved_cache_is_found(tmp_path):
    data = write_folder(tmp_path / "data")
    cache(config(data, tmp_path), tmp_path / "cache")
    shutil.move(tmp_path / "cache", tmp_path / "elsewhere")
    assert cache(config(data, tmp_path), tmp_path / "elsewhere")[1] == []


def test_splits_of_one_name_do_not_replace_each_other(tmp_path):
    """Files of training and validation have the same names, and lie in one cache."""
    data = write_folder(tmp_path / "data")
    cfg = config(data, tmp_path)
    _, computed, _ = cache(cfg, tmp_path / "cache")
    assert len(computed) == 2 * 4 + 2  # a first look at either
    assert cache(config(data, tmp_path), tmp_path / "cache")[1] == []


def test_other_preprocessing_is_refused(tmp_path):
    data = write_folder(tmp_path / "data")
    cache(config(data, tmp_path), tmp_path / "cache")
    cfg = config(data, tmp_path)
    for step in cfg.val_dataloader.dataset.pipeline:
        step.update({k: 48 for k in ("scale", "crop_size") if k in step})
    with pytest.raises(ConfigError, match="made from something else: pipeline differ"):
        cache(cfg, tmp_path / "cache")


def test_an_unreadable_image_is_replaced_and_said(tmp_path):
    data = write_folder(tmp_path / "data")
    path = data / "train/apple/2.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    lines, _, dataset = cache(config(data, tmp_path), tmp_path / "cache")
    (line,) = [line for line in lines if "WARNING" in line]
    assert "1 training images cannot be read" in line and "2.png" in line
    assert "2.png" not in content(dataset) and len(dataset) == 4
    path.write_bytes(whole)
    lines, _, dataset = cache(config(data, tmp_path), tmp_path / "cache")
    assert "2.png" in content(dataset) and not any("WARNING" in line for line in lines)


def test_views_are_added_and_drawn(tmp_path):
    data = write_folder(tmp_path / "data")
    cache(config(data, tmp_path), tmp_path / "cache")
    lines, computed, dataset = cache(config(data, tmp_path), tmp_path / "cache", views=3)
    assert any("3 views an image, 2 of them drawn once" in line for line in lines), lines
    assert len([name for name in computed if name == "1.png"]) == 2  # the first view was there
    np.random.seed(0)
    draws = [dataset[1]["features"].calls[0].outputs[-1] for _ in range(30)]
    assert len({leaf(features).sum().item() for features in draws}) == 3
    assert cache(config(data, tmp_path), tmp_path / "cache")[1] == []


def test_the_disk_must_hold_it(tmp_path, monkeypatch):
    data = write_folder(tmp_path / "data")
    usage = shutil._ntuple_diskusage(2**40, 2**40 - 100, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match=r"4 views of 4 images need about .* GiB, .* free"):
        cache(config(data, tmp_path), tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_workers_change_nothing(tmp_path):
    data = write_folder(tmp_path / "data")
    alone = content(cache(config(data, tmp_path), tmp_path / "cache")[2])
    cfg = config(data, tmp_path)
    for name in ("train_dataloader", "val_dataloader"):
        cfg[name].num_workers = 2
    cache(cfg, tmp_path / "shared", views=2)
    lines, computed, dataset = cache(config(data, tmp_path), tmp_path / "shared")
    assert computed == [] and "4 samples from" in lines[-2]
    for name, (_, features) in content(dataset).items():
        torch.testing.assert_close(leaf(features), leaf(alone[name][1]))


def _rank(rank: int, data: Path, tmp_path: Path, failing: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=rank, world_size=2)
    samples = compute._Computation.samples
    calls = []

    def dying(self, prepared):
        calls.append(1)
        if failing and rank == 1 and len(calls) == 2:
            raise RuntimeError("no memory")
        return samples(self, prepared)

    compute._Computation.samples = dying
    text = ""
    try:
        torch.manual_seed(0)
        use_feature_cache(config(data, tmp_path), str(tmp_path / "cache"))
    except (RuntimeError, OtherRankError) as error:
        text = f"{type(error).__name__}: {error}"
    (tmp_path / f"rank{rank}.txt").write_text(text)
    dist.destroy_process_group()


@pytest.mark.parametrize("failing", [True, False])
def test_ranks_share_the_images_and_end_together(tmp_path, failing):
    data = write_folder(tmp_path / "data", count=10)
    context = mp.start_processes(
        _rank, (data, tmp_path, failing), nprocs=2, start_method="fork", join=False
    )
    for process in context.processes:
        process.join(120)
        assert process.exitcode == 0
    texts = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)]
    if failing:
        assert texts[1] == "RuntimeError: no memory"
        assert texts[0].startswith("OtherRankError: ") and "no memory" in texts[0]
        return
    assert texts == ["", ""]
    assert len(list((tmp_path / "cache/train").glob("*.safetensors"))) == 2
    _, computed, dataset = cache(config(data, tmp_path), tmp_path / "cache")
    assert computed == [] and len(content(dataset)) == 10

"""Scenes as data sets of the hosts: the truth of each task, and pipelines."""

import numpy as np
import pytest
from mmengine.registry import DATASETS

from dinov3_mm.datasets import LoadMissingImage, SyntheticScenes, SyntheticScenesTask
from tests.hosts.lane import require_hosts

SIZE = 48


def build(task: str, **arguments) -> SyntheticScenesTask:
    return DATASETS.build(
        dict(type="SyntheticScenesTask", task=task, length=5, image_size=SIZE, **arguments)
    )


def test_image_is_bgr_and_named():
    scenes = SyntheticScenes(5, seed=3, start=7, image_size=SIZE)
    sample = build("classification", seed=3, start=7)[2]
    assert np.array_equal(sample["img"][..., ::-1], scenes.load_image(2))
    assert sample["img_path"] == "scene-3-9" and sample["img_id"] == 2
    assert sample["img_shape"] == sample["ori_shape"] == (SIZE, SIZE)
    assert sample["gt_label"] == scenes.label(2)


def test_segments_and_depth_are_those_of_the_scene():
    scenes = SyntheticScenes(5, image_size=SIZE)
    data = build("segmentation")
    sample = data[1]
    assert sample["gt_seg_map"].dtype == np.uint8
    assert np.array_equal(sample["gt_seg_map"], scenes.semantic_mask(1))
    assert len(data.metainfo["classes"]) == len(data.metainfo["palette"]) == 13
    assert data.metainfo["classes"][0] == "surroundings"
    sample = build("depth")[1]
    assert np.array_equal(sample["gt_depth_map"], scenes.depth(1))


def test_instances_have_boxes_around_their_masks():
    require_hosts()
    from pycocotools.mask import decode

    data = build("detection")
    assert len(data.metainfo["classes"]) == 12
    for sample in data:
        for item in sample["instances"]:
            rows, columns = np.nonzero(decode(item["mask"]))
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert item["bbox"] == box
            assert 0 <= item["bbox_label"] < 12 and item["ignore_flag"] == 0


def test_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'segmentation'"):
        build("segmentaton")


def test_loader_keeps_what_is_there():
    sample = build("depth", pipeline=[dict(type="LoadMissingImage")])[0]
    assert sample["img"].shape == (SIZE, SIZE, 3)


def test_loader_reads_files_with_the_hosts_loader(tmp_path):
    require_hosts()
    import mmcv

    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    mmcv.imwrite(image, str(tmp_path / "image.png"))
    results = LoadMissingImage()({"img_path": str(tmp_path / "image.png")})
    assert np.array_equal(results["img"], image) and results["ori_shape"] == (6, 8)

"""Data sets and transforms of depth: lists, folders, recorded resizing, what users get wrong.

``heads_depth_transform`` is trimmed to the image.
"""

import cv2
import numpy as np
import pytest
import torch

from dinov3_mm.datasets.depth import (
    DepthFolderDataset,
    KITTIDepthDataset,
    LoadDepthMap,
    NYUBorderCrop,
    NYUDepthDataset,
    RandomDepthRotation,
    RandomGammaBrightness,
    ResizeImageOnly,
    read_depth_map,
)
from dinov3_mm.datasets.images import BrokenImageError
from tests.acceptance.label_cases import logged
from tests.golden import assert_parity, load_golden


def write_map(path, values, dtype=np.uint16):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.asarray(values, dtype))
    return path


def sample(height=48, width=64):
    image = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
    depth = np.linspace(1, 6, height * width, dtype=np.float32).reshape(height, width)
    return {"img": image, "gt_depth_map": depth, "seg_fields": ["gt_depth_map"]}


def test_nyu_list_is_sorted_and_read_in_metres(tmp_path):
    (tmp_path / "nyu_train.txt").write_text(
        "/kitchen/rgb_2.jpg /kitchen/depth_2.png 518.8579\n\n"
        "/bath/rgb_1.jpg /bath/depth_1.png 518.8579\n"
    )
    write_map(tmp_path / "bath/depth_1.png", [[0, 1500], [2000, 65535]])
    dataset = NYUDepthDataset("nyu_train.txt", data_root=str(tmp_path))
    info = dataset.get_data_info(0)
    assert len(dataset) == 2
    assert info["img_path"] == str(tmp_path / "bath/rgb_1.jpg")
    depth = LoadDepthMap()(info)["gt_depth_map"]
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, [[0, 1.5], [2, 0]])


def test_kitti_list_has_two_roots_and_gaps(tmp_path):
    (tmp_path / "test.txt").write_text("a/0.png a/0.png 721.5\nb/1.png None 721.5\n")
    write_map(tmp_path / "depth/a/0.png", [[256, 0]])
    folders = dict(img_path="raw", depth_map_path="depth")
    dataset = KITTIDepthDataset("test.txt", data_root=str(tmp_path), data_prefix=folders)
    (info,) = (dataset.get_data_info(i) for i in range(len(dataset)))
    assert info["img_path"] == str(tmp_path / "raw/a/0.png")
    np.testing.assert_array_equal(LoadDepthMap()(info)["gt_depth_map"], [[1, 0]])


@pytest.mark.parametrize(
    "text, message",
    [("a.jpg\n", "has 1 words"), ("", "names no image"), ("a.png None 1\n", "names no image")],
)
def test_lists_that_are_wrong(text, message, tmp_path):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        NYUDepthDataset("list.txt", data_root=str(tmp_path))


def test_list_that_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no list at .*nyu_test\.txt"):
        NYUDepthDataset("nyu_test.txt", data_root=str(tmp_path))


def test_folder(tmp_path):
    write_map(tmp_path / "images/room/b.jpg", np.zeros((4, 4)), np.uint8)
    write_map(tmp_path / "images/a.png", np.zeros((2, 3)), np.uint8)
    write_map(tmp_path / "depth/a.png", np.full((2, 3), 2500))
    (tmp_path / "depth/room").mkdir()
    np.save(tmp_path / "depth/room/b.npy", np.full((4, 4), 3000.0))
    dataset = DepthFolderDataset(data_root=str(tmp_path), pipeline=[LoadDepthMap()])
    assert [float(dataset[i]["gt_depth_map"][0, 0]) for i in range(2)] == [2.5, 3.0]
    write_map(tmp_path / "depth/alone.png", np.full((2, 3), 2500))
    with logged() as lines:
        assert len(DepthFolderDataset(data_root=str(tmp_path))) == 2
    assert lines.warnings == [
        f"1 of 3 depth maps in {tmp_path / 'depth'} have no image and are left out, e.g. alone"
    ]
    (tmp_path / "depth/a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images have no depth map.*e\.g\. a"):
        DepthFolderDataset(data_root=str(tmp_path))


def test_folder_that_is_missing_or_empty(tmp_path):
    with pytest.raises(FileNotFoundError, match="images is no folder"):
        DepthFolderDataset(data_root=str(tmp_path))
    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError, match="no files in"):
        DepthFolderDataset(data_root=str(tmp_path))


def test_loading_keeps_depth_that_is_there_and_images_without():
    given = {"gt_depth_map": np.ones((2, 2)), "depth_map_path": "nowhere.png"}
    assert LoadDepthMap()(given) is given
    assert LoadDepthMap()({"img_path": "a.png"}) == {"img_path": "a.png"}


def test_values_that_stand_for_nothing(tmp_path):
    path = write_map(tmp_path / "a.tif", [[-9999, 0], [12.5, 3]], np.float32)
    load = LoadDepthMap(nodata=-9999, nodata_depth=-1)
    info = {"img_path": "a", "depth_map_path": path, "depth_scale": 1.0}
    np.testing.assert_array_equal(load(info)["gt_depth_map"], [[-1, 0], [12.5, 3]])


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
def test_65535_of_16_bits_means_nothing_measured(tmp_path, suffix):
    values, path = np.array([[65535, 65534], [0, 1000]], np.uint16), tmp_path / f"a{suffix}"
    np.save(path, values) if suffix == ".npy" else write_map(path, values)
    info = {"img_path": "a", "depth_map_path": path, "depth_scale": 1000.0}

    def depth(**options):
        return LoadDepthMap(**options)(dict(info))["gt_depth_map"]

    np.testing.assert_allclose(depth(), [[0, 65.534], [0, 1]])
    np.testing.assert_allclose(depth(nodata_depth=-1), [[-1, 65.534], [0, 1]])
    np.testing.assert_allclose(depth(saturation_is_depth=True), values / 1000)


def test_65535_of_wider_maps_is_a_depth(tmp_path):
    path = write_map(tmp_path / "a.tif", [[65535, 70000]], np.float32)
    info = {"img_path": "a", "depth_map_path": path, "depth_scale": 1000.0}
    np.testing.assert_allclose(LoadDepthMap()(info)["gt_depth_map"], [[65.535, 70]])


def test_files_that_are_no_depth_maps(tmp_path):
    with pytest.raises(BrokenImageError, match="No such file"):
        read_depth_map(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(BrokenImageError, match="cannot identify image file"):
        read_depth_map(tmp_path / "a.png")
    with pytest.raises(ValueError, match="a colour picture of depth"):
        read_depth_map(write_map(tmp_path / "b.png", np.zeros((2, 2, 3)), np.uint8))
    info = {"img_path": "i.png", "ori_shape": (4, 4), "depth_scale": 1.0}
    info["depth_map_path"] = write_map(tmp_path / "c.png", np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"2 x 4 pixels, its image i\.png has 4 x 4"):
        LoadDepthMap()(info)


def test_recorded_resizing():
    _, golden = load_golden("heads_depth_transform")
    image = ResizeImageOnly(32)({"img": golden["in.image"].numpy()})["img"]
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    normalised = (torch.from_numpy(image) - mean) / std
    assert_parity(normalised.permute(2, 0, 1), golden["out.imgs.0"])


def test_resizing_leaves_maps_alone():
    results = ResizeImageOnly((20, 30))(sample())
    assert results["img"].shape == (20, 30, 3)
    assert results["img_shape"] == (20, 30)
    assert results["gt_depth_map"].shape == (48, 64)
    with pytest.raises(ValueError, match="short side"):
        ResizeImageOnly(0)


@pytest.mark.parametrize("scale", [1, 2])
def test_border_of_nyu(scale):
    before = sample(480 // scale, 640 // scale)
    results = NYUBorderCrop()(dict(before))
    rows, columns = slice(45 // scale, 472 // scale), slice(43 // scale, 608 // scale)
    np.testing.assert_array_equal(results["img"], before["img"][rows, columns])
    np.testing.assert_array_equal(results["gt_depth_map"], before["gt_depth_map"][rows, columns])


def test_rotation_invents_no_depth():
    before = sample()
    results = RandomDepthRotation(prob=1.0, max_angle=20)(dict(before))
    depth = results["gt_depth_map"]
    assert set(np.unique(depth)) <= {0.0, *np.unique(before["gt_depth_map"])}
    assert 0 < (depth == 0).mean() < 0.3
    assert results["img"].dtype == np.float32


def test_rotation_turns_image_and_depth_alike():
    ramp = np.tile(np.linspace(1, 6, 64, dtype=np.float32), (48, 1))
    results = {"img": np.repeat(ramp[..., None], 3, 2), "gt_depth_map": ramp}
    results = RandomDepthRotation(prob=1.0)({**results, "seg_fields": ["gt_depth_map"]})
    inner = (slice(8, -8), slice(8, -8))
    np.testing.assert_allclose(
        results["img"][inner][..., 0], results["gt_depth_map"][inner], atol=0.1
    )


def test_gamma_acts_on_values_up_to_255():
    options = dict(prob=1.0, brightness=(1.2, 1.2), color=(1.0, 1.0))
    image = np.array([[[0, 100, 250]]], np.uint8)
    results = RandomGammaBrightness(gamma=(1.05, 1.05), **options)({"img": image})
    expected = [[[0, 1.2 * 100**1.05, 255]]]
    np.testing.assert_allclose(results["img"], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", [RandomDepthRotation, RandomGammaBrightness])
def test_probability_of_nothing(kind):
    before = sample()
    assert kind(prob=0.0)(dict(before)) == before

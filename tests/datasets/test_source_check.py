"""What a look at a source finds: channels that differ, missing bands, ranges, and their number."""

import numpy as np
import pytest
import tifffile

from dinov3_mm.datasets import ImageFolder, MultiCrop, MultiCropDataset, SyntheticScenes
from dinov3_mm.datasets.loader import check_source
from tests.datasets.test_multiband import INTERLEAVED, bands, tiff, write


def folder(path, channels, dtype=np.uint16):
    for index, count in enumerate(channels):
        write(path / f"{index:02d}.tif", tiff(bands(count, dtype), **INTERLEAVED))
    return path


def source(path, **options):
    return ImageFolder(str(path), color="unchanged", **options)


def test_number_of_channels(tmp_path):
    eight = folder(tmp_path / "eight", [8, 8])
    assert check_source(source(eight), 32) == 8
    assert check_source(source(eight, channels=[7, 0]), 32) == 2
    assert check_source(SyntheticScenes(3, image_size=32), 32) == 3
    gray = write(tmp_path / "gray/a.tif", tiff(bands(1, np.uint8))).parent
    assert check_source(ImageFolder(str(gray)), 32) == 3
    assert check_source(ImageFolder(str(gray), color="gray"), 32) == 1


def test_mixed_channels_name_files_and_counts(tmp_path):
    mixed = folder(tmp_path, [8, 4, 8, 8])
    with pytest.raises(
        ValueError,
        match=r"4 channels in 1 of 4 probed images, e\.g\. .*01\.tif; 8 channels in 3 .*00\.tif\. "
        r"Choose .* channels=\[0, 1, 2, 3\], or take the others out",
    ):
        check_source(source(mixed), 32)
    assert check_source(source(mixed, channels=[3, 2, 1]), 32) == 3
    with pytest.raises(ValueError, match=r"not all images have the channels=\[5\] .*01\.tif"):
        check_source(source(mixed, channels=[5]), 32)


def test_wrong_ranges_end_a_run_before_it_starts(tmp_path):
    write(tmp_path / "a.tif", tiff(3000 * bands(2, np.float32), **INTERLEAVED))
    with pytest.raises(ValueError, match=r"none of 1 probed images .* set value_range"):
        check_source(source(tmp_path), 32)
    assert check_source(source(tmp_path, value_range=(0, 3000)), 32) == 2


def test_sizes_of_tiff_files(tmp_path):
    folder(tmp_path, [8, 8])
    with pytest.raises(ValueError, match=r"2 of 2 probed images are smaller .* of 60x40 px"):
        check_source(source(tmp_path), 48)
    assert check_source(source(tmp_path), 48, "upscale") == 8


def test_a_file_with_other_channels_is_replaced(tmp_path):
    folder(tmp_path, [8] * 6)
    transform = MultiCrop(32, 16, 2)
    dataset = MultiCropDataset(source(tmp_path), transform, num_channels=8)
    odd = tmp_path / "03.tif"
    tifffile.imwrite(odd, bands(4), **INTERLEAVED)
    samples = [dataset[position] for position in range(6)]
    messages = [message for sample in samples for message in sample["broken"]]
    assert messages == [f"{odd}: has 4 channels, the other images have 8"]
    crops = [crop for sample in samples for crop in sample["global_crops"]]
    assert {crop.shape for crop in crops} == {(8, 32, 32)}
    assert {crop.dtype for crop in crops} == {np.dtype(np.float32)}

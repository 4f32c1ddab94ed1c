"""The first steps of the hosts' pipelines: maps that belong to images, and broken files."""

import logging

import numpy as np
import pytest
import torch
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS
from PIL import Image
from torch.utils.data import DataLoader

from dinov3_mm.datasets import BrokenImageError, LoadLabelMap, LoadMissingImage
from dinov3_mm.datasets.depth import LoadDepthMap
from dinov3_mm.datasets.transforms.host_steps import UnreadableFiles, as_colors
from tests.acceptance.image_kinds import encoded, exif
from tests.datasets.photos import photo

HEIGHT, WIDTH = 40, 60


def labelled(folder, orientation, labels, form="PNG"):
    """A sample of a photo that is turned, and a label map."""
    (folder / "a.jpg").write_bytes(encoded(photo(HEIGHT, WIDTH), "JPEG", exif=exif(orientation)))
    (folder / "a.png").write_bytes(encoded(labels, form))
    return {
        "img_path": str(folder / "a.jpg"),
        "seg_map_path": str(folder / "a.png"),
        "depth_map_path": str(folder / "a.png"),
        "depth_scale": 1.0,
        "reduce_zero_label": False,
        "seg_fields": [],
    }


def shown(orientation, values):
    """Values under an orientation, turned by PIL itself."""
    from PIL import ImageOps

    image = Image.fromarray(values)
    image.getexif()[274] = orientation
    return np.array(ImageOps.exif_transpose(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_maps_turn_with_their_image(tmp_path, orientation):
    stored = (photo(HEIGHT, WIDTH)[..., 0] > 128).astype(np.uint8)
    seen = shown(orientation, stored)
    results = LoadMissingImage()(labelled(tmp_path, orientation, stored))
    results = LoadDepthMap()(LoadLabelMap()(results))
    assert results["img"].shape[:2] == seen.shape == results["ori_shape"]
    assert np.array_equal(results["gt_seg_map"], seen)
    assert np.array_equal(results["gt_depth_map"], seen.astype(np.float32))
    assert results["seg_fields"] == ["gt_seg_map", "gt_depth_map"]
    if orientation > 4:  # drawn on the image as it is seen
        results = LoadMissingImage()(labelled(tmp_path, orientation, seen))
        results = LoadDepthMap()(LoadLabelMap()(results))
        assert np.array_equal(results["gt_seg_map"], seen)
        assert np.array_equal(results["gt_depth_map"], seen.astype(np.float32))


@pytest.mark.parametrize("loader", [LoadLabelMap, LoadDepthMap])
@pytest.mark.parametrize("orientation", [1, 6])
def test_maps_of_another_size_are_refused(tmp_path, loader, orientation):
    sample = labelled(tmp_path, orientation, np.zeros((30, 30), np.uint8))
    size = "60 x 40" if orientation == 6 else "40 x 60"
    message = rf"a\.png has 30 x 30 pixels, its image .*a\.jpg has {size}; expected the same"
    with pytest.raises(ValueError, match=message):
        loader(broken="replace")(LoadMissingImage()(sample))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            np.tile(np.array([9, 8, 7], np.uint8), (HEIGHT, WIDTH, 1)),
            r"a\.png holds colours: \[9, 8, 7\] \(100\.0%\); a label map has one channel",
        ),
        (np.full((HEIGHT, WIDTH), 300, np.uint16), "holds labels from 300 to 300; expected 0 to"),
    ],
)
def test_what_is_no_label_map(tmp_path, labels, message):
    sample = labelled(tmp_path, 1, labels)
    with pytest.raises(ValueError, match=message):
        LoadLabelMap()(LoadMissingImage()(sample))


def test_labels_of_palettes_are_indices(tmp_path):
    indices = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint8) % 21
    image = Image.fromarray(indices)
    image.putpalette([value for colour in range(21) for value in (colour, 255 - colour, 7)])
    sample = LoadMissingImage()(labelled(tmp_path, 1, image))
    assert np.array_equal(LoadLabelMap()(sample)["gt_seg_map"], indices)
    with pytest.raises(ValueError, match="colour picture of depth"):
        LoadDepthMap()(sample)


TRUTH = (np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 3).astype(np.uint8)
COLORS = np.array([(0, 0, 0), (128, 64, 0), (255, 255, 255)], np.uint8)
COLOURED = COLORS[TRUTH]
GREYS = np.array([0, 77, 255], np.uint8)
OPAQUE = np.full((HEIGHT, WIDTH, 1), 200, np.uint8)


def indexed(order):
    """A paletted image whose indices are numbered in some order."""
    image = Image.fromarray(np.argsort(order).astype(np.uint8)[TRUTH])
    image.putpalette(COLORS[list(order)].ravel().tolist())
    return image


@pytest.mark.parametrize(
    ("stored", "palette"),
    [
        (COLOURED, COLORS.tolist()),
        (np.concatenate((COLOURED, OPAQUE), axis=2), COLORS.tolist()),
        (indexed((0, 1, 2)), COLORS.tolist()),
        (indexed((2, 0, 1)), COLORS.tolist()),
        (GREYS[TRUTH], [0, 77, [255, 255, 255]]),
        (np.repeat(GREYS[TRUTH][..., None], 3, axis=2), [0, 77, 255]),
        (np.repeat(TRUTH[..., None], 3, axis=2), None),
        (np.repeat(np.concatenate((TRUTH[..., None], OPAQUE), 2), (3, 1), axis=2), None),
        (Image.merge("LA", [Image.fromarray(c) for c in (TRUTH, OPAQUE[..., 0])]), None),
        (indexed((0, 1, 2)), None),
        (TRUTH.astype(np.uint16), None),
    ],
    ids=lambda value: getattr(value, "mode", None) or str(getattr(value, "shape", "palette")),
)
def test_colours_become_the_classes_in_their_order(tmp_path, stored, palette):
    sample = LoadMissingImage()(labelled(tmp_path, 1, stored))
    assert np.array_equal(LoadLabelMap(palette=palette)(dict(sample))["gt_seg_map"], TRUTH)
    if palette is not None:  # as the data set gives it
        sample["label_colors"] = as_colors(palette)
        assert np.array_equal(LoadLabelMap()(sample)["gt_seg_map"], TRUTH)


def test_one_bit_maps_are_black_and_white_to_a_palette(tmp_path):
    sample = LoadMissingImage()(labelled(tmp_path, 1, Image.fromarray(TRUTH == 1)))
    assert np.array_equal(LoadLabelMap()(dict(sample))["gt_seg_map"], TRUTH == 1)
    painted = LoadLabelMap(palette=[0, 255])(sample)["gt_seg_map"]
    assert np.array_equal(painted, TRUTH == 1)


def test_colours_of_no_class(tmp_path):
    sample = LoadMissingImage()(labelled(tmp_path, 1, COLOURED))
    two = COLORS[:2].tolist()
    message = (
        r"a\.png holds colours that the palette does not name: \[255, 255, 255\] \(33\.3%\); add"
    )
    with pytest.raises(ValueError, match=message):
        LoadLabelMap(palette=two)(dict(sample))
    labels = LoadLabelMap(palette=two, ignored_colors=[255])(dict(sample))["gt_seg_map"]
    assert np.array_equal(labels, np.where(TRUTH == 2, 255, TRUTH))
    deep = LoadMissingImage()(labelled(tmp_path, 1, np.full((HEIGHT, WIDTH), 0x8040, np.uint16)))
    with pytest.raises(ValueError, match=r"does not name: 32832 \(100\.0%\)"):
        LoadLabelMap(palette=[0, [0, 0x80, 0x40]])(deep)


@pytest.mark.parametrize(
    ("palette", "message"),
    [
        ([[0, 0, 0], 0], r"holds \(0, 0, 0\) twice"),
        ([[0, 0]], r"holds \[0, 0\]; expected \[red, green, blue\]"),
        ([256], "holds 256; expected"),
    ],
)
def test_palettes_that_are_none(palette, message):
    with pytest.raises(ValueError, match=message):
        LoadLabelMap(palette=palette)
    with pytest.raises(ValueError, match="ignored_colors needs palette"):
        LoadLabelMap(ignored_colors=[0])


def test_label_values_are_mapped_as_mmseg_maps_them(tmp_path):
    labels = np.tile(np.arange(256, dtype=np.uint8), (HEIGHT, 1))[:, :WIDTH]
    labels[:, -2:] = (254, 255)
    sample = labelled(tmp_path, 1, labels)
    sample["reduce_zero_label"] = True
    reduced = LoadLabelMap(reduce_zero_label=True)(dict(sample))["gt_seg_map"]
    expected = labels.astype(int) - 1
    expected[labels == 0] = expected[labels == 255] = 255
    assert np.array_equal(reduced, expected)
    sample["label_map"] = {0: 255, 1: 0, 2: 1}
    expected = np.select([expected == 0, expected == 1, expected == 2], [255, 0, 1], expected)
    assert np.array_equal(LoadLabelMap()(dict(sample))["gt_seg_map"], expected)
    with pytest.raises(
        ValueError, match="the data set says reduce_zero_label=True, LoadLabelMap F"
    ):
        LoadLabelMap(reduce_zero_label=False)(dict(sample))


def test_boxes_on_stored_pixels_are_not_taken_for_those_of_the_image(tmp_path):
    sample = labelled(tmp_path, 6, np.zeros((1, 1), np.uint8))
    instances = {"instances": [], "height": WIDTH, "width": HEIGHT}
    assert LoadMissingImage()({**sample, **instances})["img"].shape == (WIDTH, HEIGHT, 3)
    stored = {**instances, "height": HEIGHT, "width": WIDTH}
    message = (
        r"a\.jpg: its EXIF orientation 6 turns it to 40x60, and the annotation file says 60x40"
    )
    with pytest.raises(BrokenImageError, match=message):
        LoadMissingImage()({**sample, **stored})
    assert LoadMissingImage(broken="replace")({**sample, **stored}) is None


@DATASETS.register_module()
class _SomeAreBroken(BaseDataset):
    def load_data_list(self):
        return [{"img_path": path} for path in self.ann_file.split("|")]


@pytest.fixture
def paths(tmp_path):
    """Ten files, of which two are damaged and one is not there."""
    files = [tmp_path / f"{number}.png" for number in range(10)]
    for file in files:
        file.write_bytes(encoded(photo(HEIGHT, WIDTH), "PNG"))
    files[2].write_bytes(files[2].read_bytes()[:900])
    files[5].write_bytes(b"")
    files[7].unlink()
    return files


@pytest.fixture
def logged():
    """Messages of the current logger, also of workers: they write to its file."""
    logger = MMLogger.get_instance("broken")
    lines = []

    class Lines(logging.Handler):
        def emit(self, record):
            if record.levelno >= logging.ERROR:
                lines.append(record.getMessage())

    handler = Lines()
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_replaces_and_counts(paths, logged, num_workers):
    load = {"type": "LoadMissingImage", "broken": "replace"}
    data = _SomeAreBroken(ann_file="|".join(map(str, paths)), pipeline=[load], serialize_data=False)
    loader = DataLoader(data, batch_size=2, num_workers=num_workers, collate_fn=pseudo_collate)
    for _ in range(2):
        batches = list(loader)
        assert sum(len(batch["img"]) for batch in batches) == 10
    unreadable = data.pipeline.transforms[0].unreadable
    assert unreadable.count >= 6  # each broken file twice, replacements may be broken too
    if num_workers == 0:
        assert len(logged) == 3
        assert logged[0].startswith(f"unreadable image replaced (1 so far): {paths[2]}: ")
        assert any(line.endswith(f"{paths[5]}: the file is empty") for line in logged)
        assert any(line.endswith(f"{paths[7]}: No such file or directory") for line in logged)


def test_evaluation_ends_and_names_the_file(paths):
    data = _SomeAreBroken(
        ann_file="|".join(map(str, paths)),
        pipeline=[{"type": "LoadMissingImage"}],
        serialize_data=False,
    )
    with pytest.raises(BrokenImageError, match=r"2\.png: .*(truncated|broken)"):
        list(DataLoader(data, batch_size=2, collate_fn=pseudo_collate))
    loader = DataLoader(data, batch_size=2, num_workers=1, collate_fn=pseudo_collate)
    with pytest.raises(BrokenImageError, match=r"2\.png: .*(truncated|broken)"):
        list(loader)


@pytest.mark.parametrize("loader", [LoadLabelMap, LoadDepthMap])
def test_maps_that_cannot_be_read(tmp_path, loader, logged):
    sample = labelled(tmp_path, 1, np.zeros((HEIGHT, WIDTH), np.uint16))
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(BrokenImageError, match=r"a\.png: .*(truncated|broken)"):
        loader()(dict(sample))
    assert loader(broken="replace")(dict(sample)) is None
    assert "unreadable image replaced (1 so far)" in logged[0] and "a.png" in logged[0]


def test_only_broken_files_end_a_training():
    unreadable = UnreadableFiles("replace")
    with pytest.raises(
        RuntimeError, match="51 images in a row could not be read, the last one a: b"
    ):
        for _ in range(60):
            unreadable.handle(BrokenImageError("a", "b"))
    assert unreadable.count == 51
    with pytest.raises(ValueError, match="broken is 'skip'; "):
        LoadMissingImage(broken="skip")


def test_floats_for_depth(tmp_path):
    results = LoadMissingImage(to_float32=True)(labelled(tmp_path, 1, np.zeros((2, 2), np.uint8)))
    assert results["img"].dtype == np.float32
    brought = {"img": torch.zeros(1), "img_path": "nowhere"}
    assert LoadMissingImage()(brought) is brought
    assert "LoadMissingImage(to_float32=True, broken='error'" in repr(
        LoadMissingImage(to_float32=True)
    )

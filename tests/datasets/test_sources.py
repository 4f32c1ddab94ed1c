"""Image sources: layouts, formats, labels, and what they say about bad input."""

import os
import pickle
from typing import ClassVar

import numpy as np
import pytest
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS
from PIL import Image, ImageOps

from dinov3_mm.datasets import (
    BrokenImageError,
    ImageFolder,
    ImageList,
    ImageSource,
    MMDatasetSource,
)
from dinov3_mm.datasets.sources import read_image
from dinov3_mm.datasets.sources.files import PathIndex
from tests.datasets.photos import photo


def save(path, image=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo(40, 60) if image is None else image).save(path, **options)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.png", "a.webp", "a.bmp", "a.tif", "a.tiff"])
def test_every_format_is_read_as_pil_reads_it(tmp_path, name):
    save(tmp_path / name)
    source = ImageFolder(str(tmp_path))
    assert len(source) == 1 and isinstance(source, ImageSource)
    image = source.load_image(0)
    assert image.dtype == np.uint8
    assert (image == np.asarray(Image.open(tmp_path / name).convert("RGB"))).all()
    assert source.probe(0) == (40, 60, 3)


@pytest.mark.parametrize("quality", [30, 90])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_decoding_is_pils(tmp_path, quality, subsampling, progressive):
    path = tmp_path / "a.jpg"
    save(path, quality=quality, subsampling=subsampling, progressive=progressive)
    assert (read_image(path) == np.asarray(Image.open(path))).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK"])
def test_color_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(photo(40, 60)).convert(mode if mode != "LA" else "L").convert(mode).save(path)
    expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert np.abs(read_image(path) - expected).max() <= (2 if mode == "CMYK" else 0)


def test_sixteen_bit_images_keep_their_upper_byte(tmp_path):
    values = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert image.shape == (40, 60, 3)
        assert (image == (values >> 8)[..., None]).all()


def test_gray_and_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").shape == (60, 40, 3)
    gray = ImageFolder(str(tmp_path), color="gray").load_image(0)
    turned = ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg"))
    expected = np.asarray(turned.convert("L")).astype(int)
    assert gray.shape == (60, 40, 1)
    assert np.abs(gray[..., 0] - expected).mean() < 1
    with pytest.raises(ValueError, match=r"color must be one of .* got 'bgr'"):
        ImageFolder(str(tmp_path), color="bgr")


def test_reduced_decoding(tmp_path):
    large = np.asarray(Image.fromarray(photo(150, 200)).resize((800, 600)))
    save(tmp_path / "a.jpg", large, quality=95)
    shapes = {
        side: ImageFolder(str(tmp_path), decode_min_side=side).load_image(0).shape
        for side in (None, 400, 200, 100, 10)
    }
    assert shapes == {
        None: (600, 800, 3),
        400: (600, 800, 3),
        200: (300, 400, 3),
        100: (150, 200, 3),
        10: (75, 100, 3),
    }
    reduced = ImageFolder(str(tmp_path), decode_min_side=200).load_image(0).astype(int)
    expected = np.asarray(Image.fromarray(large).reduce(2))
    assert np.abs(reduced - expected).mean() < 2


def test_flat_nested_and_class_folders(tmp_path):
    flat = tmp_path / "flat"
    for name in ("b.png", "a.png", "sub/c.png", "notes.txt", ".hidden.png", ".cache/d.png"):
        save(flat / name) if name.endswith("png") else (flat / name).write_text("x")
    source = ImageFolder(str(flat))
    names = [os.path.relpath(source.path(index), flat) for index in range(len(source))]
    assert names == ["a.png", "b.png", "sub/c.png"]
    assert source.classes == ()
    with pytest.raises(ValueError, match="has no labels"):
        source.label(0)

    classes = tmp_path / "classes"
    for name in ("dog/deep/z.png", "cat/b.png", "cat/a.png"):
        save(classes / name)
    (classes / "bird").mkdir()
    source = ImageFolder(str(classes))
    assert source.classes == ("bird", "cat", "dog")
    assert [source.label(index) for index in range(3)] == [1, 1, 2]
    assert source.path(2) == str(classes / "dog/deep/z.png")


def test_folder_links_are_followed_once(tmp_path):
    save(tmp_path / "root/a/x.png")
    (tmp_path / "root/a/loop").symlink_to(tmp_path / "root")
    save(tmp_path / "elsewhere/y.png")
    (tmp_path / "root/b").symlink_to(tmp_path / "elsewhere")
    assert len(ImageFolder(str(tmp_path / "root"))) == 2


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist; set root"):
        ImageFolder(str(tmp_path / "nowhere"))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        ImageFolder(str(tmp_path / "notes.txt"))
    with pytest.raises(ValueError, match=r"no image below .* end in \.jpg, \.jpeg, \.png"):
        ImageFolder(str(tmp_path))


def test_index_is_two_buffers_however_many_paths():
    index = PathIndex()
    paths = [f"class_{number % 100:03d}/image_{number:08d}.jpg" for number in range(20000)]
    paths[7] = os.fsdecode(b"caf\xe9 \xff.jpg")
    for path in paths:
        index.append(path)
    assert [index[number] for number in range(len(index))] == paths
    assert len(pickle.dumps(index)) < 1.3 * sum(len(path) + 8 for path in paths)
    with pytest.raises(IndexError, match="outside 20000 paths"):
        index[20000]


def test_text_list(tmp_path):
    save(tmp_path / "images/a.png")
    save(tmp_path / "images/b c.png", np.zeros((5, 6, 3), np.uint8))
    listing = tmp_path / "list.txt"
    listing.write_text(f"images/a.png\n\n{tmp_path / 'images/b c.png'}\r\n")
    source = ImageList(str(listing))
    assert len(source) == 2 and source.classes == ()
    assert source.load_image(1).shape == (5, 6, 3)
    listing.write_text("a.png\n")
    assert ImageList(str(listing), root=str(tmp_path / "images")).probe(0) == (40, 60, 3)


def test_csv_list(tmp_path):
    listing = tmp_path / "list.csv"
    listing.write_text('path,label\n"a,1.png",dog\nb.png,cat\n')
    source = ImageList(str(listing))
    assert source.path(0) == str(tmp_path / "a,1.png")
    assert source.classes == ("cat", "dog") and [source.label(0), source.label(1)] == [1, 0]
    listing.write_text("label,path\n3,a.png\n0,b.png\n")
    assert [ImageList(str(listing)).label(index) for index in range(2)] == [3, 0]
    listing.write_text("path\na.png\n")
    with pytest.raises(ValueError, match="no labels"):
        ImageList(str(listing)).label(0)


def test_bad_lists(tmp_path):
    listing = tmp_path / "list.csv"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ImageList(str(listing))
    listing.write_text("file,label\na.png,1\n")
    with pytest.raises(ValueError, match=r"must name a column 'path' .* got \['file', 'label'\]"):
        ImageList(str(listing))
    listing.write_text("path,label\na.png,1\nb.png,\n")
    with pytest.raises(ValueError, match=r"image 1 of .* \(b\.png\) has no label"):
        ImageList(str(listing))
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(ValueError, match="names no image"):
        ImageList(str(tmp_path / "list.txt"))


@DATASETS.register_module()
class _ListedForTest(BaseDataset):
    METAINFO: ClassVar = {"classes": ("cat", "dog")}

    def load_data_list(self):
        names = self.ann_file.split(",")
        return [{"img_path": name, "gt_label": number} for number, name in enumerate(names)]


def test_mm_dataset(tmp_path):
    save(tmp_path / "a.jpg")
    names = f"{tmp_path / 'a.jpg'},{tmp_path / 'gone.jpg'}"
    source = MMDatasetSource({"type": "_ListedForTest", "ann_file": names})
    assert len(source) == 2 and source.classes == ("cat", "dog")
    assert [source.label(0), source.label(1)] == [0, 1]
    assert (source.load_image(0) == read_image(tmp_path / "a.jpg")).all()
    with pytest.raises(BrokenImageError, match=r"gone\.jpg: No such file"):
        source.load_image(1)
    with pytest.raises(TypeError, match="list has no get_data_info"):
        MMDatasetSource([1, 2])


def damaged_files(folder):
    """Files that cannot be decoded completely, by name."""
    save(folder / "whole.jpg", photo(), quality=90)
    save(folder / "whole.png", photo())
    jpeg, png = (folder / "whole.jpg").read_bytes(), (folder / "whole.png").read_bytes()
    return {
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "header.jpg": jpeg[:20],
        "truncated.png": png[: len(png) // 2],
        "empty.png": b"",
        "text.jpg": b"not an image at all",
        "headless.png": png[:8] + b"\0" * 100,
    }


def test_damaged_files_are_named(tmp_path):
    for name, data in damaged_files(tmp_path / "source").items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(BrokenImageError) as caught:
            read_image(path)
        assert str(caught.value).startswith(f"{path}: ") and caught.value.path == str(path)
    with pytest.raises(BrokenImageError, match=r"gone\.jpg: No such file or directory"):
        read_image(tmp_path / "gone.jpg")


def test_padding_after_the_image_is_harmless(tmp_path):
    save(tmp_path / "a.jpg")
    expected = read_image(tmp_path / "a.jpg")
    for padding in (b"\0" * 10, b"\0" * 5000):
        (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes() + padding)
        assert (read_image(tmp_path / "b.jpg") == expected).all()

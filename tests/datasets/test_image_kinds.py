"""The same file gives the same pixels on every route; tests/acceptance/image_kinds.py prints it."""

import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image

from dinov3_mm.datasets import BrokenImageError, ImageFolder
from dinov3_mm.datasets.images import decode_image, pil_pixels, read_image
from dinov3_mm.datasets.multiband import decode_unchanged
from dinov3_mm.features.preparation import load_pixels
from tests.acceptance import image_kinds
from tests.datasets.photos import photo

KINDS = {kind.name: kind for kind in image_kinds.kinds()}


@pytest.mark.parametrize("name", KINDS)
def test_all_routes_agree(tmp_path, name):
    kind = KINDS[name]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Tt]ransparency")
        cells = {
            route: image_kinds.outcome(kind, read, tmp_path / str(number) / "data")
            for number, (route, read) in enumerate(image_kinds.ROUTES.items())
        }
    wrong = {
        route: cell for route, cell in cells.items() if not image_kinds.is_right(kind, cell, route)
    }
    assert not wrong
    skipped = sum(cell == image_kinds.Cell(None, "") for cell in cells.values())
    assert skipped in (0, 2)  # the two routes of PIL images, where PIL opens none


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pixels_that_are_kept_unchanged_are_turned_too(orientation):
    values = np.arange(24, dtype=np.uint16).reshape(4, 6) * 2000
    data = image_kinds.encoded(values, "PNG", exif=image_kinds.exif(orientation))
    tag = [(274, "H", 1, orientation, True)]
    other = image_kinds.tiff(values[..., None].repeat(5, 2), planarconfig="contig", extratags=tag)
    upper = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    shown = image_kinds.encoded(upper, "PNG", exif=image_kinds.exif(orientation))
    expected = image_kinds.as_seen(shown)[..., 0]
    assert np.array_equal(decode_unchanged(data, "a")[..., 0] >> 8, expected)
    assert np.array_equal(decode_unchanged(other, "a")[..., 3] >> 8, expected)


def test_sizes_in_headers_are_those_of_the_pixels(tmp_path):
    for number, kind in enumerate(KINDS.values()):
        if isinstance(kind.expected, str):
            continue
        path = tmp_path / str(number) / kind.file
        path.parent.mkdir()
        path.write_bytes(kind.data)
        named = kind.name in ("TIFF 1-bit, fax", "TIFF, two pages")  # not for tifffile, or no image
        for color in ("rgb", "gray") if named else ("rgb", "gray", "unchanged"):
            source = ImageFolder(str(path.parent), color=color)
            shape = source.load_image(0).shape
            assert source.probe(0) == shape and shape[:2] == kind.expected.shape[:2], kind.name


@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_decoding_is_turned_and_the_decoders_own(orientation):
    large = np.asarray(Image.fromarray(photo(150, 200)).resize((803, 601)))
    data = image_kinds.encoded(large, "JPEG", exif=image_kinds.exif(orientation))
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (200, 200))
        expected = np.asarray(image)
    expected = np.rot90(expected, -1) if orientation == 6 else expected
    reduced = decode_image(data, "a", min_side=200)
    assert reduced.shape == expected.shape and reduced.shape[:2] != large.shape[:2]
    assert np.abs(reduced.astype(int) - expected).max() <= 1
    for color in ("rgb", "gray"):
        whole = decode_image(data, "a", color, 200).astype(int)
        assert np.abs(decode_image(data + b"\0" * 100, "a", color, 200) - whole).max() <= 1


def test_one_limit_of_pixels_on_every_route(tmp_path, monkeypatch):
    """PIL's own would end reduced decoding alone; OpenCV and tifffile have others, or none."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for kind in (KINDS["JPEG"], KINDS["PNG RGBA"], KINDS["GIF"], KINDS["TIFF 16-bit RGB"]):
        monkeypatch.delenv("DINOV3_MM_MAX_PIXELS", raising=False)
        assert decode_image(kind.data, "a", min_side=16).shape[2] == 3
        assert Image.MAX_IMAGE_PIXELS == 1000
        monkeypatch.setenv("DINOV3_MM_MAX_PIXELS", "2399")
        for number, (route, read) in enumerate(image_kinds.ROUTES.items()):
            if "PIL" in route:
                continue
            cell = image_kinds.outcome(kind, read, tmp_path / kind.name / str(number) / "data")
            assert cell.difference is None and "60x40 are 2400 pixels" in cell.message, route
            assert "DINOV3_MM_MAX_PIXELS=2400 in the environment" in cell.message
        with pytest.raises(BrokenImageError, match="more than the limit of 2399"):
            decode_unchanged(kind.data, "a")
        with pytest.raises(BrokenImageError, match="more than the limit of 2399"):
            ImageFolder(str(tmp_path / kind.name / "0/data/class")).probe(0)
    monkeypatch.setenv("DINOV3_MM_MAX_PIXELS", "many")
    with pytest.raises(BrokenImageError, match="'many': expected a number of pixels"):
        decode_image(KINDS["JPEG"].data, "a")


def test_pil_images_get_the_advice_of_arrays():
    for mode in ("F", "I"):
        image = Image.fromarray(photo(8, 8)).convert("L").convert(mode)
        with pytest.raises(ValueError, match=r"pass an array in 0\.\.255, of uint8 or floating"):
            load_pixels(image, read_image)
    planar = KINDS["TIFF 16-bit RGB, planar"].data
    with Image.open(io.BytesIO(planar)) as image, pytest.raises(ValueError, match="pass the path"):
        pil_pixels(image)


def test_the_callers_image_stays_as_it_was():
    data = KINDS["PNG palette, one clear"].data
    with Image.open(io.BytesIO(data)) as image:
        pil_pixels(image)
        assert image.mode == "P" and image.info["transparency"] == 3


NAMES = ("straße 图.png", "a b#%20?.png", "-r.png", "new\nline.png", os.fsdecode(b"caf\xe9.png"))


@pytest.mark.parametrize("name", NAMES)
def test_unusual_names(tmp_path, name):
    kind = KINDS["PNG RGBA"]._replace(file=name)
    for number, (route, read) in enumerate(image_kinds.ROUTES.items()):
        if route == "list" and "\n" in name:
            continue  # a line each
        cell = image_kinds.outcome(kind, read, tmp_path / str(number) / "data")
        assert cell.difference == 0, (route, cell)


def test_names_that_no_file_has(tmp_path):
    with pytest.raises(BrokenImageError, match="null byte"):
        read_image(str(tmp_path / "a\0.png"))
    with pytest.raises(BrokenImageError, match="Is a directory"):
        read_image(str(tmp_path))

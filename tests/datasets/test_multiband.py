"""Sources with ``color='unchanged'``: containers, pixel types, channels, and bad files."""

import io
import subprocess
import sys

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from dinov3_mm.datasets import BrokenImageError, ImageFolder, ImageList, MMDatasetSource
from dinov3_mm.datasets.multiband import decode_unchanged, read_header
from tests.datasets.photos import photo

DTYPES = (np.uint8, np.uint16, np.float32)
INTERLEAVED = {"photometric": "minisblack", "planarconfig": "contig"}
PLANAR = {"photometric": "minisblack", "planarconfig": "separate"}
PAGES = {"photometric": "minisblack"}


def bands(channels, dtype=np.uint16, height=40, width=60):
    """``(H, W, C)``, every band another multiple of one photograph."""
    grey = photo(height, width)[..., :1].astype(np.float64) / 255
    values = grey * np.linspace(0.5, 1, channels)
    top = 1 if dtype == np.float32 else np.iinfo(dtype).max
    return (values * top).astype(dtype)


def tiff(pixels, planes=False, **options):
    file = io.BytesIO()
    if pixels.shape[2] == 1:
        pixels, planes = pixels[..., 0], False
        options.pop("planarconfig", None)
    tifffile.imwrite(file, pixels.transpose(2, 0, 1) if planes else pixels, **options)
    return file.getvalue()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 8, 13])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiff_of_any_layout_is_read_unchanged(tmp_path, channels, dtype):
    pixels = bands(channels, dtype)
    files = {
        "interleaved": tiff(pixels, **INTERLEAVED),
        "planar": tiff(pixels, planes=True, **PLANAR),
        "pages": tiff(pixels, planes=True, **PAGES),
        "plain pages": tiff(pixels, planes=True, metadata=None, **PAGES),
        "big endian": tiff(pixels, byteorder=">", **INTERLEAVED),
        "bigtiff": tiff(pixels, bigtiff=True, **INTERLEAVED),
        "deflate tiles": tiff(pixels, compression="zlib", tile=(16, 16), **INTERLEAVED),
    }
    for name, data in files.items():
        decoded = decode_unchanged(data, name)
        assert decoded.dtype.newbyteorder("=") == dtype, name
        assert np.array_equal(decoded, pixels), name
        assert read_header(write(tmp_path / "a.tif", data)) == (40, 60, channels), name


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK"])
def test_pil_modes_keep_their_channels(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(photo(40, 60)).convert(mode).save(path)
    expanded = {"P": "RGB", "1": "L"}.get(mode, mode)
    with Image.open(path) as image:
        expected = np.array(image.convert(expanded)).reshape(40, 60, -1)
    assert np.array_equal(decode_unchanged(path.read_bytes(), "a"), expected)
    assert read_header(path) == expected.shape


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_deep_png(tmp_path, channels):
    pixels = bands(channels)
    swapped = pixels[..., [2, 1, 0, 3][:channels]] if channels > 1 else pixels
    data = cv2.imencode(".png", swapped)[1].tobytes()
    assert np.array_equal(decode_unchanged(data, "a.png"), pixels)
    assert read_header(write(tmp_path / "a.png", data)) == (40, 60, channels)
    with pytest.raises(BrokenImageError, match=r"a\.png: ValueError: truncated: no end marker"):
        decode_unchanged(data[: len(data) // 2], "a.png")


@pytest.mark.parametrize("dtype", DTYPES)
def test_npy(tmp_path, dtype):
    pixels = bands(5, dtype)
    for array in (pixels, pixels[..., 0]):
        np.save(tmp_path / "a.npy", array)
        data = (tmp_path / "a.npy").read_bytes()
        assert np.array_equal(decode_unchanged(data, "a"), array.reshape(40, 60, -1))
        assert read_header(tmp_path / "a.npy") == array.reshape(40, 60, -1).shape
    source = ImageFolder(str(tmp_path), color="unchanged")
    assert len(source) == 1 and source.load_image(0).shape == (40, 60, 1)
    with pytest.raises(ValueError, match="no image below"):
        ImageFolder(str(tmp_path))
    np.save(tmp_path / "a.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(BrokenImageError, match="Object arrays cannot be loaded"):
        source.load_image(0)


def test_value_ranges(tmp_path):
    for name, dtype in (("8", np.uint8), ("16", np.uint16), ("32", np.float32)):
        write(tmp_path / name / "a.tif", tiff(bands(4, dtype), **INTERLEAVED))

    def load(name, **options):
        return ImageFolder(str(tmp_path / name), color="unchanged", **options).load_image(0)

    assert load("8").dtype == np.uint8 and np.array_equal(load("8"), bands(4, np.uint8))
    for name, dtype, top in (("16", np.uint16, 65535), ("32", np.float32, 1)):
        expected = bands(4, dtype).astype(np.float64) / top * 255
        image = load(name)
        assert image.dtype == np.float32 and np.abs(image - expected).max() < 1e-4
    stored = bands(4).astype(np.float64)
    expected = ((stored - 1000) / 9000 * 255).clip(0, 255)
    assert np.abs(load("16", value_range=(1000, 10000)) - expected).max() < 1e-3
    halved = load("8", value_range=(0, 510))
    assert halved.dtype == np.float32
    assert np.abs(halved - bands(4, np.uint8) / 2).max() < 1e-4


def test_floats_outside_the_default_range_are_refused(tmp_path):
    write(tmp_path / "a.tif", tiff(5000 * bands(4, np.float32), **INTERLEAVED))
    with pytest.raises(BrokenImageError, match=r"outside 0\.\.1 \(they span .*set value_range"):
        ImageFolder(str(tmp_path), color="unchanged").load_image(0)
    source = ImageFolder(str(tmp_path), color="unchanged", value_range=(0, 5000))
    assert source.load_image(0).max() > 200
    holes = bands(4, np.float32)
    holes[3, 4, 1] = np.nan
    write(tmp_path / "a.tif", tiff(holes, **INTERLEAVED))
    with pytest.raises(BrokenImageError, match=r"a\.tif: holds NaN or infinite values"):
        source.load_image(0)


def test_other_pixel_types_need_a_range(tmp_path):
    stored = bands(3, np.int16).astype(np.int16) - 5000
    write(tmp_path / "a.tif", tiff(stored, **INTERLEAVED))
    with pytest.raises(BrokenImageError, match="int16 pixels have no natural range; set value_r"):
        ImageFolder(str(tmp_path), color="unchanged").load_image(0)
    source = ImageFolder(str(tmp_path), color="unchanged", value_range=(-5000, 30000))
    expected = (stored.astype(np.float64) + 5000) / 35000 * 255
    assert np.abs(source.load_image(0) - expected).max() < 1e-3


def test_chosen_channels(tmp_path):
    write(tmp_path / "a.tif", tiff(bands(8, np.uint8), planes=True, **PAGES))
    (tmp_path / "list.txt").write_text("a.tif\n")
    options = {"color": "unchanged", "channels": (3, 2, 1, 7)}
    expected = bands(8, np.uint8)[..., [3, 2, 1, 7]]
    for source in (
        ImageFolder(str(tmp_path), **options),
        ImageList(str(tmp_path / "list.txt"), **options),
        MMDatasetSource(_OneSample(str(tmp_path / "a.tif")), **options),
    ):
        image = source.load_image(0)
        assert np.array_equal(image, expected) and image.flags.c_contiguous
    source = ImageFolder(str(tmp_path), color="unchanged", channels=[8])
    with pytest.raises(BrokenImageError, match=r"a\.tif: has 8 channels, not those of channels=\["):
        source.load_image(0)


class _OneSample:
    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 1

    def get_data_info(self, index):
        return {"img_path": self.path}


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.3, 0.5, 0.9, 0.999])
def test_truncated_files_are_named(tmp_path, share):
    pixels = bands(8)
    np.save(tmp_path / "a.npy", pixels)
    files = {
        "interleaved.tif": tiff(pixels, **INTERLEAVED),
        "pages.tif": tiff(pixels, planes=True, **PAGES),
        "plain.tif": tiff(pixels, planes=True, metadata=None, **PAGES),
        "deflate.tif": tiff(pixels, compression="zlib", tile=(16, 16), **INTERLEAVED),
        "a.npy": (tmp_path / "a.npy").read_bytes(),
    }
    for name, data in files.items():
        # The last bytes of a list of pages say that there are no more.
        path = write(tmp_path / "broken" / name, data[: min(int(share * len(data)), len(data) - 8)])
        source = ImageFolder(str(tmp_path / "broken"), color="unchanged")
        with pytest.raises(BrokenImageError) as caught:
            source.load_image(0)
        assert str(caught.value).startswith(f"{path}: ")
        path.unlink()


def test_missing_files_are_named(tmp_path):
    write(tmp_path / "a.tif", tiff(bands(2), **INTERLEAVED))
    source = ImageFolder(str(tmp_path), color="unchanged")
    (tmp_path / "a.tif").unlink()
    for read in (source.load_image, source.probe):
        with pytest.raises(BrokenImageError, match=r"a\.tif: No such file"):
            read(0)


def test_volumes_are_refused():
    volume = np.zeros((5, 2, 16, 20), np.uint16)
    file = io.BytesIO()
    tifffile.imwrite(file, volume, ome=True, metadata={"axes": "ZCYX"}, photometric="minisblack")
    with pytest.raises(BrokenImageError, match=r"axes ZCYX of shape .* one axis of bands"):
        decode_unchanged(file.getvalue(), "a.tif")


WITHOUT_IMAGECODECS = """
import sys
sys.modules["imagecodecs"] = None
from dinov3_mm.datasets.multiband import decode_unchanged
try:
    decode_unchanged(open(sys.argv[1], "rb").read(), "a.tif")
except ImportError as error:
    print(error)
"""


def test_missing_packages_are_named(monkeypatch, tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(photo(40, 60)).save(path, "TIFF", compression="tiff_lzw")
    # In a process of its own: tifffile looks for the codecs once.
    command = [sys.executable, "-c", WITHOUT_IMAGECODECS, str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "LZW compression needs the package imagecodecs" in output
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImportError, match=r"need tifffile: pip install 'dinov3_mm\[data\]'"):
        decode_unchanged(path.read_bytes(), "a.tif")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"color": "unchange"}, r"color must be one of .*'unchanged'\), got 'unchange'; did you"),
        ({"channels": [0]}, r"channels=\[0\] needs color='unchanged'"),
        ({"color": "gray", "value_range": (0, 1)}, "value_range=.* needs color='unchanged'"),
        ({"color": "unchanged", "decode_min_side": 64}, "decode_min_side reduces 8-bit JPEGs"),
        ({"color": "unchanged", "channels": "RGB"}, "indices from 0, .* got 'RGB'"),
        ({"color": "unchanged", "channels": [-1]}, r"indices from 0, .* got \[-1\]"),
        ({"color": "unchanged", "channels": ()}, r"indices from 0, .* got \(\)"),
        ({"color": "unchanged", "value_range": (1, 1)}, r"low < high, got \(1, 1\)"),
        ({"color": "unchanged", "value_range": 255}, "low < high, got 255"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    write(tmp_path / "a.tif", tiff(bands(2), **INTERLEAVED))
    with pytest.raises(ValueError, match=message):
        ImageFolder(str(tmp_path), **options)


def test_rgb_mode_says_what_multiband_files_need(tmp_path):
    write(tmp_path / "a.tif", tiff(bands(8), **INTERLEAVED))
    source = ImageFolder(str(tmp_path))
    for read in (source.load_image, source.probe):
        with pytest.raises(BrokenImageError, match=r"8 MINISBLACK bands .* with color='unchanged'"):
            read(0)
    write(tmp_path / "a.tif", tiff(bands(1, np.float32), **INTERLEAVED))
    with pytest.raises(BrokenImageError, match="no defined 8-bit range; read them with color"):
        source.load_image(0)

"""Every kind of image file on every route: the same pixels, or the same refusal.

    python -m tests.acceptance.image_kinds

prints the table (largest difference from the expected pixels, which an independent reader or the
construction of the file gives), the refusals word for word, and what folders and lists leave out.
"""

import io
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import imageio.v3
import numpy as np
import tifffile
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS
from PIL import Image, ImageOps, PngImagePlugin

from dinov3_mm.apis.prediction.inputs import iterate_images
from dinov3_mm.datasets import (
    ClassificationFolder,
    ImageFolder,
    ImageList,
    LoadMissingImage,
    MMDatasetSource,
)
from dinov3_mm.datasets.image_files import files_by_name, image_extensions
from dinov3_mm.datasets.images import read_image
from dinov3_mm.features.preparation import ImageFiles, load_pixels
from tests.datasets.photos import photo

HEIGHT, WIDTH = 40, 60


class Kind(NamedTuple):
    """A kind of file.

    Attributes:
        name: what is peculiar.
        file: name of the file.
        data: its content.
        expected: (H, W, 3) uint8, or the pattern of the refusal.
        pil: pattern of the refusal of PIL images, where only they are refused.
    """

    name: str
    file: str
    data: bytes
    expected: np.ndarray | str
    pil: str = ""


def encoded(image: Image.Image | np.ndarray, form: str, **options: Any) -> bytes:
    """A file's bytes, written by PIL."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def tiff(pixels: np.ndarray, **options: Any) -> bytes:
    """A TIFF file's bytes, written by tifffile."""
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def exif(orientation: int, padding: int = 0) -> bytes:
    """An EXIF block with an orientation, and a note of some length."""
    block = Image.Exif()
    block[274] = orientation
    if padding:
        block[0x010E] = "x" * padding
    return block.tobytes()


def as_seen(data: bytes) -> np.ndarray:
    """What PIL and imageio show of a file, turned; both must agree."""
    with Image.open(io.BytesIO(data)) as image:
        shown = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    other = imageio.v3.imread(data, rotate=True, mode="RGB", index=0)
    assert np.array_equal(shown, other), "the two readers disagree"
    return shown


def interlaced_png(pixels: np.ndarray) -> bytes:
    """An Adam7 PNG of 8-bit RGB, which neither PIL nor OpenCV write."""
    rows = b""
    for y, x, dy, dx in (
        *((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)),
        *((2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)),
    ):
        for row in pixels[y::dy, x::dx]:
            rows += b"\0" + row.tobytes()
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )


def with_chunk(png: bytes, name: bytes, body: bytes) -> bytes:
    """A PNG with another chunk behind its header."""
    chunk = struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return png[:33] + chunk + png[33:]


def with_segment(jpeg: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG with another segment at its beginning."""
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + jpeg[2:]


def turned_kinds(rgb: np.ndarray) -> Iterator[Kind]:
    """Orientations, wherever they may be stated."""
    for orientation in range(2, 9):
        data = encoded(rgb, "JPEG", quality=90, exif=exif(orientation))
        yield Kind(f"JPEG, EXIF {orientation}", "a.jpg", data, as_seen(data))
    for form, file, options in (
        ("PNG", "a.png", {}),
        ("WEBP", "a.webp", {"lossless": True}),
        ("AVIF", "a.avif", {"quality": 90}),
    ):
        data = encoded(rgb, form, exif=exif(6), **options)
        yield Kind(f"{form}, EXIF 6", file, data, as_seen(data))
    deep = (rgb[..., 0].astype(np.uint16) << 8) + 77
    turned = np.repeat(np.rot90(rgb[..., :1], -1), 3, axis=2)
    yield Kind("PNG 16-bit grey, EXIF 6", "a.png", encoded(deep, "PNG", exif=exif(6)), turned)
    data = tiff(rgb, photometric="rgb", extratags=[(274, "H", 1, 8, True)])
    yield Kind("TIFF, orientation 8", "a.tif", data, np.rot90(rgb))
    data = tiff(rgb.astype(np.uint16) << 8, photometric="rgb", extratags=[(274, "H", 1, 5, True)])
    yield Kind("TIFF 16-bit RGB, orientation 5", "a.tif", data, rgb.swapaxes(0, 1))
    plain = encoded(rgb, "JPEG", quality=90)
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    data = with_segment(plain, 0xE1, xmp)
    yield Kind("JPEG, orientation in XMP", "a.jpg", data, as_seen(data))
    data = encoded(rgb, "JPEG", quality=90, exif=exif(6, 60000))
    yield Kind("JPEG, EXIF of 60 kB", "a.jpg", data, as_seen(data))
    data = with_segment(plain, 0xE1, b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1\2\3" * 20)
    yield Kind("JPEG, damaged EXIF", "a.jpg", data, as_seen(plain))
    data = encoded(rgb, "JPEG", quality=90, exif=exif(17))
    yield Kind("JPEG, EXIF 17", "a.jpg", data, as_seen(plain))


def alpha_kinds(rgb: np.ndarray) -> Iterator[Kind]:
    """Transparency: it is dropped."""
    alpha = np.linspace(0, 255, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH, 1).astype(np.uint8)
    gray = rgb[..., :1]
    grays = np.repeat(gray, 3, axis=2)
    rgba = np.concatenate((rgb, alpha), axis=2)
    yield Kind("PNG RGBA", "a.png", encoded(rgba, "PNG"), rgb)
    la = Image.merge("LA", [Image.fromarray(c[..., 0]) for c in (gray, alpha)])
    yield Kind("PNG LA", "a.png", encoded(la, "PNG"), grays)
    palette = Image.fromarray(rgb).quantize(200)
    colours = np.array(palette.convert("RGB"))
    alphas = bytes(range(200))
    data = encoded(palette, "PNG", transparency=alphas)
    yield Kind("PNG palette, alphas", "a.png", data, colours)
    yield Kind("PNG palette, one clear", "a.png", encoded(palette, "PNG", transparency=3), colours)
    data = encoded(rgb, "PNG", transparency=tuple(rgb[0, 0].tolist()))
    yield Kind("PNG RGB, one clear", "a.png", data, rgb)
    data = encoded(gray[..., 0], "PNG", transparency=int(gray[0, 0, 0]))
    yield Kind("PNG grey, one clear", "a.png", data, grays)
    yield Kind("GIF, one clear", "a.gif", encoded(palette, "GIF", transparency=3), colours)
    data = encoded(rgba, "WEBP", lossless=True, exact=True)
    yield Kind("WebP RGBA", "a.webp", data, rgb)
    yield Kind("TIFF RGBA", "a.tif", encoded(rgba, "TIFF"), rgb)
    data = tiff(rgba.astype(np.uint16) << 8, photometric="rgb", extrasamples=["unassalpha"])
    yield Kind("TIFF 16-bit RGBA", "a.tif", data, rgb)
    swapped = np.ascontiguousarray(rgba[..., [2, 1, 0, 3]]).astype(np.uint16) << 8
    yield Kind("PNG 16-bit RGBA", "a.png", cv2.imencode(".png", swapped)[1].tobytes(), rgb)


def deep_kinds(rgb: np.ndarray) -> Iterator[Kind]:
    """More and fewer than 8 bits."""
    values = np.linspace(0, 65535, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).astype(np.uint16)
    upper = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    yield Kind("PNG 16-bit grey", "a.png", encoded(values, "PNG"), upper)
    yield Kind("TIFF 16-bit grey", "a.tif", tiff(values), upper)
    yield Kind("TIFF 16-bit, big endian", "a.tif", tiff(values, byteorder=">"), upper)
    pgm = b"P5 %d %d 65535\n" % (WIDTH, HEIGHT) + values.astype(">u2").tobytes()
    yield Kind("PGM 16-bit", "a.pgm", pgm, upper)
    deep = rgb.astype(np.uint16) * 256 + 200
    yield Kind("PNG 16-bit RGB", "a.png", cv2.imencode(".png", deep[..., ::-1])[1].tobytes(), rgb)
    yield Kind("TIFF 16-bit RGB", "a.tif", tiff(deep, photometric="rgb"), rgb)
    planes = np.ascontiguousarray(deep.transpose(2, 0, 1))
    data = tiff(planes, photometric="rgb", planarconfig="separate")
    yield Kind("TIFF 16-bit RGB, planar", "a.tif", data, rgb, "mixes up the colours of planar")
    black = rgb[..., 0] > 128
    bilevel = np.repeat(np.where(black, 255, 0).astype(np.uint8)[..., None], 3, axis=2)
    yield Kind("PNG 1-bit", "a.png", encoded(Image.fromarray(black), "PNG"), bilevel)
    data = encoded(Image.fromarray(black), "TIFF", compression="group4")
    yield Kind("TIFF 1-bit, fax", "a.tif", data, bilevel)
    few = Image.fromarray(rgb).quantize(16)
    data = encoded(few, "PNG", bits=4)
    yield Kind("PNG palette, 4-bit", "a.png", data, np.array(few.convert("RGB")))
    wide = r"32-bit {} pixels have no defined 8-bit range"
    unit = rgb[..., 0].astype(np.float32) / 255
    yield Kind("TIFF float 0..1", "a.tif", tiff(unit), wide.format("float"))
    yield Kind("TIFF float 0..255", "a.tif", tiff(unit * 255), wide.format("float"))
    yield Kind(
        "TIFF 32-bit integer", "a.tif", tiff(values.astype(np.int32)), wide.format("integer")
    )
    data = tiff(np.repeat(rgb, 2, axis=2), photometric="minisblack", planarconfig="contig")
    yield Kind("TIFF of 6 bands", "a.tif", data, r"6 MINISBLACK bands .*color='unchanged'")
    data = tiff(deep, photometric="minisblack", planarconfig="contig")
    yield Kind("TIFF of 3 bands", "a.tif", data, r"3 MINISBLACK bands .*color='unchanged'")


def jpeg_kinds(rgb: np.ndarray) -> Iterator[Kind]:
    """What cameras and the web make of JPEG."""
    plain = encoded(rgb, "JPEG", quality=90)
    for name, options in (
        ("JPEG", {}),
        ("JPEG, progressive", {"progressive": True}),
        ("JPEG, RGB stored", {"keep_rgb": True}),
    ):
        data = encoded(rgb, "JPEG", quality=90, **options)
        yield Kind(name, "a.jpg", data, as_seen(data))
    data = encoded(rgb[..., 0], "JPEG", quality=90)
    yield Kind("JPEG grey", "a.jpeg", data, as_seen(data))
    data = encoded(Image.fromarray(rgb).convert("CMYK"), "JPEG", quality=90)
    yield Kind("JPEG CMYK (Adobe)", "a.jpg", data, as_seen(data))
    yield Kind("JPEG, 5 kB behind it", "a.jpg", plain + b"\xff\xd8garbage" * 500, as_seen(plain))
    second = Image.fromarray(rgb[::-1].copy())
    data = encoded(rgb, "MPO", save_all=True, append_images=[second], exif=exif(6))
    shown = encoded(rgb, "JPEG", exif=exif(6))
    yield Kind("MPO of a phone", "a.jpg", data, as_seen(shown))
    yield Kind("MPO, by its ending", "a.MPO", data, as_seen(shown))
    yield Kind("JPEG, ending .jfif", "a.jfif", plain, as_seen(plain))
    yield Kind("JPEG, ending .JPG", "a.JPG", plain, as_seen(plain))
    yield Kind("JPEG called .png", "a.png", plain, as_seen(plain))


def other_kinds(rgb: np.ndarray) -> Iterator[Kind]:
    """Other containers, animations, metadata."""
    palette = Image.fromarray(rgb).quantize(200)
    colours = np.array(palette.convert("RGB"))
    later = [Image.fromarray(255 - rgb)]
    yield Kind("GIF", "a.gif", encoded(palette, "GIF"), colours)
    frames = {"save_all": True, "append_images": [p.quantize(200) for p in later]}
    yield Kind("GIF, animated", "a.GIF", encoded(palette, "GIF", **frames), colours)
    frames = {"save_all": True, "append_images": later}
    yield Kind("WebP, animated", "a.webp", encoded(rgb, "WEBP", lossless=True, **frames), rgb)
    yield Kind("PNG, animated", "a.png", encoded(rgb, "PNG", **frames), rgb)
    data = encoded(rgb, "WEBP", quality=80)
    yield Kind("WebP", "a.webp", data, as_seen(data))
    data = encoded(rgb, "AVIF", quality=80)
    yield Kind("AVIF", "a.avif", data, as_seen(data))
    yield Kind("PPM", "a.ppm", encoded(rgb, "PPM"), rgb)
    yield Kind("BMP", "a.BMP", encoded(rgb, "BMP"), rgb)
    yield Kind("JPEG 2000", "a.jp2", encoded(rgb, "JPEG2000", irreversible=False), rgb)
    yield Kind("PNG, interlaced", "a.png", interlaced_png(rgb), rgb)
    png = encoded(rgb, "PNG")
    gamma = with_chunk(png, b"gAMA", struct.pack(">I", 100000))
    profile = encoded(rgb, "PNG", icc_profile=b"\0" * 200)
    yield Kind("PNG, gamma 1.0", "a.png", gamma, rgb)
    yield Kind("PNG, colour profile", "a.png", profile, rgb)
    notes = PngImagePlugin.PngInfo()
    notes.add_text("note", "x" * 3_000_000, zip=True)
    yield Kind("PNG, note of 3 MB", "a.png", encoded(rgb, "PNG", pnginfo=notes), rgb)
    planes = np.ascontiguousarray(rgb.transpose(2, 0, 1))
    data = tiff(planes, photometric="rgb", planarconfig="separate")
    yield Kind("TIFF, planar", "a.tif", data, rgb)
    yield Kind("BigTIFF", "a.tiff", tiff(rgb, photometric="rgb", bigtiff=True), rgb)
    yield Kind("TIFF, LZW", "a.tif", encoded(rgb, "TIFF", compression="tiff_lzw"), rgb)
    pages = tiff(np.stack((rgb, 255 - rgb)), photometric="rgb")
    yield Kind("TIFF, two pages", "a.tif", pages, rgb)
    data = tiff(np.repeat(rgb, 4, 1), photometric="rgb", tile=(16, 16), compression="zlib")
    yield Kind("TIFF, deflated tiles", "a.TIF", data, np.repeat(rgb, 4, 1))


def broken_kinds(rgb: np.ndarray) -> Iterator[Kind]:
    """What is no image, or only a part of one."""
    jpeg, png = encoded(rgb, "JPEG", quality=90), encoded(rgb, "PNG")
    unknown = "cannot identify image file"
    yield Kind("JPEG, truncated", "a.jpg", jpeg[: len(jpeg) * 3 // 4], "image file is truncated")
    yield Kind("JPEG, only a header", "a.jpg", jpeg[: len(jpeg) // 2], "Truncated File Read")
    yield Kind("PNG, truncated", "a.png", png[: len(png) // 2], "truncated|[Bb]roken PNG")
    half = encoded(rgb, "TIFF")[: HEIGHT * WIDTH]
    yield Kind("TIFF, truncated", "a.tif", half, "a.tif: .+")
    webp = encoded(rgb, "WEBP", lossless=True)
    yield Kind("WebP, truncated", "a.webp", webp[: len(webp) // 2], "a.webp: .+")
    yield Kind("no bytes", "a.jpg", b"", "the file is empty")
    yield Kind("text", "a.jpg", b"not an image at all", unknown)
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64
    yield Kind("HEIC called .jpg", "a.jpg", heic, f"{unknown}.*HEIC photo: store it as JPEG")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    yield Kind("Git LFS pointer", "a.png", pointer, f"{unknown}.*git lfs pull")
    yield Kind("web page", "a.jpg", b"<!doctype html><html>404", f"{unknown}.*a web page")


def kinds() -> list[Kind]:
    """All kinds."""
    rgb = photo(HEIGHT, WIDTH)
    groups = (jpeg_kinds, turned_kinds, alpha_kinds, deep_kinds, other_kinds, broken_kinds)
    return [kind for group in groups for kind in group(rgb)]


@DATASETS.register_module()
class _OneFile(BaseDataset):
    def load_data_list(self) -> list[dict]:
        return [{"img_path": self.ann_file}]


def _listed(path: Path) -> np.ndarray:
    listing = path.parent / "list.txt"
    listing.write_bytes(os.fsencode(path.name) + b"\n")
    return ImageList(str(listing)).load_image(0)


def _in_class_folder(path: Path) -> np.ndarray:
    pipeline = [{"type": "LoadMissingImage"}]
    folder = path.parent.parent
    data = ClassificationFolder(
        str(folder.parent), folder.name, pipeline=pipeline, serialize_data=False
    )
    return data[0]["img"][..., ::-1]


def _by_name(path: Path) -> np.ndarray:
    """As the folders of segmentation and depth find and load it."""
    found = files_by_name(path.parent, image_extensions())[path.stem]
    return LoadMissingImage(to_float32=True)({"img_path": found})["img"][..., ::-1]


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except Exception as error:
        raise NotOpenedError from error


class NotOpenedError(Exception):
    """PIL itself does not open a file: there is no PIL image to hand over."""


def _tensor(image: Any) -> np.ndarray:
    return load_pixels(image, read_image).permute(1, 2, 0).numpy()


def _predicted(image: Any) -> np.ndarray:
    return next(iter(iterate_images(image))).pixels


Route = Callable[[Path], np.ndarray]
ROUTES: dict[str, Route] = {
    "folder": lambda path: ImageFolder(str(path.parent)).load_image(0),
    "list": _listed,
    "MM set": lambda path: MMDatasetSource(
        _OneFile(ann_file=str(path), serialize_data=False)
    ).load_image(0),
    "extract files": lambda path: ImageFiles([str(path)]).load_image(0),
    "extract path": lambda path: _tensor(path),
    "extract PIL": lambda path: _tensor(_opened(path)),
    "predict file": lambda path: _predicted(path),
    "predict folder": lambda path: _predicted(path.parent),
    "predict PIL": lambda path: _predicted(_opened(path)),
    "pipeline": lambda path: LoadMissingImage()({"img_path": str(path)})["img"][..., ::-1],
    "class folders": lambda path: _in_class_folder(path),
    "paired folders": _by_name,
}


class Cell(NamedTuple):
    """Outcome of a kind on a route: largest difference, or the message of a refusal."""

    difference: int | None
    message: str


def outcome(kind: Kind, route: Route, folder: Path) -> Cell:
    """Read a kind on a route; both empty where PIL has no image to hand over."""
    # One folder below another: a class for the route of class folders.
    path = folder / "class" / kind.file
    path.parent.mkdir(parents=True)
    path.write_bytes(kind.data)
    try:
        pixels = route(path)
    except NotOpenedError:
        return Cell(None, "")
    except ValueError as error:
        return Cell(None, str(error).replace(f"{path.parent}{os.sep}", ""))
    if isinstance(kind.expected, str) or pixels.shape != kind.expected.shape:
        return Cell(256, f"gave {pixels.shape}")
    return Cell(int(np.abs(pixels.astype(int) - kind.expected).max()), "")


def is_right(kind: Kind, cell: Cell, route: str) -> bool:
    """Whether a cell is as expected."""
    if kind.pil and "PIL" in route:
        return re.search(kind.pil, cell.message) is not None
    if cell == Cell(None, ""):
        return True
    if isinstance(kind.expected, str):
        return cell.difference is None and re.search(kind.expected, cell.message) is not None
    return cell.difference == 0


def print_left_out(folder: Path) -> None:
    """What a folder and bad lists say."""
    image = encoded(photo(HEIGHT, WIDTH), "PNG")
    for name in ("a.png", "sub/b.PNG", "__MACOSX/a.png", ".ipynb_checkpoints/a.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(image)
    for name in ("._a.png", ".DS_Store", "Thumbs.db", "IMG_1.HEIC", "sub/IMG_2.heic", "notes.txt"):
        (folder / name).write_bytes(b"x")
    (folder / "sub/loop").symlink_to(folder)
    print(f"  {len(ImageFolder(str(folder)))} images taken; the line of the log is above")
    for text in ("path, label\na.png, -1\n", "path,label\na.png,\n", 'path\n"a.png\n'):
        (folder / "list.csv").write_text(text)
        try:
            ImageList(str(folder / "list.csv"))
        except ValueError as error:
            print(f"  {text!r}: {error}")
    (folder / "list.csv").write_bytes("path\na.png\n".encode("utf-16-le"))
    try:
        ImageList(str(folder / "list.csv"))
    except ValueError as error:
        print(f"  UTF-16 without its mark: {error}")


def main() -> int:
    """Print the table; the number of wrong cells."""
    wrong, messages, counts = 0, {}, {}
    columns = "  ".join(ROUTES)
    print(f"{'kind':32}  {columns}")
    with tempfile.TemporaryDirectory() as folder:
        for number, kind in enumerate(kinds()):
            cells = []
            for name, route in ROUTES.items():
                cell = outcome(kind, route, Path(folder, f"{number}-{len(cells)}", "data"))
                right = is_right(kind, cell, name)
                wrong += not right
                text = "-" if cell == Cell(None, "") else "refused"
                text = text if cell.difference is None else str(cell.difference)
                counts[text] = counts.get(text, 0) + 1
                cells.append((text if right else f"!{text}").center(len(name)))
                if cell.message:
                    messages.setdefault((kind.name, cell.message), name)
            print(f"{kind.name:32}  {'  '.join(cells)}", flush=True)
    print("\nRefusals, word for word (the first route that gave them):")
    for (kind_name, message), route_name in messages.items():
        print(f"  {kind_name} [{route_name}]: {message}")
    print("\nLeft out, and refused lists:")
    with tempfile.TemporaryDirectory() as folder:
        print_left_out(Path(folder))
    print(f"\n{wrong} wrong cells; {counts.pop('-', 0)} without a PIL image; the others: {counts}")
    return wrong


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))

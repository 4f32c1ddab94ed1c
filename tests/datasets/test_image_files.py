"""What folders and lists take and leave out, the same on every route, and what they say."""

import os

import numpy as np
import pytest
from PIL import Image

from dinov3_mm.apis.deployment.check import find_images
from dinov3_mm.apis.prediction.inputs import iterate_images
from dinov3_mm.datasets import ClassificationFolder, ImageFolder, ImageList
from dinov3_mm.datasets.depth import DepthFolderDataset
from dinov3_mm.datasets.image_files import (
    IMAGE_EXTENSIONS,
    LeftOut,
    files_by_name,
    image_extensions,
)
from tests.datasets.photos import photo

WANTED = ("a.jpg", "b.PNG", "sub/c.webp", "linked/d.png", "e.png", "sub/deep/f.Tiff")
LITTER = (
    *("._a.jpg", ".DS_Store", "Thumbs.db", "sub/._c.webp", ".hidden/x.png", "sub/desktop.ini"),
    *(".ipynb_checkpoints/a-checkpoint.jpg", "__MACOSX/a.jpg", "sub/@eaDir/c.webp/SYNO_XL.jpg"),
)
OTHERS = ("notes.txt", "sub/IMG_1.HEIC", "sub/IMG_2.heic", "labels", "clip.mp4")


def touch(path, image=True):
    path.parent.mkdir(parents=True, exist_ok=True)
    if image:
        Image.fromarray(photo(16, 16)).save(path)
    else:
        path.write_bytes(b"x")


@pytest.fixture
def root(tmp_path):
    """Wanted files, two of them through links, and everything else that lies in folders."""
    root = tmp_path / "root"
    for name in WANTED:
        if name not in ("linked/d.png", "e.png"):
            touch(root / name)
    touch(tmp_path / "elsewhere/d.png")
    touch(tmp_path / "elsewhere2/e.png")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "e.png").symlink_to(tmp_path / "elsewhere2/e.png")
    (root / "sub/loop").symlink_to(root)
    for name in LITTER:
        touch(root / name, image=False)
    for name in OTHERS:
        touch(root / name, image=False)
    return root


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(
        "dinov3_mm.datasets.image_files.print_log", lambda line, **_: lines.append(line)
    )
    return lines


def pair(root):
    """A depth map for every image."""
    maps = root.parent / "depth"
    for name in WANTED:
        touch((maps / name).with_suffix(".png"))
    data = DepthFolderDataset(
        data_root=str(root.parent), data_prefix={"img_path": "root", "depth_map_path": "depth"}
    )
    return [data[index]["img_path"] for index in range(len(data))]


SEARCHES = {
    "pretraining": lambda root: [
        s.path(i) for s in [ImageFolder(str(root))] for i in range(len(s))
    ],
    "prediction": lambda root: [str(root / image.name) for image in iterate_images(root)],
    "pairs": lambda root: list(files_by_name(root, image_extensions()).values()),
    "depth": pair,
}


@pytest.mark.parametrize("route", SEARCHES)
def test_every_route_takes_the_same_files(root, route, said):
    found = SEARCHES[route](root)
    assert sorted(os.path.relpath(path, root) for path in found) == sorted(WANTED)
    (line,) = (line for line in said if line.startswith(f"{root}: "))
    parts = line.removeprefix(f"{root}: 6 files; left out ").split(", ")
    assert parts[0] == "2 .heic (e.g. sub/IMG_1.HEIC)"
    assert set(parts[1:4]) == {
        "1 .mp4 (clip.mp4)",
        "1 .txt (notes.txt)",
        "1 without ending (labels)",
    }
    assert parts[4].startswith("9 hidden (e.g. ")
    assert parts[5] == (
        "1 reached twice (sub/loop). .heic cannot be decoded: store them as JPEG or PNG"
    )


def test_classes_are_visible_folders(root, said):
    for entry in (*root.glob("*.*"), root / "labels"):
        if not entry.is_dir():
            entry.unlink()
    data = ClassificationFolder(str(root.parent), "root")
    assert data.metainfo["classes"] == ("linked", "sub") == ImageFolder(str(root)).classes
    assert [data[index]["gt_label"] for index in range(len(data))] == [0, 1, 1]
    assert "hidden" in said[0]
    renamed = ClassificationFolder(
        str(root.parent), "root", metainfo={"classes": ("one", "two")}, lazy_init=True
    )
    assert renamed.metainfo["classes"] == ("one", "two")
    with pytest.raises(ValueError, match=r"metainfo\.classes has no such class.*here: linked, sub"):
        ClassificationFolder(str(root.parent), "root", metainfo={"classes": ("one",)})
    touch(root / "stray.png")
    with pytest.raises(ValueError, match=r"images outside of class folders, e\.g\. .*stray\.png"):
        ClassificationFolder(str(root.parent), "root")


def test_nothing_but_what_cannot_be_decoded(tmp_path):
    touch(tmp_path / "a.heic", image=False)
    touch(tmp_path / "b.CR2", image=False)
    message = (
        r"no image below .*; left out 1 \.heic \(a\.heic\), 1 \.cr2 \(b\.CR2\)\. "
        r"\.heic, \.cr2 cannot be decoded: store them as JPEG or PNG"
    )
    with pytest.raises(ValueError, match=message):
        ImageFolder(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no images under .*left out 1 \.heic"):
        find_images([tmp_path])


def test_what_pil_learns_to_read_is_taken(tmp_path, monkeypatch):
    assert ".heic" not in image_extensions() and ".jpg" in IMAGE_EXTENSIONS
    monkeypatch.setitem(Image.EXTENSION, ".heic", "PNG")  # as a plug-in registers its endings
    touch(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.heic")
    assert len(ImageFolder(str(tmp_path))) == 1


def test_links_to_nothing_are_named_when_they_are_read(tmp_path):
    touch(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "c.png")  # reading it would wait for ever
    source = ImageFolder(str(tmp_path))
    assert len(source) == 2
    with pytest.raises(ValueError, match=r"b\.png: No such file"):
        source.load_image(1)


def test_equal_names_are_refused(tmp_path):
    touch(tmp_path / "a.png")
    touch(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="have the same name; rename one of them"):
        files_by_name(tmp_path, image_extensions())


def test_few_of_many_endings_are_shown():
    left_out = LeftOut()
    assert not left_out
    for number in range(9):
        for copy in range(9 - number):
            left_out.add_file(f"{copy}.{number}")
    assert str(left_out).endswith("4 .5 (e.g. 0.5), 6 of other endings")


TABLE = "path, label\r\na.png, dog\r\n\r\n b.png ,cat\r\n"


@pytest.mark.parametrize(
    "data",
    [
        TABLE.encode(),
        TABLE.encode("utf-8-sig"),
        TABLE.encode("utf-16"),
        b"\xfe\xff" + TABLE.encode("utf-16-be"),
        TABLE.replace(",", ";").encode(),
        TABLE.replace(",", "\t").encode(),
        TABLE.replace("\r\n", "\n").encode(),
        TABLE.replace("\r\n", "\r").encode(),
        TABLE.replace("path", '"Path"').replace("a.png", '"a.png"').encode(),
        b"label,path,more\ndog,a.png,1\ncat,b.png,2\n",
    ],
)
@pytest.mark.parametrize("name", ["list.csv", "list.txt"])
def test_tables(tmp_path, data, name):
    (tmp_path / name).write_bytes(data)
    source = ImageList(str(tmp_path / name))
    assert [source.path(index) for index in range(2)] == [
        str(tmp_path / "a.png"),
        str(tmp_path / "b.png"),
    ]
    assert source.classes == ("cat", "dog") and [source.label(0), source.label(1)] == [1, 0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_plain_lists(tmp_path, encoding):
    (tmp_path / "list.txt").write_bytes("caf\xe9/a, b.png\r\n\r\nc.png".encode(encoding))
    source = ImageList(str(tmp_path / "list.txt"))
    wanted = os.path.join(
        os.fsencode(tmp_path), b"caf\xe9" if encoding == "latin-1" else b"caf\xc3\xa9"
    )
    assert os.fsencode(source.path(0)) == wanted + b"/a, b.png" and len(source) == 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"path,label\na.png,-1\n", r"image 0 of .* \(a\.png\) has the label -1; labels are names"),
        (b"path,label\na.png,dog\nb.png,-1\n", r"image 1 .* \(b\.png\) has the label -1"),
        (b"path,label\na.png,-1.0\n", r"has the label -1\.0"),
        (b"path, label\na.png, \n", r"image 0 of .* \(a\.png\) has no label"),
        (b"path,label\na.png\n", r"image 0 of .* \(a\.png\) has no label"),
        (b'path,label\n"a.png,1\nb.png,2\n', r"list\.csv, line 3: unexpected end of data; put a"),
        ("path\na.png\n".encode("utf-16-le"), r"no text file .*null bytes\); store it in UTF-8"),
        ("path\na.png".encode("utf-16")[:-1], r"no text file .*truncated data\); store it in"),
    ],
)
def test_lists_that_are_refused(tmp_path, data, message):
    (tmp_path / "list.csv").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        ImageList(str(tmp_path / "list.csv"))


def test_class_numbers_stay(tmp_path):
    (tmp_path / "list.csv").write_text("path,label\na.png, 2\nb.png, 0\n")
    source = ImageList(str(tmp_path / "list.csv"))
    assert np.array_equal([source.label(0), source.label(1)], [2, 0])
    assert source.classes == ("0", "1", "2")

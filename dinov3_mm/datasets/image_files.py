"""Which files are images: endings, folders, and the text files that name them.

What is passed over is counted and said; hidden entries and what systems leave in folders are no
images on any route.
"""

import codecs
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from mmengine.logging import print_log
from PIL import Image, features

# Endings of what the decoder reads; PIL may have been built without the last ones.
_EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"),
    *(".gif", ".jfif", ".jpe", ".mpo", ".apng", ".dib", ".ppm", ".pgm", ".pbm", ".pnm"),
)
_OPTIONAL = {".avif": "avif", ".jp2": "jpg_2000", ".j2k": "jpg_2000"}
# An older PIL warns of features that it does not know of.
_FEATURES = {*features.modules, *features.codecs}
IMAGE_EXTENSIONS = _EXTENSIONS + tuple(
    extension for extension, name in _OPTIONAL.items() if name in _FEATURES and features.check(name)
)
# Images too, but not for this decoder, unless a plug-in of PIL reads them.
_FOREIGN_EXTENSIONS = (
    *(".heic", ".heif", ".hif", ".avif", ".jxl", ".jp2", ".j2k", ".psd", ".svg", ".eps"),
    *(".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2"),
)
# Copies, thumbnails and notes of operating systems and file servers, in any case.
_LITTER = ("thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin")
_SHOWN_ENDINGS = 6
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def image_extensions() -> tuple[str, ...]:
    """Endings that count as images in this process: the usual ones, and those of PIL's plug-ins."""
    known = Image.registered_extensions()
    plugged = (e for e in _FOREIGN_EXTENSIONS[:3] if known.get(e) in Image.OPEN)
    return (*IMAGE_EXTENSIONS, *plugged)


def is_hidden(name: str) -> bool:
    """Whether the name of a file or folder is hidden, or one of what systems leave behind."""
    return name.startswith(".") or name.lower() in _LITTER


class LeftOut:
    """Counts what a search for images passed over.

    Attributes:
        endings: number and an example of files by their ending.
        hidden: number and an example of hidden entries.
        repeated: number and an example of links to folders that were searched before.
    """

    def __init__(self) -> None:
        self.endings: dict[str, list] = {}
        self.hidden: list = [0, ""]
        self.repeated: list = [0, ""]

    def add_file(self, path: str) -> None:
        """A file whose ending is not one of those looked for."""
        _count(self.endings.setdefault(os.path.splitext(path)[1].lower(), [0, ""]), path)

    def add_hidden(self, path: str) -> None:
        """A hidden entry."""
        _count(self.hidden, path)

    def add_repeated(self, path: str) -> None:
        """A folder that was reached before by another path."""
        _count(self.repeated, path)

    def __bool__(self) -> bool:
        return bool(self.endings or self.hidden[0] or self.repeated[0])

    def __str__(self) -> str:
        order = sorted(self.endings, key=lambda ending: -self.endings[ending][0])
        parts = [_described(self.endings[e], e or "without ending") for e in order]
        if len(parts) > _SHOWN_ENDINGS:
            rest = sum(self.endings[ending][0] for ending in order[_SHOWN_ENDINGS:])
            parts = [*parts[:_SHOWN_ENDINGS], f"{rest} of other endings"]
        if self.hidden[0]:
            parts.append(_described(self.hidden, "hidden"))
        if self.repeated[0]:
            parts.append(_described(self.repeated, "reached twice"))
        undecodable = [e for e in order if _is_foreign(e)]
        advice = ""
        if undecodable:
            advice = f". {', '.join(undecodable)} cannot be decoded: store them as JPEG or PNG"
        return f"left out {', '.join(parts)}{advice}"

    def report(self, folder: str, found: int) -> None:
        """Say what was left out, if anything was."""
        if self:
            foreign = any(map(_is_foreign, self.endings))
            level = logging.WARNING if foreign else logging.INFO
            print_log(f"{folder}: {found} files; {self}", logger="current", level=level)


def find_files(
    root: str, extensions: Sequence[str], left_out: LeftOut, *, below: str = ""
) -> Iterator[str]:
    """Files with one of some endings below a folder, relative to it.

    A folder's own files come before those of its folders, each in sorted order. Links to files and
    folders are followed, to every folder once; hidden entries are passed over.

    Args:
        root: the folder.
        extensions: endings in lower case; those of the files may have any.
        left_out: counts what is passed over.
        below: look below this folder of ``root`` only.
    """
    yield from _find(root, below, tuple(extensions), left_out, {os.path.realpath(root)})


def find_by_class(
    root: str, extensions: Sequence[str], left_out: LeftOut
) -> tuple[list[str], list[str], Iterator[tuple[str, int]]]:
    """The files directly in a folder, its folders, and the files below those with their position.

    As :func:`find_files`; the iterator is to be used after the lists.
    """
    files, folders = _list_folder(root, "", tuple(extensions), left_out)
    seen = {os.path.realpath(root)}

    def below() -> Iterator[tuple[str, int]]:
        for number, folder in enumerate(folders):
            for path in _find(root, folder, tuple(extensions), left_out, seen):
                yield path, number

    return files, folders, below()


def files_by_name(folder: str | os.PathLike, extensions: Sequence[str]) -> dict[str, str]:
    """Paths of the files below a folder by their relative path without ending.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If two files have the same name.
    """
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder} is no folder")
    left_out, found = LeftOut(), {}
    for path in find_files(str(folder), extensions, left_out):
        name = Path(path).with_suffix("").as_posix()
        if name in found:
            raise ValueError(
                f"{os.path.join(folder, path)} and {found[name]} have the same name; rename one of "
                "them"
            )
        found[name] = os.path.join(folder, path)
    left_out.report(str(folder), len(found))
    return found


def open_text(path: str | os.PathLike, *, newline: str | None = None) -> IO[str]:
    """Open a text file in the encoding that its first bytes mark, else in UTF-8.

    Bytes that are no UTF-8 become surrogates, by which names of files in other encodings survive.
    """
    with open(path, "rb") as file:
        start = file.read(4)
    encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "utf-8-sig")
    errors = "surrogateescape" if encoding == "utf-8-sig" else "strict"
    return open(path, encoding=encoding, errors=errors, newline=newline)


def text_lines(file: IO[str], path: str | os.PathLike) -> Iterator[str]:
    """Lines of an opened text file; ValueError for one that is none."""
    try:
        for line in file:
            if "\0" in line:
                raise ValueError("it holds null bytes")
            yield line
    except ValueError as error:  # among them those of the decoder
        raise ValueError(
            f"{os.path.abspath(path)} is no text file that can be read ({error}); store it in UTF-8"
        ) from error


def _find(
    root: str, folder: str, extensions: tuple[str, ...], left_out: LeftOut, seen: set[str]
) -> Iterator[str]:
    if folder:
        real = os.path.realpath(os.path.join(root, folder))
        if real in seen:
            left_out.add_repeated(folder)
            return
        seen.add(real)
    files, folders = _list_folder(root, folder, extensions, left_out)
    yield from files
    for name in folders:
        yield from _find(root, name, extensions, left_out, seen)


def _list_folder(
    root: str, folder: str, extensions: tuple[str, ...], left_out: LeftOut
) -> tuple[list[str], list[str]]:
    """Files with a wanted ending and folders in a folder, sorted, relative to the root."""
    files, folders = [], []
    with os.scandir(os.path.join(root, folder)) as entries:
        for entry in entries:
            path = os.path.join(folder, entry.name)
            if is_hidden(entry.name):
                left_out.add_hidden(path)
            elif entry.is_dir():
                folders.append(path)
            elif entry.name.lower().endswith(extensions) and _is_file(entry):
                files.append(path)
            else:
                left_out.add_file(path)
    return sorted(files), sorted(folders)


def _is_file(entry: os.DirEntry) -> bool:
    """Whether it can be read as a file; a link to nothing is one that cannot, and is named then."""
    return entry.is_file() or entry.is_symlink()


def _is_foreign(ending: str) -> bool:
    return ending in _FOREIGN_EXTENSIONS and ending not in IMAGE_EXTENSIONS


def _count(entry: list, path: str) -> None:
    entry[0] += 1
    entry[1] = entry[1] or path


def _described(entry: list, what: str) -> str:
    number, example = entry
    return f"{number} {what} ({example})" if number == 1 else f"{number} {what} (e.g. {example})"

"""All images below a folder."""

import os
from collections.abc import Iterator, Sequence

from mmengine.registry import DATASETS

from dinov3_mm.datasets.sources.base import FileSource
from dinov3_mm.datasets.sources.decode import IMAGE_EXTENSIONS
from dinov3_mm.datasets.sources.pixel_format import UNCHANGED


@DATASETS.register_module()
class ImageFolder(FileSource):
    """Every image file below ``root``, in sorted order, whatever the layout.

    If no image lies directly in ``root``, the folders in ``root`` are classes: ``classes`` are
    their sorted names and ``label`` is the position of an image's folder among them. Names that
    begin with a dot are skipped; links to folders are followed once.

    Args:
        root (str): The folder.
        color (str): ``'rgb'``, ``'gray'`` (one channel), or ``'unchanged'`` for the channels and
            the precision of the files (TIFF, ``.npy`` and 16-bit PNG).
        decode_min_side (int | None): Decode large JPEGs at 1/2, 1/4 or 1/8 of their size as long as
            the shorter side keeps this many pixels, which is several times faster; None: at full
            size. For 224 px crops of at least 0.32 of the area 448 costs no sharpness.
        channels (Sequence[int] | None): With ``'unchanged'``: the channels to keep, counted from 0,
            in this order; None: all.
        value_range (tuple[float, float] | None): With ``'unchanged'``: the stored values that
            become 0 and 1 on the scale of mean and std; values outside are clipped. None: 0..255
            for 8-bit, 0..65535 for 16-bit, 0..1 for float pixels.
        extensions (tuple[str, ...] | None): File name endings that count as images, in any case;
            None: the usual ones, and ``.npy`` with ``'unchanged'``.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it holds no image.
    """

    def __init__(
        self,
        root: str,
        *,
        color: str = "rgb",
        decode_min_side: int | None = None,
        channels: Sequence[int] | None = None,
        value_range: tuple[float, float] | None = None,
        extensions: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(root, color, decode_min_side, channels=channels, value_range=value_range)
        if extensions is None:
            extensions = IMAGE_EXTENSIONS + ((".npy",) if color == UNCHANGED else ())
        if not os.path.isdir(self.root):
            what = "is not a folder" if os.path.exists(self.root) else "does not exist"
            raise FileNotFoundError(
                f"image folder {os.path.abspath(self.root)!r} {what}; set root to the folder that "
                "holds the images"
            )
        self.extensions = tuple(extension.lower() for extension in extensions)
        self._index()

    def _index(self) -> None:
        seen = {os.path.realpath(self.root)}
        files, folders = _list_folder(self.root)
        files = [name for name in files if self._is_image(name)]
        for name in files:
            self._paths.append(name)
        for label, folder in enumerate(folders):
            for path in self._walk(folder, seen):
                self._paths.append(path)
                if not files:
                    self._labels.append(label)
        if not self._paths:
            raise ValueError(
                f"no image below {os.path.abspath(self.root)!r}; looked for files that end in "
                f"{', '.join(self.extensions)}"
            )
        if not files:
            self.classes = tuple(folders)

    def _walk(self, folder: str, seen: set[str]) -> Iterator[str]:
        """Images below a folder, relative to the root."""
        real = os.path.realpath(os.path.join(self.root, folder))
        if real in seen:
            return
        seen.add(real)
        files, folders = _list_folder(os.path.join(self.root, folder))
        for name in files:
            if self._is_image(name):
                yield os.path.join(folder, name)
        for name in folders:
            yield from self._walk(os.path.join(folder, name), seen)

    def _is_image(self, name: str) -> bool:
        return name.lower().endswith(self.extensions)


def _list_folder(folder: str) -> tuple[list[str], list[str]]:
    """Sorted names of the files and of the folders in a folder."""
    files, folders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                (folders if entry.is_dir() else files).append(entry.name)
    return sorted(files), sorted(folders)

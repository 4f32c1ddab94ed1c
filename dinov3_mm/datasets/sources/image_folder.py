"""All images below a folder."""

import os
from collections.abc import Sequence

from mmengine.registry import DATASETS

from dinov3_mm.datasets.image_files import LeftOut, find_by_class, image_extensions
from dinov3_mm.datasets.multiband import UNCHANGED
from dinov3_mm.datasets.sources.base import FileSource


@DATASETS.register_module()
class ImageFolder(FileSource):
    """Every image file below ``root``, in sorted order, whatever the layout.

    If no image lies directly in ``root``, the folders in ``root`` are classes: ``classes`` are
    their sorted names and ``label`` is the position of an image's folder among them. Hidden
    entries and what operating systems leave behind are skipped; links are followed, to every folder
    once. The log says what was left out.

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
            None: those that the decoder reads, and ``.npy`` with ``'unchanged'``.

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
            extensions = image_extensions() + ((".npy",) if color == UNCHANGED else ())
        if not os.path.isdir(self.root):
            what = "is not a folder" if os.path.exists(self.root) else "does not exist"
            raise FileNotFoundError(
                f"image folder {os.path.abspath(self.root)!r} {what}; set root to the folder that "
                "holds the images"
            )
        self.extensions = tuple(extension.lower() for extension in extensions)
        self._index()

    def _index(self) -> None:
        left_out = LeftOut()
        files, folders, below = find_by_class(self.root, self.extensions, left_out)
        for path in files:
            self._paths.append(path)
        for path, label in below:
            self._paths.append(path)
            if not files:
                self._labels.append(label)
        if not self._paths:
            raise ValueError(
                f"no image below {os.path.abspath(self.root)!r}; looked for files that end in "
                f"{', '.join(self.extensions)}" + (f"; {left_out}" if left_out else "")
            )
        left_out.report(self.root, len(self._paths))
        if not files:
            self.classes = tuple(folders)
        self._beside = len(files), len(folders)

    @property
    def stray(self) -> str:
        """An image that lies directly in the folder; empty if there is none."""
        return self.path(0) if self._beside[0] else ""

    def label(self, index: int) -> int:
        """Class of an image; ValueError if the source has no labels."""
        num_files, num_folders = self._beside
        if num_files and num_folders:
            raise ValueError(
                f"ImageFolder of {self.root} has no labels: {num_folders} folders and {num_files} "
                f"images beside them, e.g. {self.stray}; folders are classes where no image lies "
                "beside them"
            )
        return super().label(index)

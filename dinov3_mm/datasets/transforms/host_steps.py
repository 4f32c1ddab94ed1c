"""Steps of the hosts' pipelines: images and label maps read as everywhere else, colour changes."""

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from mmengine import fileio
from mmengine.logging import MMLogger
from mmengine.registry import TRANSFORMS
from torchvision.transforms.v2 import functional as F

from dinov3_mm.datasets.images import BrokenImageError, decode_oriented, turned
from dinov3_mm.datasets.multiband import decode_map
from dinov3_mm.errors import hint

# --- The first steps of the hosts' pipelines: images and label maps, read as everywhere else ---
#
# In place of the hosts' ``LoadImageFromFile`` and ``LoadAnnotations``, whose pixels depend on the
# decoder that is chosen, and which do not name a file that they cannot read.


ORIENTATION = "exif_orientation"
BROKEN_MODES = ("error", "replace")
_MAX_IN_A_ROW = 50
# Counters, so that worker processes need no lock; those of more workers share some.
_COUNTERS = 64
_IGNORED = 255
_SHOWN_COLORS = 4

Palette = Sequence[int | Sequence[int]]


class UnreadableFiles:
    """What a loading step does about a file that cannot be read.

    Args:
        broken: 'error' raises the error, which names the file. 'replace' logs it once, counts it
            over all workers, and gives None, for which a data set of MMEngine draws another sample
            in training: a few damaged files do not end a run of days. An evaluation takes 'error':
            a score over fewer images is no score.
    """

    def __init__(self, broken: str) -> None:
        if broken not in BROKEN_MODES:
            raise ValueError(f"broken is {broken!r}; {hint(str(broken), BROKEN_MODES)}")
        self.broken = broken
        self._counts = torch.zeros(_COUNTERS, dtype=torch.int64).share_memory_()
        self._logged: set[str] = set()
        self._in_a_row = 0

    @property
    def count(self) -> int:
        """Replacements so far in this process and its workers."""
        return int(self._counts.sum())

    def loaded(self) -> None:
        """A file could be read."""
        self._in_a_row = 0

    def handle(self, error: BrokenImageError) -> None:
        """Raise or log; RuntimeError after many files in a row."""
        if self.broken == "error":
            raise error
        worker = torch.utils.data.get_worker_info()
        self._counts[0 if worker is None else (worker.id + 1) % _COUNTERS] += 1
        self._in_a_row += 1
        if str(error) not in self._logged:
            self._logged.add(str(error))
            # MMEngine shows warnings of rank 0 only; each rank reads other files.
            MMLogger.get_current_instance().error(
                f"unreadable image replaced ({self.count} so far): {error}"
            )
        if self._in_a_row > _MAX_IN_A_ROW:
            raise RuntimeError(
                f"{self._in_a_row} images in a row could not be read, the last one {error}; check "
                "that the files are there and are images"
            ) from error


@TRANSFORMS.register_module()
class LoadMissingImage:
    """Adds ``img`` (H, W, 3), BGR, uint8, from ``img_path``, unless the sample has it.

    So one pipeline serves image files and samples that bring their image. Where the image was
    turned, ``exif_orientation`` says how, for the steps that load maps that belong to it.

    Args:
        to_float32: give float32.
        broken: 'error' or 'replace', see :class:`UnreadableFiles`.
        backend_args: passed on to :func:`mmengine.fileio.get`.

    Raises:
        BrokenImageError: on use, if a file cannot be read, or if boxes were drawn on its pixels as
            they are stored, not as they are seen.
    """

    def __init__(
        self, *, to_float32: bool = False, broken: str = "error", backend_args: dict | None = None
    ) -> None:
        self.to_float32 = to_float32
        self.backend_args = backend_args
        self.unreadable = UnreadableFiles(broken)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | None:
        if "img" in results:
            return results
        path = results["img_path"]
        try:
            pixels, orientation = decode_oriented(get_bytes(path, self.backend_args), str(path))
            if "instances" in results:
                _check_frame(results, pixels.shape[:2], orientation)
        except BrokenImageError as error:
            return self.unreadable.handle(error)
        self.unreadable.loaded()
        image = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
        results["img"] = image.astype(np.float32) if self.to_float32 else image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        if orientation != 1:
            results[ORIENTATION] = orientation
        return results

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(to_float32={self.to_float32}, "
            f"broken={self.unreadable.broken!r}, backend_args={self.backend_args})"
        )


@TRANSFORMS.register_module()
class LoadLabelMap:
    """Adds ``gt_seg_map`` (H, W), uint8, from ``seg_map_path``, unless the sample has it.

    Takes the place of mmseg's ``LoadAnnotations``. Values are those of the file, of a palette the
    indices; three equal channels are one. With ``palette`` the colours of the file are looked up in
    it instead, whether it stores them by pixel or in a palette of its own; a grey ``v`` is the
    colour ``(v, v, v)``. Alpha is dropped if it is the same everywhere. A map of the size of the
    stored image is turned with it, one that only fits the turned image stays.

    Args:
        reduce_zero_label: label 0 becomes 255, n becomes n - 1; None as the data set says.
        palette: colour (red, green, blue) of each class, or its grey, in the order of the classes;
            None as the data set says (``label_colors`` of a sample), or the values are labels.
        ignored_colors: colours that become 255, such as that of borders.
        broken: 'error' or 'replace', see :class:`UnreadableFiles`.
        backend_args: passed on to :func:`mmengine.fileio.get`.

    Raises:
        BrokenImageError: on use, if a file cannot be read.
        ValueError: if the palette is none; on use, if a file is no label map, holds a colour that
            the palette lacks, or does not have the size of the image.
    """

    def __init__(
        self,
        *,
        reduce_zero_label: bool | None = None,
        palette: Palette | None = None,
        ignored_colors: Palette = (),
        broken: str = "error",
        backend_args: dict | None = None,
    ) -> None:
        self.reduce_zero_label = reduce_zero_label
        self.palette = None if palette is None else as_colors(palette, ignored_colors)
        if palette is None and ignored_colors:
            raise ValueError("LoadLabelMap: ignored_colors needs palette, the colours of classes")
        self.backend_args = backend_args
        self.unreadable = UnreadableFiles(broken)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | None:
        if "gt_seg_map" in results or "seg_map_path" not in results:
            return results
        path = results["seg_map_path"]
        try:
            stored = self.read(results)
        except BrokenImageError as error:
            return self.unreadable.handle(error)
        self.unreadable.loaded()
        labels = fit_map(stored, path, results)
        results["gt_seg_map"] = self.table(results)[labels]
        results["seg_fields"] = [*results.get("seg_fields", []), "gt_seg_map"]
        return results

    def read(self, results: Mapping[str, Any]) -> np.ndarray:
        """Labels (H, W), uint8, of a sample's file, before :meth:`table`; raises as on use."""
        path = results["seg_map_path"]
        colors = self.palette or results.get("label_colors")
        data = get_bytes(path, self.backend_args)
        stored = _flat(decode_map(data, str(path), palette=colors is None), path)
        if colors is not None:
            return _looked_up(stored, colors, path)
        _check_labels(stored, path)
        return stored.astype(np.uint8)

    def table(self, results: Mapping[str, Any]) -> np.ndarray:
        """(256,) label of training for each stored one."""
        stated = results.get("reduce_zero_label", False)
        reduce = stated if self.reduce_zero_label is None else self.reduce_zero_label
        if reduce != stated:
            raise ValueError(
                f"the data set says reduce_zero_label={stated}, LoadLabelMap {reduce}; set it in "
                "the data set alone"
            )
        labels = np.arange(256, dtype=np.uint8)
        table = labels.copy()
        if reduce:
            table[1:-1] -= 1
            table[0] = _IGNORED
        mapped = labels.copy()
        for old, new in (results.get("label_map") or {}).items():
            mapped[old] = new
        return mapped[table]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(reduce_zero_label={self.reduce_zero_label}, "
            f"palette={self.palette}, broken={self.unreadable.broken!r}, "
            f"backend_args={self.backend_args})"
        )


def as_colors(palette: Palette, ignored: Palette = ()) -> dict[tuple[int, int, int], int]:
    """Label of each colour (red, green, blue): its place in the palette, 255 for ignored ones.

    Args:
        palette: colours, or greys, in the order of the classes.
        ignored: colours of no class.

    Raises:
        ValueError: If an entry is no colour, or is there twice.
    """
    labels: dict[tuple[int, int, int], int] = {}
    entries = [*enumerate(palette), *((_IGNORED, entry) for entry in ignored)]
    for label, entry in entries:
        color = (entry,) * 3 if isinstance(entry, int) else tuple(entry)
        if len(color) != 3 or not all(isinstance(v, int) and 0 <= v < 256 for v in color):
            raise ValueError(
                f"the palette holds {entry!r}; expected [red, green, blue] or a grey of each class,"
                " from 0 to 255"
            )
        if color in labels:
            raise ValueError(f"the palette holds {color} twice; a colour stands for one class")
        labels[color] = label
    return labels


def get_bytes(path: str, backend_args: dict | None = None) -> bytes:
    """Content of a file behind any of MMEngine's file backends; BrokenImageError without it."""
    try:
        return fileio.get(path, backend_args=backend_args)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BrokenImageError(str(path), reason) from error


def fit_map(values: np.ndarray, path: str, results: dict[str, Any]) -> np.ndarray:
    """A label or depth map (H, W) that belongs to the image of a sample, as that is seen.

    A map of the size of the image's stored pixels is turned with them: so label maps are made by
    programs that do not know of the EXIF orientation. One that only fits the turned image was drawn
    on that, and stays.

    Raises:
        ValueError: If it fits neither.
    """
    size = tuple(results.get("ori_shape", values.shape)[:2])
    orientation = results.get(ORIENTATION, 1)
    stored = size[::-1] if orientation > 4 else size
    if values.shape == stored:
        return turned(values, orientation)
    if values.shape == size:
        return values
    raise ValueError(
        f"{path} has {values.shape[0]} x {values.shape[1]} pixels, its image "
        f"{results['img_path']} has {size[0]} x {size[1]}; expected the same"
    )


def _flat(stored: np.ndarray, path: str) -> np.ndarray:
    """(H, W), or (H, W, 3) for colours; without alpha."""
    if stored.ndim == 3 and stored.shape[2] in (2, 4):
        alpha = stored[..., -1]
        if alpha.min() != alpha.max():
            raise ValueError(
                f"{path} has an alpha channel from {alpha.min()} to {alpha.max()}: what is labelled"
                " where it is transparent is not clear; store it without alpha, the transparent "
                "parts in the colour of their class"
            )
        stored = stored[..., 0] if stored.shape[2] == 2 else stored[..., :3]
    if stored.ndim == 3 and stored.shape[2] in (1, 3):
        first = stored[..., :1]
        if np.array_equal(stored, np.broadcast_to(first, stored.shape)):
            return stored[..., 0]
    return stored


def _looked_up(
    stored: np.ndarray, colors: Mapping[tuple[int, int, int], int], path: str
) -> np.ndarray:
    """Labels (H, W), uint8, of the colours of a map."""
    if stored.dtype == bool:
        stored = stored.astype(np.uint8) * 255
    if stored.dtype.kind not in "ui" or (stored.ndim, stored.shape[2:]) not in ((2, ()), (3, (3,))):
        raise ValueError(
            f"{path} holds {stored.dtype.name} values of the shape {stored.shape}; a palette is for"
            " colours or greys of 8 bits"
        )
    parts = stored.astype(np.int64)
    codes = parts * 0x010101 if stored.ndim == 2 else parts @ np.array([0x10000, 0x100, 1])
    if stored.ndim == 2:  # a wider grey would be the code of a colour
        codes[(parts < 0) | (parts > _IGNORED)] = -1
    known = {red << 16 | green << 8 | blue: label for (red, green, blue), label in colors.items()}
    order = np.array(sorted(known))
    place = np.searchsorted(order, codes).clip(max=len(order) - 1)
    unknown = order[place] != codes
    if unknown.any():
        raise ValueError(
            f"{path} holds colours that the palette does not name: {_colors(stored, unknown)}; add "
            "them to palette, or to ignored_colors if they are no class"
        )
    return np.array([known[code] for code in order], np.uint8)[place]


def _colors(stored: np.ndarray, where: np.ndarray) -> str:
    """The most frequent colours of a map where a mask holds, with their share of the map."""
    chosen = stored[where]
    values, counts = np.unique(chosen, axis=0, return_counts=True)
    order = np.argsort(-counts)
    shown = ", ".join(
        f"{values[i].tolist()} ({counts[i] / where.size:.1%})" for i in order[:_SHOWN_COLORS]
    )
    rest = len(values) - _SHOWN_COLORS
    return shown + (f" and {rest} more" if rest > 0 else "")


def _check_labels(values: np.ndarray, path: str) -> None:
    if values.ndim == 3 and values.shape[2] == 3:
        every = np.ones(values.shape[:2], bool)
        raise ValueError(
            f"{path} holds colours: {_colors(values, every)}; a label map has one channel with the "
            "class of each pixel. Give the colours in the order of the classes: "
            "palette=[[R, G, B], ...] of SegmentationFolder or LoadLabelMap, in training, "
            "validation and test"
        )
    if values.ndim != 2:
        raise ValueError(
            f"{path} has the shape {values.shape}; a label map has one channel (H, W) with the "
            "class of each pixel"
        )
    if values.dtype.kind not in "bui":
        raise ValueError(f"{path} holds {values.dtype.name} values; labels are whole numbers")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > _IGNORED:
        raise ValueError(
            f"{path} holds labels from {low} to {high}; expected 0 to {_IGNORED}, which is ignored:"
            " number the classes from 0, and store what belongs to none as 255"
        )


def _check_frame(results: dict[str, Any], size: tuple[int, int], orientation: int) -> None:
    """Refuse boxes whose file states the size of the stored image where the image is turned."""
    annotated = (results.get("height"), results.get("width"))
    if orientation > 4 and annotated == size[::-1] and annotated != size:
        raise BrokenImageError(
            str(results["img_path"]),
            f"its EXIF orientation {orientation} turns it to {size[1]}x{size[0]}, and the "
            f"annotation file says {size[0]}x{size[1]}: boxes on the stored pixels do not fit the "
            "image that is seen; store it upright",
        )


# --- Colour changes of images for dense heads, as in DINOv3's linear segmentation protocol ---


@TRANSFORMS.register_module()
class DINOv3PhotoMetricDistortion:
    """Brightness, contrast, saturation and hue, each changed with probability one half.

    Contrast comes before or after saturation and hue, by a coin. Between the steps values are
    clipped and truncated to uint8. mmseg's ``PhotoMetricDistortion`` has the same course; this one
    turns hue through the full circle in place of a tenth of it, and changes saturation by blending
    with the grey image.

    Args:
        brightness_delta: largest amount that is added, in grey levels.
        contrast_range: factors of the values.
        saturation_range: factors of the distance to grey.
        hue_delta: largest turn, as a share of the circle; at most 0.5.

    Raises:
        ValueError: If ``hue_delta`` is not in 0..0.5 or a range does not ascend from 0.
    """

    def __init__(
        self,
        *,
        brightness_delta: float = 32.0,
        contrast_range: tuple[float, float] = (0.5, 1.5),
        saturation_range: tuple[float, float] = (0.5, 1.5),
        hue_delta: float = 0.5,
    ) -> None:
        for name, (low, high) in (("contrast", contrast_range), ("saturation", saturation_range)):
            if not 0 <= low <= high:
                raise ValueError(f"{name}_range is {(low, high)}; expected 0 <= low <= high")
        if not 0 <= hue_delta <= 0.5:
            raise ValueError(f"hue_delta is {hue_delta}; expected 0 to 0.5, a share of the circle")
        self.brightness_delta = brightness_delta
        self.contrast_range = tuple(contrast_range)
        self.saturation_range = tuple(saturation_range)
        self.hue_delta = hue_delta

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Change ``results['img']``, an image (H, W, 3) of uint8, channels blue, green, red.

        Raises:
            ValueError: If it is another kind of image.
        """
        image = results["img"]
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(
                f"DINOv3PhotoMetricDistortion got {image.dtype} of shape {image.shape}; expected "
                "uint8 (H, W, 3). Leave it out for images of other kinds"
            )
        delta = self._draw(-self.brightness_delta, self.brightness_delta)
        contrast = self._draw(*self.contrast_range)
        first = bool(np.random.randint(2))
        saturation = self._draw(*self.saturation_range)
        hue = self._draw(-self.hue_delta, self.hue_delta)
        image = _affine(image, 1.0, delta)
        if first:
            image = _affine(image, contrast, None)
        image = _colours(image, saturation, hue)
        if not first:
            image = _affine(image, contrast, None)
        results["img"] = image
        return results

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(brightness_delta={self.brightness_delta}, "
            f"contrast_range={self.contrast_range}, saturation_range={self.saturation_range}, "
            f"hue_delta={self.hue_delta})"
        )

    @staticmethod
    def _draw(low: float, high: float) -> float | None:
        """A number between two, or None half of the time."""
        return np.random.uniform(low, high) if np.random.randint(2) else None


def _affine(image: np.ndarray, factor: float | None, offset: float | None) -> np.ndarray:
    """``image * factor + offset``; None leaves one out, and both leave the image."""
    if factor in (None, 1.0) and offset is None:
        return image
    values = image.astype(np.float32) * (1.0 if factor is None else factor) + (offset or 0.0)
    return np.clip(values, 0, 255).astype(np.uint8)


def _colours(image: np.ndarray, saturation: float | None, hue: float | None) -> np.ndarray:
    """Saturation, then hue."""
    if saturation is None and hue is None:
        return image
    rgb = torch.from_numpy(np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1)))
    if saturation is not None:
        rgb = F.adjust_saturation(rgb, saturation)
    if hue is not None:
        rgb = F.adjust_hue(rgb, hue)
    return np.ascontiguousarray(rgb.numpy().transpose(1, 2, 0)[..., ::-1])

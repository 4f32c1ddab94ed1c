"""The first steps of the hosts' pipelines: images and label maps, read as everywhere else.

In place of the hosts' ``LoadImageFromFile`` and ``LoadAnnotations``, whose pixels depend on the
decoder that is chosen, and which do not name a file that they cannot read.
"""

from typing import Any

import cv2
import numpy as np
import torch
from mmengine import fileio
from mmengine.logging import MMLogger
from mmengine.registry import TRANSFORMS

from dinov3_mm.datasets.images import BrokenImageError, decode_oriented, turned
from dinov3_mm.datasets.multiband import decode_map
from dinov3_mm.suggest import hint

ORIENTATION = "exif_orientation"
BROKEN_MODES = ("error", "replace")
_MAX_IN_A_ROW = 50
# Counters, so that worker processes need no lock; those of more workers share some.
_COUNTERS = 64
_IGNORED = 255


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
    indices. A map of the size of the stored image is turned with it, one that only fits the turned
    image stays.

    Args:
        reduce_zero_label: label 0 becomes 255, n becomes n - 1; None as the data set says.
        broken: 'error' or 'replace', see :class:`UnreadableFiles`.
        backend_args: passed on to :func:`mmengine.fileio.get`.

    Raises:
        BrokenImageError: on use, if a file cannot be read.
        ValueError: on use, if it is no label map, or does not have the size of the image.
    """

    def __init__(
        self,
        *,
        reduce_zero_label: bool | None = None,
        broken: str = "error",
        backend_args: dict | None = None,
    ) -> None:
        self.reduce_zero_label = reduce_zero_label
        self.backend_args = backend_args
        self.unreadable = UnreadableFiles(broken)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | None:
        if "gt_seg_map" in results or "seg_map_path" not in results:
            return results
        path = results["seg_map_path"]
        try:
            stored = decode_map(get_bytes(path, self.backend_args), str(path), palette=True)
        except BrokenImageError as error:
            return self.unreadable.handle(error)
        self.unreadable.loaded()
        _check_labels(stored, path)
        labels = fit_map(stored, path, results)
        results["gt_seg_map"] = self._table(results)[labels.astype(np.uint8)]
        results["seg_fields"] = [*results.get("seg_fields", []), "gt_seg_map"]
        return results

    def _table(self, results: dict[str, Any]) -> np.ndarray:
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
            f"broken={self.unreadable.broken!r}, backend_args={self.backend_args})"
        )


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


def _check_labels(values: np.ndarray, path: str) -> None:
    if values.ndim != 2:
        raise ValueError(
            f"{path} has the shape {values.shape}; a label map has one channel (H, W) with the "
            "class of each pixel, colours are no classes"
        )
    if values.dtype.kind not in "bui":
        raise ValueError(f"{path} holds {values.dtype.name} values; labels are whole numbers")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > _IGNORED:
        raise ValueError(
            f"{path} holds labels from {low} to {high}; expected 0 to {_IGNORED}, which is ignored"
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

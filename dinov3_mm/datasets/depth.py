"""Images with depth maps: data sets and transforms for the pipelines of mmseg."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.registry import DATASETS, TRANSFORMS
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from dinov3_mm.datasets.transforms.host_steps import UnreadableFiles, fit_map

from .image_files import files_by_name, image_extensions, open_text, text_lines
from .images import BrokenImageError, read_bytes
from .multiband import decode_map

# --- Reading of depth maps ---


DEPTH_SUFFIXES = (".npy", ".png", ".tif", ".tiff")
# What sensors store in 16 bits where they measured nothing, or nothing that fits.
SATURATED = 65535


@TRANSFORMS.register_module()
class LoadDepthMap:
    """Adds ``gt_depth_map`` (H, W), float32, in metres, unless the sample has it.

    A sample that names no ``depth_map_path`` is passed on, so that a pipeline also serves images
    without truth. Stored values are divided by the sample's ``depth_scale``; 0 stays 0. 65535 of a
    map of 16 bits means 'not measured'. A map of the size of the stored image is turned with it, as
    label maps are.

    Args:
        nodata: stored value that means 'not measured', where it is not 0.
        nodata_depth: depth that stands for it: 0, or -1 where 0 is a depth, as in canopy heights.
        saturation_is_depth: 65535 of 16 bits is a depth as any other.
        broken: 'error' or 'replace', see
            :class:`~dinov3_mm.datasets.transforms.host_steps.UnreadableFiles`.

    Raises:
        BrokenImageError: on use, if the file cannot be read.
        ValueError: on use, if the file is no depth map, or not of the size of the image.
    """

    def __init__(
        self,
        *,
        nodata: float | None = None,
        nodata_depth: float = 0.0,
        saturation_is_depth: bool = False,
        broken: str = "error",
    ) -> None:
        self.nodata = nodata
        self.nodata_depth = nodata_depth
        self.saturation_is_depth = saturation_is_depth
        self.unreadable = UnreadableFiles(broken)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | None:
        if "gt_depth_map" in results or "depth_map_path" not in results:
            return results
        path = results["depth_map_path"]
        try:
            stored = read_depth_map(path)
        except BrokenImageError as error:
            return self.unreadable.handle(error)
        self.unreadable.loaded()
        stored = fit_map(stored, path, results)
        results["gt_depth_map"] = self.depth(stored, results["depth_scale"])
        results["seg_fields"] = [*results.get("seg_fields", []), "gt_depth_map"]
        return results

    def depth(self, stored: np.ndarray, scale: float) -> np.ndarray:
        """Depth, float32, of stored values."""
        depth = stored.astype(np.float32) / np.float32(scale)
        if self.nodata is not None:
            depth[stored == self.nodata] = self.nodata_depth
        if not self.saturation_is_depth:
            depth[is_saturated(stored)] = self.nodata_depth
        return depth

    def __repr__(self) -> str:
        return (
            f"LoadDepthMap(nodata={self.nodata}, nodata_depth={self.nodata_depth}, "
            f"saturation_is_depth={self.saturation_is_depth}, broken={self.unreadable.broken!r})"
        )


def is_saturated(stored: np.ndarray) -> np.ndarray:
    """Where a map of 16 bits, in the dtype that :func:`read_depth_map` gives, holds 65535."""
    # PIL before 11 gives PNG of 16 bits as int32.
    if stored.dtype == np.uint16 or stored.dtype == np.int32:
        return stored == SATURATED
    return np.zeros(stored.shape, bool)


def read_depth_map(path: str | Path) -> np.ndarray:
    """The stored values (H, W) of a depth map, in the file's dtype.

    Raises:
        BrokenImageError: if there is no such file, or it is damaged.
        ValueError: if it has more than one channel.
    """
    stored = decode_map(read_bytes(path), str(path), palette=False)
    if stored.ndim != 2:
        raise ValueError(
            f"{path} has the shape {stored.shape}; a depth map has one channel (H, W), a colour "
            "picture of depth cannot be used"
        )
    return stored


# --- Folders of one's own ---


@DATASETS.register_module()
class DepthFolderDataset(BaseDataset):
    """Images and depth maps that are called the same, up to the suffix, in two folders.

    Subfolders and links are searched, hidden entries are not. Maps are PNG of 8 or 16 bits, TIFF
    or ``.npy``; see :class:`LoadDepthMap`. Maps without an image are left out and counted.

    Args:
        data_root: folder of the data set.
        data_prefix: folders ``img_path`` and ``depth_map_path``, relative to ``data_root``.
        depth_scale: units of the stored maps in a metre: 1000 for millimetres.
        **kwargs: ``pipeline``, ``test_mode``, ``indices``, ... of ``BaseDataset``.

    Raises:
        FileNotFoundError: if a folder is not there, is empty, or an image has no depth map.
        ValueError: if two images or two maps have the same name.
    """

    # mmseg's drawing of results asks for classes.
    METAINFO: ClassVar[dict] = {"classes": (), "palette": ()}

    def __init__(
        self,
        *,
        data_root: str = "",
        data_prefix: dict[str, str] | None = None,
        depth_scale: float = 1000.0,
        **kwargs: Any,
    ) -> None:
        if depth_scale <= 0:
            raise ValueError(f"depth_scale is {depth_scale}; expected units in a metre, above 0")
        self.depth_scale = depth_scale
        prefixes = {"img_path": "images", "depth_map_path": "depth", **(data_prefix or {})}
        super().__init__(data_root=data_root, data_prefix=prefixes, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Paths of all samples, by name."""
        images = self._files("img_path", image_extensions())
        maps = self._files("depth_map_path", DEPTH_SUFFIXES)
        missing = sorted(set(images) - set(maps))
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(images)} images have no depth map in "
                f"{self.data_prefix['depth_map_path']}, e.g. {', '.join(missing[:3])}; expected "
                f"the same name with one of {', '.join(DEPTH_SUFFIXES)}"
            )
        alone = sorted(set(maps) - set(images))
        if alone:
            print_log(
                f"{len(alone)} of {len(maps)} depth maps in {self.data_prefix['depth_map_path']} "
                f"have no image and are left out, e.g. {alone[0]}",
                logger="current",
                level=logging.WARNING,
            )
        return [
            {
                "img_path": images[name],
                "depth_map_path": maps[name],
                "depth_scale": self.depth_scale,
                "seg_fields": [],
            }
            for name in sorted(images)
        ]

    def _files(self, prefix: str, suffixes: tuple[str, ...]) -> dict[str, str]:
        """Name without suffix -> path, of all files below a folder."""
        folder = self.data_prefix[prefix]
        try:
            found = files_by_name(folder, suffixes)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"DepthFolderDataset: {error}; set data_root and data_prefix['{prefix}']"
            ) from error
        if not found:
            raise FileNotFoundError(f"no files in {folder} with one of {', '.join(suffixes)}")
        return found


# --- NYUv2 and KITTI by the lists of images and depth maps that depth estimation is compared on ---


# Stands in KITTI's lists for a depth map that was never made.
_NO_MAP = "None"


class DepthListDataset(BaseDataset):
    """Lines ``image depth_map focal_length`` of a text file, in lexicographic order.

    Paths are relative to the two prefixes; slashes at their beginning do not matter. Lines whose
    depth map is ``None`` are left out. A sample names ``img_path``, ``depth_map_path`` and
    ``depth_scale``, for :class:`LoadDepthMap`.

    Args:
        ann_file: list, relative to ``data_root``.
        data_root: folder of the data set.
        data_prefix: folders ``img_path`` and ``depth_map_path``, relative to ``data_root``.
        depth_scale: units of the stored maps in a metre.
        **kwargs: ``pipeline``, ``test_mode``, ``indices``, ... of ``BaseDataset``.

    Raises:
        FileNotFoundError: if there is no list.
        ValueError: if a line is another, or the list is empty.
    """

    # mmseg's drawing of results asks for classes.
    METAINFO: ClassVar[dict] = {"classes": (), "palette": ()}

    def __init__(
        self,
        ann_file: str,
        *,
        data_root: str = "",
        data_prefix: dict[str, str] | None = None,
        depth_scale: float,
        **kwargs: Any,
    ) -> None:
        if depth_scale <= 0:
            raise ValueError(f"depth_scale is {depth_scale}; expected units in a metre, above 0")
        self.depth_scale = depth_scale
        prefixes = {"img_path": "", "depth_map_path": "", **(data_prefix or {})}
        super().__init__(ann_file=ann_file, data_root=data_root, data_prefix=prefixes, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Paths of all samples."""
        path = Path(self.ann_file)
        if not path.is_file():
            raise FileNotFoundError(
                f"{type(self).__name__}: no list at {path}; expected lines 'image depth_map "
                "focal_length'. docs/depth.md says where the lists come from"
            )
        with open_text(path) as file:
            lines = list(text_lines(file, path))
        pairs = [self._pair(line, path) for line in sorted(lines) if line.strip()]
        samples = [self._sample(*pair) for pair in pairs if pair[1] != _NO_MAP]
        if not samples:
            raise ValueError(f"{path} names no image with a depth map")
        return samples

    def _pair(self, line: str, path: Path) -> list[str]:
        words = line.split()
        if len(words) not in (2, 3):
            raise ValueError(
                f"{path}: the line {line!r} has {len(words)} words; expected 'image depth_map', "
                "maybe with a focal length behind"
            )
        return [word.lstrip("/") for word in words[:2]]

    def _sample(self, image: str, depth_map: str) -> dict[str, Any]:
        return {
            "img_path": str(Path(self.data_prefix["img_path"], image)),
            "depth_map_path": str(Path(self.data_prefix["depth_map_path"], depth_map)),
            "depth_scale": self.depth_scale,
            "seg_fields": [],
        }


@DATASETS.register_module()
class NYUDepthDataset(DepthListDataset):
    """NYUv2 as for BTS (arXiv 1907.10326): 24,231 images for training, 654 for testing.

    Images of 480 x 640, depth in PNG files of 16 bits, in millimetres.

    Args:
        ann_file: 'nyu_train.txt' or 'nyu_test.txt'.
        **kwargs: see :class:`DepthListDataset`.
    """

    def __init__(self, ann_file: str, *, depth_scale: float = 1000.0, **kwargs: Any) -> None:
        super().__init__(ann_file, depth_scale=depth_scale, **kwargs)


@DATASETS.register_module()
class KITTIDepthDataset(DepthListDataset):
    """KITTI by the lists of Eigen's split (arXiv 1406.2283): 697 images for testing.

    Depth from laser scans, sparse, in PNG files of 16 bits, 256 units in a metre; the raw images
    and the depth maps have a folder each.

    Args:
        ann_file: list of the split.
        **kwargs: see :class:`DepthListDataset`.
    """

    def __init__(self, ann_file: str, *, depth_scale: float = 256.0, **kwargs: Any) -> None:
        super().__init__(ann_file, depth_scale=depth_scale, **kwargs)


# --- Augmentations of images with depth, and the resizing of the depth evaluations ---
#
# Images are (H, W, 3) of uint8 or float32 from 0 to 255; those that come out are float32.


# x and y from which and to which NYUv2's images of 640 x 480 hold a picture, the ends exclusive.
_NYU_COLUMNS, _NYU_ROWS = (43, 608), (45, 472)
_NYU_SIZE = (480, 640)


def _to_tensor(array: np.ndarray) -> Tensor:
    """(H, W) or (H, W, C) to (C, H, W), float32."""
    array = array[..., None] if array.ndim == 2 else array
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), np.float32))


def _to_array(tensor: Tensor) -> np.ndarray:
    """The inverse; one channel becomes (H, W)."""
    array = tensor.numpy().transpose(1, 2, 0)
    return np.ascontiguousarray(array[..., 0] if array.shape[2] == 1 else array)


@TRANSFORMS.register_module()
class NYUBorderCrop:
    """Cuts off the white border of NYUv2's images, of image and maps."""

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        height, width = results["img"].shape[:2]
        top, bottom = (y * height // _NYU_SIZE[0] for y in _NYU_ROWS)
        left, right = (x * width // _NYU_SIZE[1] for x in _NYU_COLUMNS)
        for key in ("img", *results.get("seg_fields", [])):
            results[key] = np.ascontiguousarray(results[key][top:bottom, left:right])
        results["img_shape"] = results["img"].shape[:2]
        return results

    def __repr__(self) -> str:
        return "NYUBorderCrop()"


@TRANSFORMS.register_module()
class RandomDepthRotation:
    """Turns image (bilinear) and maps (nearest) around their middle; corners become 0.

    Args:
        prob: probability.
        max_angle: the angle is uniform from minus to plus this, in degrees.
    """

    def __init__(self, *, prob: float = 0.5, max_angle: float = 2.5) -> None:
        self.prob = prob
        self.max_angle = max_angle

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        if np.random.rand() >= self.prob:
            return results
        angle = np.random.uniform(-self.max_angle, self.max_angle)
        for key in ("img", *results.get("seg_fields", [])):
            mode = InterpolationMode.BILINEAR if key == "img" else InterpolationMode.NEAREST
            results[key] = _to_array(F.rotate(_to_tensor(results[key]), angle, mode))
        return results

    def __repr__(self) -> str:
        return f"RandomDepthRotation(prob={self.prob}, max_angle={self.max_angle})"


@TRANSFORMS.register_module()
class RandomGammaBrightness:
    """Gamma on values from 0 to 255, then a factor for all channels and one for each.

    Args:
        prob: probability.
        gamma, brightness, color: ranges of the exponent, the common and the channels' factors.
    """

    def __init__(
        self,
        *,
        prob: float = 0.5,
        gamma: Sequence[float] = (0.9, 1.1),
        brightness: Sequence[float] = (0.75, 1.25),
        color: Sequence[float] = (0.9, 1.1),
    ) -> None:
        self.prob = prob
        self.gamma = tuple(gamma)
        self.brightness = tuple(brightness)
        self.color = tuple(color)

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        if np.random.rand() >= self.prob:
            return results
        image = results["img"].astype(np.float32) ** np.float32(np.random.uniform(*self.gamma))
        image *= np.float32(np.random.uniform(*self.brightness))
        image *= np.random.uniform(*self.color, size=image.shape[2]).astype(np.float32)
        results["img"] = np.minimum(image, 255.0)
        return results

    def __repr__(self) -> str:
        return (
            f"RandomGammaBrightness(prob={self.prob}, gamma={self.gamma}, "
            f"brightness={self.brightness}, color={self.color})"
        )


@TRANSFORMS.register_module()
class ResizeImageOnly:
    """Resizes the image, bilinear and antialiased, in floating point; maps keep their size.

    Args:
        size: length of the short side, the long side rounded down, or (height, width).
    """

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = [size] if isinstance(size, int) else list(size)
        if len(self.size) not in (1, 2) or min(self.size) < 1:
            raise ValueError(f"size is {size}; expected the short side, or (height, width)")

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        image = F.resize(_to_tensor(results["img"]), self.size, antialias=True)
        results["img"] = _to_array(image)
        results["img_shape"] = results["img"].shape[:2]
        return results

    def __repr__(self) -> str:
        return f"ResizeImageOnly(size={self.size})"

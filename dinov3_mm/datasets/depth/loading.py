"""Reading of depth maps."""

from pathlib import Path
from typing import Any

import numpy as np
from mmengine.registry import TRANSFORMS

from dinov3_mm.datasets.images import BrokenImageError, read_bytes
from dinov3_mm.datasets.loading import UnreadableFiles, fit_map
from dinov3_mm.datasets.multiband import decode_map

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
        broken: 'error' or 'replace', see :class:`~dinov3_mm.datasets.loading.UnreadableFiles`.

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

"""Reading of depth maps."""

from pathlib import Path
from typing import Any

import numpy as np
from mmengine.registry import TRANSFORMS

from dinov3_mm.datasets.images import BrokenImageError, read_bytes
from dinov3_mm.datasets.loading import UnreadableFiles, fit_map
from dinov3_mm.datasets.multiband import decode_map

DEPTH_SUFFIXES = (".npy", ".png", ".tif", ".tiff")


@TRANSFORMS.register_module()
class LoadDepthMap:
    """Adds ``gt_depth_map`` (H, W), float32, in metres, unless the sample has it.

    A sample that names no ``depth_map_path`` is passed on, so that a pipeline also serves images
    without truth. Stored values are divided by the sample's ``depth_scale``; 0 stays 0. A map of
    the size of the stored image is turned with it, as label maps are.

    Args:
        nodata: stored value that means 'not measured', where it is not 0.
        nodata_depth: depth that stands for it: 0, or -1 where 0 is a depth, as in canopy heights.
        broken: 'error' or 'replace', see :class:`~dinov3_mm.datasets.loading.UnreadableFiles`.

    Raises:
        BrokenImageError: on use, if the file cannot be read.
        ValueError: on use, if the file is no depth map, or not of the size of the image.
    """

    def __init__(
        self, *, nodata: float | None = None, nodata_depth: float = 0.0, broken: str = "error"
    ) -> None:
        self.nodata = nodata
        self.nodata_depth = nodata_depth
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
        depth = stored.astype(np.float32) / np.float32(results["depth_scale"])
        if self.nodata is not None:
            depth[stored == self.nodata] = self.nodata_depth
        results["gt_depth_map"] = depth
        results["seg_fields"] = [*results.get("seg_fields", []), "gt_depth_map"]
        return results

    def __repr__(self) -> str:
        return (
            f"LoadDepthMap(nodata={self.nodata}, nodata_depth={self.nodata_depth}, "
            f"broken={self.unreadable.broken!r})"
        )


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

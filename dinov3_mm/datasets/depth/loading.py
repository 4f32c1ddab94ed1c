"""Reading of depth maps."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.registry import TRANSFORMS

DEPTH_SUFFIXES = (".npy", ".png", ".tif", ".tiff")


@TRANSFORMS.register_module()
class LoadDepthMap:
    """Adds ``gt_depth_map`` (H, W), float32, in metres, unless the sample has it.

    A sample that names no ``depth_map_path`` is passed on, so that a pipeline also serves images
    without truth. Stored values are divided by the sample's ``depth_scale``; 0 stays 0.

    Args:
        nodata: stored value that means 'not measured', where it is not 0.
        nodata_depth: depth that stands for it: 0, or -1 where 0 is a depth, as in canopy heights.

    Raises:
        ValueError: on use, if the file is no depth map, or not of the size of the image.
    """

    def __init__(self, *, nodata: float | None = None, nodata_depth: float = 0.0) -> None:
        self.nodata = nodata
        self.nodata_depth = nodata_depth

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        if "gt_depth_map" in results or "depth_map_path" not in results:
            return results
        path = results["depth_map_path"]
        stored = read_depth_map(path)
        size = tuple(results.get("ori_shape", stored.shape)[:2])
        if stored.shape != size:
            raise ValueError(
                f"{path} has {stored.shape[0]} x {stored.shape[1]} pixels, its image "
                f"{results['img_path']} has {size[0]} x {size[1]}; expected the same"
            )
        depth = stored.astype(np.float32) / np.float32(results["depth_scale"])
        if self.nodata is not None:
            depth[stored == self.nodata] = self.nodata_depth
        results["gt_depth_map"] = depth
        results["seg_fields"] = [*results.get("seg_fields", []), "gt_depth_map"]
        return results

    def __repr__(self) -> str:
        return f"LoadDepthMap(nodata={self.nodata}, nodata_depth={self.nodata_depth})"


def read_depth_map(path: str | Path) -> np.ndarray:
    """The stored values (H, W) of a depth map, in the file's dtype.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or has more than one channel.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no depth map at {path}")
    if path.suffix.lower() == ".npy":
        stored = np.load(path, allow_pickle=False)
    else:
        stored = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
    if stored is None:
        raise ValueError(f"{path} is no readable image; expected {', '.join(DEPTH_SUFFIXES)}")
    if stored.ndim != 2:
        raise ValueError(
            f"{path} has the shape {stored.shape}; a depth map has one channel (H, W), a colour "
            "picture of depth cannot be used"
        )
    return stored

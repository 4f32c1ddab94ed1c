"""NYUv2 and KITTI by the lists of images and depth maps that depth estimation is compared on."""

from pathlib import Path
from typing import Any, ClassVar

from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS

from dinov3_mm.datasets.image_files import open_text, text_lines

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

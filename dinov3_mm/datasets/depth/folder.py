"""Depth of one's own: a folder of images, and one of depth maps with the same names."""

import logging
from typing import Any, ClassVar

from mmengine.dataset import BaseDataset
from mmengine.logging import print_log
from mmengine.registry import DATASETS

from dinov3_mm.datasets.image_files import files_by_name, image_extensions

from .loading import DEPTH_SUFFIXES


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

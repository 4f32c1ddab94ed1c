"""The released detector and a pyramid over several layers, as parts of mmdet."""

from dinov3_mm.hosts import require_host

require_host("mmdet")

from .categories import COCO_CATEGORY_IDS  # noqa: E402
from .concat_pyramid import DINOv3ConcatPyramid  # noqa: E402
from .criterion import DINOv3BoxDeltaCost  # noqa: E402
from .plain_detr import DINOv3PlainDETR  # noqa: E402
from .plain_detr_head import DINOv3PlainDETRHead  # noqa: E402
from .windowed_backbone import DINOv3WindowedBackbone  # noqa: E402

__all__ = [
    "COCO_CATEGORY_IDS",
    "DINOv3BoxDeltaCost",
    "DINOv3ConcatPyramid",
    "DINOv3PlainDETR",
    "DINOv3PlainDETRHead",
    "DINOv3WindowedBackbone",
]

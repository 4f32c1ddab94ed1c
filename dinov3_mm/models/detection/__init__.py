"""The released detector and a pyramid over several layers, as parts of mmdet."""

from dinov3_mm.hosts import require_host

require_host("mmdet")

from .criterion import DINOv3BoxDeltaCost  # noqa: E402
from .inputs import (  # noqa: E402
    DINOv3ConcatPyramid,
    DINOv3WindowedBackbone,
)
from .plain_detr import (  # noqa: E402
    COCO_CATEGORY_IDS,
    DINOv3PlainDETR,
    DINOv3PlainDETRHead,
)

__all__ = [
    "COCO_CATEGORY_IDS",
    "DINOv3BoxDeltaCost",
    "DINOv3ConcatPyramid",
    "DINOv3PlainDETR",
    "DINOv3PlainDETRHead",
    "DINOv3WindowedBackbone",
]

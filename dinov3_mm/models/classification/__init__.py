"""Classifiers on the features of a backbone, as parts of mmpretrain's ``ImageClassifier``."""

from dinov3_mm.hosts import require_host

require_host("mmpretrain")

from .attention_head import DINOv3AttentionHead  # noqa: E402
from .cls_patch_neck import DINOv3ClsPatchNeck  # noqa: E402
from .linear_head import DINOv3LinearClsHead  # noqa: E402

__all__ = ["DINOv3AttentionHead", "DINOv3ClsPatchNeck", "DINOv3LinearClsHead"]

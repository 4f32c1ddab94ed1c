"""Classifiers on the features of a backbone, as parts of mmpretrain's ``ImageClassifier``."""

from dinov3_mm.hosts import require_host

require_host("mmpretrain")

from .heads import (  # noqa: E402
    DINOv3AttentionHead,
    DINOv3ClsPatchNeck,
    DINOv3LinearClsHead,
)

__all__ = ["DINOv3AttentionHead", "DINOv3ClsPatchNeck", "DINOv3LinearClsHead"]

"""DINOv3 as an OpenMMLab plug-in.

Importing the package registers every core module in MMEngine's root registries, so that configs of
any default scope build them by name. It imports no host library (mmpretrain, mmseg, mmdet).
"""

from mmengine.config.utils import MODULE2PACKAGE

from dinov3_mm import datasets, engine, evaluation, models, visualization
from dinov3_mm.checkpoints import build_backbone, export_backbone, list_backbones
from dinov3_mm.datasets.transforms import make_transform
from dinov3_mm.models import pretraining

__version__ = "0.1.0"

# Configs may say _base_ = "dinov3_mm::segmentation/linear_vitb16_ade20k.py".
MODULE2PACKAGE.setdefault("dinov3_mm", "dinov3_mm")

__all__ = [
    "build_backbone",
    "datasets",
    "engine",
    "evaluation",
    "export_backbone",
    "list_backbones",
    "make_transform",
    "models",
    "pretraining",
    "visualization",
]

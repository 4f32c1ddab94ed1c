"""Evaluation of frozen features: k-NN, dense linear probe, retrieval, rank, and their baselines."""

from dinov3_mm.datasets.evaluation_images import (
    HeldOutSplit,
    ImageSet,
    class_labels,
    paired_labels,
    patch_labels,
)
from dinov3_mm.features.frozen import Features, evaluating, extract_features, preserved_random_state
from dinov3_mm.models.backbones.zoo import IMAGENET_MEAN, IMAGENET_STD
from dinov3_mm.models.pretraining.diagnostics import effective_rank

from .dense_probe import DenseProbeResult, dense_linear_probe, fit_patch_classifier, stack_masks
from .knn import KNNScore, chance_level, knn_classify, knn_scores, nearest_neighbours
from .metrics import confusion_matrix, iou_per_class, segmentation_metrics, top_k_accuracy
from .retrieval import RandomViews, two_crop_retrieval
from .table import (
    RepresentationTable,
    colour_histogram,
    random_init_backbone,
    raw_patches,
    raw_pixels,
    representation_table,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "DenseProbeResult",
    "Features",
    "HeldOutSplit",
    "ImageSet",
    "KNNScore",
    "RandomViews",
    "RepresentationTable",
    "chance_level",
    "class_labels",
    "colour_histogram",
    "confusion_matrix",
    "dense_linear_probe",
    "effective_rank",
    "evaluating",
    "extract_features",
    "fit_patch_classifier",
    "iou_per_class",
    "knn_classify",
    "knn_scores",
    "nearest_neighbours",
    "paired_labels",
    "patch_labels",
    "preserved_random_state",
    "random_init_backbone",
    "raw_patches",
    "raw_pixels",
    "representation_table",
    "segmentation_metrics",
    "stack_masks",
    "top_k_accuracy",
    "two_crop_retrieval",
]

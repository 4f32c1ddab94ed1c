"""Linear probe of patch features: ridge regression onto semantic classes, scored by mIoU."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .images import ImageSet, patch_labels
from .metrics import IGNORE_INDEX, confusion_matrix, iou_per_class, segmentation_metrics
from .ridge import RidgeStatistics

RIDGE_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
BALANCE_GRID = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class DenseProbeResult:
    """Scores of a dense probe on its test images, in percent.

    Attributes:
        patch_miou, patch_accuracy: over patches, against their majority labels.
        pixel_miou, pixel_accuracy: logits upsampled bilinearly, against the masks.
        chance_miou: patch mIoU of the most frequent training class everywhere.
        ridge, balance: chosen hyper-parameters, see `fit_patch_classifier`.
        class_iou: pixel IoU by class, NaN for a class that never occurs.
    """

    patch_miou: float
    patch_accuracy: float
    pixel_miou: float
    pixel_accuracy: float
    chance_miou: float
    ridge: float
    balance: float
    class_iou: tuple[float, ...]

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class PatchClassifier:
    """Linear map from normalised patch features to class scores.

    Attributes:
        normalization: ``'standardize'`` (by the training mean and deviation) or ``'l2'``.
        offset, scale: (D,) training statistics (0 and 1 for ``'l2'``).
        weight, bias: (D, C) and (C,).
        ridge, balance: chosen hyper-parameters.
    """

    normalization: str
    offset: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    ridge: float
    balance: float

    def logits(self, patches: Tensor) -> Tensor:
        """Class scores (..., C) of patch features (..., D)."""
        features = _normalized(patches, self.normalization, self.offset, self.scale)
        return features @ self.weight + self.bias


def stack_masks(images: ImageSet) -> Tensor:
    """Masks of a whole set in the geometry of its images, (N, S, S) uint8.

    Raises:
        TypeError: if the source has no ``semantic_mask(i)``.
    """
    if not hasattr(images.source, "semantic_mask"):
        raise TypeError(
            f"{type(images.source).__name__} has no semantic_mask(i): a dense probe needs a source "
            "with semantic masks"
        )
    size = images.image_size
    masks = torch.empty(len(images), size, size, dtype=torch.uint8)
    for index in range(len(images)):
        mask = images.mask(index)
        if mask.min() < 0 or mask.max() > IGNORE_INDEX:
            raise ValueError(
                f"mask {index} spans [{mask.min()}, {mask.max()}], expected labels in "
                f"[0, {IGNORE_INDEX - 1}] and {IGNORE_INDEX} for ignored pixels"
            )
        masks[index] = mask
    return masks


def fit_patch_classifier(
    patches: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    normalization: str = "standardize",
    ridges: Sequence[float] = RIDGE_GRID,
    balances: Sequence[float] = BALANCE_GRID,
    validation_share: float = 0.2,
) -> PatchClassifier:
    """Fit a ridge classifier on patches; its hyper-parameters are chosen on a part of the images.

    The last ``validation_share`` of a fixed permutation of the images is held out; the setting with
    the best patch mIoU there (the first of equals) is refitted on all images. Backgrounds cover
    most of an image, and plain least squares then answers nothing else: ``balance`` b weights every
    patch by (class frequency)^-b.

    Args:
        patches: (N, P, D) features of N training images.
        labels: (N, P) int64 majority labels, 255 ignored.
        num_classes: C.
        normalization: ``'standardize'`` or ``'l2'`` (unit length per patch).
        ridges: candidate strengths, relative to the weighted feature variance.
        balances: candidate exponents, 0 for no and 1 for full balancing.
        validation_share: in (0, 1).
    """
    if normalization not in ("standardize", "l2"):
        raise ValueError(f"normalization must be 'standardize' or 'l2', got {normalization!r}")
    if patches.shape[:2] != labels.shape:
        raise ValueError(
            f"patches {tuple(patches.shape)} and labels {tuple(labels.shape)} must agree in images "
            "and patches per image"
        )
    held = max(1, round(len(patches) * validation_share))
    if len(patches) - held < 1:
        raise ValueError(f"need at least two images to choose the ridge on, got {len(patches)}")
    order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))
    offset, scale = _statistics(patches, normalization)
    parts = []
    for part in (order[:-held], order[-held:]):
        keep = labels[part] != IGNORE_INDEX
        features = _normalized(patches[part][keep], normalization, offset, scale)
        parts.append((features, labels[part][keep]))
    if not len(parts[0][1]) or not len(parts[1][1]):
        raise ValueError("the training or the held-out images have no labelled patch")
    held_features, held_labels = parts[1]
    best_miou = -1.0
    for balance in balances:
        class_weights = _class_weights(labels, num_classes, balance)
        fit, rest = (RidgeStatistics.of_classes(x, y, class_weights) for x, y in parts)
        for ridge in ridges:
            weight, bias = _solve(fit, ridge)
            predictions = (held_features @ weight + bias).argmax(dim=1)
            confusion = confusion_matrix(predictions, held_labels, num_classes)
            miou = segmentation_metrics(confusion)["mIoU"]
            if miou > best_miou:
                best_miou, best = miou, (ridge, balance, fit + rest)
    ridge, balance, everything = best
    weight, bias = _solve(everything, ridge)
    return PatchClassifier(normalization, offset, scale, weight, bias, ridge, balance)


def dense_linear_probe(
    train_patches: Tensor,
    train_masks: Tensor,
    test_patches: Tensor,
    test_masks: Tensor,
    num_classes: int,
    *,
    normalization: str = "standardize",
    ridges: Sequence[float] = RIDGE_GRID,
    balances: Sequence[float] = BALANCE_GRID,
) -> DenseProbeResult:
    """Train a linear patch classifier on one set of images and score it on another.

    Args:
        train_patches, test_patches: (N, P, D) patch features of square images, row-major.
        train_masks, test_masks: (N, S, S) integer masks, 255 ignored.
        num_classes: C, background included.
        normalization, ridges, balances: see `fit_patch_classifier`.
    """
    side, patch_size = _patch_grid(test_patches, test_masks)
    _, train_patch_size = _patch_grid(train_patches, train_masks)
    train_labels = patch_labels(train_masks.long(), train_patch_size, num_classes).flatten(1)
    test_labels = patch_labels(test_masks.long(), patch_size, num_classes).flatten(1)
    classifier = fit_patch_classifier(
        train_patches,
        train_labels,
        num_classes,
        normalization=normalization,
        ridges=ridges,
        balances=balances,
    )
    by_patch = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    by_pixel = torch.zeros_like(by_patch)
    for patches, labels, masks in zip(
        test_patches.split(64), test_labels.split(64), test_masks.split(64)
    ):
        logits = classifier.logits(patches)  # (B, P, C)
        by_patch += confusion_matrix(logits.argmax(dim=2), labels, num_classes)
        maps = logits.transpose(1, 2).unflatten(2, (side, side))
        maps = F.interpolate(maps, size=masks.shape[1:], mode="bilinear", align_corners=False)
        by_pixel += confusion_matrix(maps.argmax(dim=1), masks.long(), num_classes)
    majority = torch.bincount(train_labels[train_labels != IGNORE_INDEX]).argmax()
    constant = confusion_matrix(
        majority.expand_as(test_labels), test_labels, num_classes, IGNORE_INDEX
    )
    patch, pixel = segmentation_metrics(by_patch), segmentation_metrics(by_pixel)
    return DenseProbeResult(
        patch_miou=100 * patch["mIoU"],
        patch_accuracy=100 * patch["aAcc"],
        pixel_miou=100 * pixel["mIoU"],
        pixel_accuracy=100 * pixel["aAcc"],
        chance_miou=100 * segmentation_metrics(constant)["mIoU"],
        ridge=classifier.ridge,
        balance=classifier.balance,
        class_iou=tuple(100 * v for v in iou_per_class(by_pixel).tolist()),
    )


def _patch_grid(patches: Tensor, masks: Tensor) -> tuple[int, int]:
    """Patches per side and patch size of square images, from the two shapes."""
    side = round(patches.shape[1] ** 0.5)
    size = masks.shape[-1]
    if side**2 != patches.shape[1] or masks.shape[-2] != size or size % side:
        raise ValueError(
            f"{patches.shape[1]} patches per image and masks of {tuple(masks.shape[-2:])} do not "
            "describe a square image divided into square patches"
        )
    if len(patches) != len(masks):
        raise ValueError(f"{len(patches)} images of patches but {len(masks)} masks")
    return side, size // side


def _statistics(patches: Tensor, normalization: str) -> tuple[Tensor, Tensor]:
    dims = patches.shape[-1]
    if normalization == "l2":
        return patches.new_zeros(dims), patches.new_ones(dims)
    deviation, mean = torch.std_mean(patches.flatten(0, -2), dim=0, correction=0)
    # A feature without any spread stays at zero instead of becoming amplified rounding noise.
    floor = 1e-6 * mean.abs() + torch.finfo(torch.float32).tiny
    return mean, torch.where(deviation > floor, deviation, torch.full_like(mean, torch.inf))


def _normalized(patches: Tensor, normalization: str, offset: Tensor, scale: Tensor) -> Tensor:
    if normalization == "l2":
        return F.normalize(patches, dim=-1)
    return (patches - offset) / scale


def _class_weights(labels: Tensor, num_classes: int, balance: float) -> Tensor:
    """(class share * C)^-balance for each class: 1 everywhere for equally frequent classes."""
    counts = torch.bincount(labels[labels != IGNORE_INDEX], minlength=num_classes).double()
    return (counts.clamp_min(1) * num_classes / counts.sum()).pow(-balance)


def _solve(statistics: RidgeStatistics, ridge: float) -> tuple[Tensor, Tensor]:
    """fp32 solution for a strength relative to the feature variance."""
    scale = max(statistics.mean_variance, torch.finfo(torch.float64).tiny)
    weight, bias = statistics.solve(ridge * statistics.weight * scale)
    return weight.float(), bias.float()

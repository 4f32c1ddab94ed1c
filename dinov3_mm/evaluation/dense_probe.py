"""Linear probe of patch features: ridge regression onto semantic classes, scored by mIoU."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dinov3_mm.datasets.evaluation_images import IGNORE_INDEX, ImageSet, patch_labels
from dinov3_mm.features.frozen import Sharing

from .metrics import count_pairs, iou_per_class, segmentation_metrics

# --- Weighted ridge regression in closed form ---


ROW_CHUNK = 65536


@dataclass
class RidgeStatistics:
    """Weighted sums that determine a ridge regression of targets Y (N, C) on features X (N, D).

    Kept in float64. Statistics of disjoint parts add up, so a fit on their union costs no second
    pass over the features.
    """

    weight: Tensor  # () sum of the sample weights w
    feature_sum: Tensor  # (D,) sum of w x
    target_sum: Tensor  # (C,) sum of w y
    gram: Tensor  # (D, D) sum of w x x^T
    cross: Tensor  # (D, C) sum of w x y^T

    @classmethod
    def of_classes(
        cls, features: Tensor, labels: Tensor, class_weights: Tensor
    ) -> "RidgeStatistics":
        """Statistics for one-hot targets of ``labels`` (N,), samples weighted by their class.

        Args:
            features: (N, D).
            labels: (N,) int64 in [0, C).
            class_weights: (C,) positive.
        """
        dims, num_classes = features.shape[1], len(class_weights)
        gram = torch.zeros(dims, dims, dtype=torch.float64, device=features.device)
        cross = torch.zeros(num_classes, dims, dtype=torch.float64, device=features.device)
        # Products in fp32 by chunk, sums of chunks in fp64: fast, and precise once means cancel.
        for rows, classes in zip(features.split(ROW_CHUNK), labels.split(ROW_CHUNK)):
            weighted = rows * class_weights[classes, None].to(rows)
            gram += (rows.T @ weighted).double()
            cross += rows.new_zeros(num_classes, dims).index_add_(0, classes, weighted).double()
        own = class_weights.to(features.device, torch.float64)
        counts = torch.zeros_like(own).index_add_(0, labels, own[labels])
        return cls(counts.sum(), cross.sum(dim=0), counts, gram, cross.T)

    def __add__(self, other: "RidgeStatistics") -> "RidgeStatistics":
        return RidgeStatistics(
            self.weight + other.weight,
            self.feature_sum + other.feature_sum,
            self.target_sum + other.target_sum,
            self.gram + other.gram,
            self.cross + other.cross,
        )

    def over(self, ranks: Sharing) -> "RidgeStatistics":
        """The sum over ranks that share the samples."""
        parts = (self.weight, self.feature_sum, self.target_sum, self.gram, self.cross)
        return RidgeStatistics(*ranks.add(*parts))

    @property
    def mean_variance(self) -> Tensor:
        """Weighted variance of the features, averaged over the D of them."""
        mean = self.feature_sum / self.weight
        return (self.gram.diagonal() / self.weight - mean.square()).clamp_min(0).mean()

    def solve(self, alpha: float | Tensor) -> tuple[Tensor, Tensor]:
        """Minimise sum of w |y - xW - b|^2 + alpha |W|^2: weights (D, C) and intercept (C,)."""
        mean, target_mean = self.feature_sum / self.weight, self.target_sum / self.weight
        covariance = self.gram - self.weight * torch.outer(mean, mean)
        cross = self.cross - self.weight * torch.outer(mean, target_mean)
        covariance.diagonal().add_(alpha)
        weight = torch.linalg.solve(covariance, cross)
        return weight, target_mean - mean @ weight


# --- The probe ---


RIDGE_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
BALANCE_GRID = (0.0, 0.5, 1.0)
# Bounds the memory of the logits at the size of the masks.
_IMAGES_AT_ONCE = 64


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


def stack_masks(images: ImageSet, rows: slice = slice(None)) -> Tensor:
    """Masks of a set, or of some of its rows, in the geometry of its images, (N, S, S) uint8.

    Raises:
        TypeError: if the source has no ``semantic_mask(i)``.
    """
    if not hasattr(images.source, "semantic_mask"):
        raise TypeError(
            f"{type(images.source).__name__} has no semantic_mask(i): a dense probe needs a source "
            "with semantic masks"
        )
    size = images.image_size
    indices = range(len(images))[rows]
    masks = torch.empty(len(indices), size, size, dtype=torch.uint8)
    for row, index in enumerate(indices):
        mask = images.mask(index)
        if mask.min() < 0 or mask.max() > IGNORE_INDEX:
            raise ValueError(
                f"mask {index} spans [{mask.min()}, {mask.max()}], expected labels in "
                f"[0, {IGNORE_INDEX - 1}] and {IGNORE_INDEX} for ignored pixels"
            )
        masks[row] = mask
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
    shared: bool = False,
) -> PatchClassifier:
    """Fit a ridge classifier on patches; its hyper-parameters are chosen on a part of the images.

    The last ``validation_share`` of a fixed permutation of the images is held out; the setting with
    the best patch mIoU there (the first of equals) is refitted on all images. Backgrounds cover
    most of an image, and plain least squares then answers nothing else: ``balance`` b weights every
    patch by (class frequency)^-b.

    Args:
        patches: (N, P, D) features of N training images, on the device that computes.
        labels: (N, P) int64 majority labels, 255 ignored.
        num_classes: C.
        normalization: ``'standardize'`` or ``'l2'`` (unit length per patch).
        ridges: candidate strengths, relative to the weighted feature variance.
        balances: candidate exponents, 0 for no and 1 for full balancing.
        validation_share: in (0, 1).
        shared: each rank gives its own images only, those of
            :func:`~dinov3_mm.features.frozen.share_of`; sums over all of them decide, so that
            every rank gets the classifier that one process would get, to rounding.
    """
    if normalization not in ("standardize", "l2"):
        raise ValueError(f"normalization must be 'standardize' or 'l2', got {normalization!r}")
    if patches.shape[:2] != labels.shape:
        raise ValueError(
            f"patches {tuple(patches.shape)} and labels {tuple(labels.shape)} must agree in images "
            "and patches per image"
        )
    ranks = Sharing(shared)
    images, counts = ranks.add(torch.tensor(len(patches)), _counts(labels, num_classes))
    is_held = _held_out(int(images), validation_share)[ranks.rows(int(images))]
    offset, scale = _statistics(patches, normalization, ranks)
    keep = labels != IGNORE_INDEX
    chosen = [keep & ~is_held[:, None], keep & is_held[:, None]]
    if not all(ranks.add(torch.stack([part.sum() for part in chosen]))[0].tolist()):
        raise ValueError("the training or the held-out images have no labelled patch")
    # Rows are chosen where the labels are, on the host: the device need not wait for their number.
    rows = [part.flatten().nonzero()[:, 0].to(patches.device) for part in chosen]
    flat = patches.flatten(0, 1)
    parts = [
        (_normalized(flat[own], normalization, offset, scale), labels[part].to(patches.device))
        for own, part in zip(rows, chosen)
    ]
    weights = [_class_weights(counts, balance) for balance in balances]
    sums = ranks.meet(
        "the probe's sums",
        lambda: [[RidgeStatistics.of_classes(*part, w) for part in parts] for w in weights],
    )
    sums = [[part.over(ranks) for part in pair] for pair in sums]
    candidates = [(balance, ridge) for balance in range(len(balances)) for ridge in ridges]
    solutions = _solve([(sums[balance][0], ridge) for balance, ridge in candidates], ranks)
    held_features, held_labels = parts[1]

    def judge() -> Tensor:
        return torch.stack(
            [
                count_pairs((held_features @ w + b).argmax(dim=1), held_labels, num_classes)
                for w, b in solutions
            ]
        )

    (confusions,) = ranks.add(ranks.meet("the probe's validation", judge))
    mious = [segmentation_metrics(confusion)["mIoU"] for confusion in confusions.cpu()]
    # The first of equals; NaN, without any labelled class, is below all.
    best = max(range(len(mious)), key=lambda i: (mious[i] == mious[i], mious[i]))
    balance, ridge = candidates[best]
    fit, rest = sums[balance]
    ((weight, bias),) = _solve([(fit + rest, ridge)], ranks)
    return PatchClassifier(normalization, offset, scale, weight, bias, ridge, balances[balance])


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
    shared: bool = False,
) -> DenseProbeResult:
    """Train a linear patch classifier on one set of images and score it on another.

    Args:
        train_patches, test_patches: (N, P, D) patch features of square images, row-major, on the
            device that computes.
        train_masks, test_masks: (N, S, S) integer masks, 255 ignored.
        num_classes: C, background included.
        normalization, ridges, balances, shared: see `fit_patch_classifier`.
    """
    ranks = Sharing(shared)
    train_labels, test_labels, side = ranks.meet(
        "the probe's labels",
        lambda: _label(train_patches, train_masks, test_patches, test_masks, num_classes),
    )
    classifier = fit_patch_classifier(
        train_patches,
        train_labels,
        num_classes,
        normalization=normalization,
        ridges=ridges,
        balances=balances,
        shared=shared,
    )
    counted = ranks.meet(
        "the probe's scores",
        lambda: _confusions(classifier, test_patches, test_labels, test_masks, side, num_classes),
    )
    by_patch, by_pixel, train_counts, test_counts = (
        counts.cpu()
        for counts in ranks.add(
            *counted, _counts(train_labels, num_classes), _counts(test_labels, num_classes)
        )
    )
    constant = torch.zeros_like(by_patch)
    constant[:, train_counts.argmax()] = test_counts
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


def _label(
    train_patches: Tensor,
    train_masks: Tensor,
    test_patches: Tensor,
    test_masks: Tensor,
    num_classes: int,
) -> tuple[Tensor, Tensor, int]:
    """Majority labels (N, P) of both sets, and the patches per side of a test image."""
    side, patch_size = _patch_grid(test_patches, test_masks)
    _, train_patch_size = _patch_grid(train_patches, train_masks)
    labels = (
        patch_labels(masks.long(), size, num_classes).flatten(1)
        for masks, size in ((train_masks, train_patch_size), (test_masks, patch_size))
    )
    return *labels, side


def _confusions(
    classifier: PatchClassifier,
    patches: Tensor,
    labels: Tensor,
    masks: Tensor,
    side: int,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """Confusion matrices by patch and by pixel, where the patches are."""
    device = patches.device
    by_patch = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    by_pixel = torch.zeros_like(by_patch)
    for start in range(0, len(patches), _IMAGES_AT_ONCE):
        part = slice(start, start + _IMAGES_AT_ONCE)
        logits = classifier.logits(patches[part])  # (B, P, C)
        by_patch += count_pairs(logits.argmax(dim=2), labels[part].to(device), num_classes)
        maps = logits.transpose(1, 2).unflatten(2, (side, side))
        maps = F.interpolate(maps, size=masks.shape[1:], mode="bilinear", align_corners=False)
        by_pixel += count_pairs(maps.argmax(dim=1), masks[part].to(device), num_classes)
    return by_patch, by_pixel


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


def _held_out(images: int, share: float) -> Tensor:
    """(N,) bool, the images on which the ridge is chosen."""
    held = max(1, round(images * share))
    if images - held < 1:
        raise ValueError(f"need at least two images to choose the ridge on, got {images}")
    order = torch.randperm(images, generator=torch.Generator().manual_seed(0))
    return torch.zeros(images, dtype=torch.bool).index_fill_(0, order[-held:], True)


def _statistics(patches: Tensor, normalization: str, ranks: Sharing) -> tuple[Tensor, Tensor]:
    """Mean and deviation (D,) over the patches of all images, 0 and 1 for 'l2'."""
    dims = patches.shape[-1]
    if normalization == "l2":
        return patches.new_zeros(dims), patches.new_ones(dims)
    rows = patches.flatten(0, -2).split(ROW_CHUNK)
    total = torch.zeros(dims, dtype=torch.float64, device=patches.device)
    count, total = ranks.add(
        torch.tensor(patches.shape[:-1].numel()), sum((r.double().sum(0) for r in rows), total)
    )
    mean = total / int(count)
    squares = sum(((r - mean).square().sum(0) for r in rows), torch.zeros_like(mean))
    (squares,) = ranks.add(squares)
    deviation, mean = (squares / int(count)).sqrt().float(), mean.float()
    # A feature without any spread stays at zero instead of becoming amplified rounding noise.
    floor = 1e-6 * mean.abs() + torch.finfo(torch.float32).tiny
    return mean, torch.where(deviation > floor, deviation, torch.full_like(mean, torch.inf))


def _normalized(patches: Tensor, normalization: str, offset: Tensor, scale: Tensor) -> Tensor:
    if normalization == "l2":
        return F.normalize(patches, dim=-1)
    return (patches - offset) / scale


def _counts(labels: Tensor, num_classes: int) -> Tensor:
    """(C,) int64, patches of each class."""
    return torch.bincount(labels[labels != IGNORE_INDEX], minlength=num_classes)


def _class_weights(counts: Tensor, balance: float) -> Tensor:
    """(class share * C)^-balance for each class: 1 everywhere for equally frequent classes."""
    counts = counts.double()
    return (counts.clamp_min(1) * len(counts) / counts.sum()).pow(-balance)


def _solve(
    tasks: Sequence[tuple[RidgeStatistics, float]], ranks: Sharing
) -> list[tuple[Tensor, Tensor]]:
    """fp32 solutions (D, C) and (C,) for strengths relative to the feature variance.

    Every rank solves some of the tasks, and all go on with the same numbers.
    """

    def own() -> Tensor:
        solutions = []
        for number, (statistics, ridge) in enumerate(tasks):
            dims, classes = statistics.cross.shape
            if not ranks.mine(number):
                solutions.append(statistics.cross.new_zeros(dims + 1, classes).float())
                continue
            scale = statistics.mean_variance.clamp_min(torch.finfo(torch.float64).tiny)
            weight, bias = statistics.solve(ridge * statistics.weight * scale)
            solutions.append(torch.cat((weight, bias[None])).float())
        return torch.stack(solutions)

    (solved,) = ranks.add(ranks.meet("the probe's solution", own))
    return [(solution[:-1], solution[-1]) for solution in solved]

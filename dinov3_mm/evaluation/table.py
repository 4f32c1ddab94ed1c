"""One table: k-NN accuracy of trained features beside everything that needs no training."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from dinov3_mm.datasets.evaluation_images import (
    ImageSet,
    ImageSource,
    check_semantic_classes,
    paired_labels,
)
from dinov3_mm.features.frozen import (
    extract_features,
    gather_shards,
    preserved_random_state,
    shard_indices,
)
from dinov3_mm.models.backbones.zoo import IMAGENET_MEAN, IMAGENET_STD
from dinov3_mm.models.pretraining.diagnostics import effective_rank

from .dense_probe import DenseProbeResult, dense_linear_probe, stack_masks
from .knn import chance_level, knn_classify

RAW_PIXELS = "raw pixels"
COLOUR_HISTOGRAM = "colour histogram"
RANDOM_CLS = "random init, CLS"
RANDOM_PATCHES = "random init, mean patches"
TRAINED_CLS = "trained, CLS"
TRAINED_PATCHES = "trained, mean patches"


@dataclass(frozen=True)
class Row:
    """One representation: its size, its k-NN top-1 in percent by k and its effective rank."""

    name: str
    dims: int
    top1: dict[int, float]
    effective_rank: float

    @property
    def best(self) -> float:
        """Top-1 at the best k."""
        return max(self.top1.values())


@dataclass
class RepresentationTable:
    """k-NN rows, the chance level, and the dense probe by patch representation (may be empty)."""

    rows: list[Row]
    chance: float
    num_train: int
    num_test: int
    image_size: int
    dense: dict[str, DenseProbeResult] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no row {name!r}; rows are {[row.name for row in self.rows]}")

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self)

    def print(self, console: Console | None = None) -> None:
        """Print with rich: the best value of each column in bold."""
        console = console or Console()
        console.print(self._knn_table())
        if self.dense:
            console.print(self._dense_table())

    def _knn_table(self) -> Table:
        table = Table(
            title=f"k-NN top-1 (%), {self.num_test} images against {self.num_train}, "
            f"{self.image_size} px"
        )
        ks = sorted(self.rows[0].top1)
        table.add_column("representation")
        for heading in ("dims", *[f"k={k}" for k in ks], "effective rank"):
            table.add_column(heading, justify="right")
        best = {k: max(row.top1[k] for row in self.rows) for k in ks}
        table.add_row("chance", "", *[f"{self.chance:.1f}" for _ in ks], "")
        for row in self.rows:
            values = [_cell(row.top1[k], best[k]) for k in ks]
            table.add_row(row.name, str(row.dims), *values, f"{row.effective_rank:.1f}")
        return table

    def _dense_table(self) -> Table:
        table = Table(title="linear probe of patches (%)")
        columns = ("patch_miou", "patch_accuracy", "pixel_miou", "pixel_accuracy")
        table.add_column("patch features")
        for heading in ("patch mIoU", "patch acc", "pixel mIoU", "pixel acc"):
            table.add_column(heading, justify="right")
        best = {name: max(getattr(r, name) for r in self.dense.values()) for name in columns}
        chance = next(iter(self.dense.values())).chance_miou
        table.add_row("chance", f"{chance:.1f}", "", "", "")
        for name, result in self.dense.items():
            table.add_row(name, *[_cell(getattr(result, c), best[c]) for c in columns])
        return table


def representation_table(
    backbone: nn.Module,
    train_source: ImageSource,
    test_source: ImageSource,
    *,
    image_size: int,
    resize_size: int | None = None,
    k: Sequence[int] = (10, 20),
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    batch_size: int = 64,
    amp_dtype: torch.dtype | None = None,
    seed: int = 0,
    dense: bool = False,
) -> RepresentationTable:
    """k-NN of raw pixels, colour histogram, the untrained and the trained network, in one call.

    Args:
        backbone: the trained backbone, with ``forward_tokens`` and ``arch_settings``.
        train_source, test_source: labelled sources (``label(i)``); for ``dense`` also
            ``semantic_mask(i)`` and ``num_semantic_classes``.
        image_size, resize_size: see `ImageSet`.
        k: neighbourhood sizes.
        mean, std, batch_size, amp_dtype: see `extract_features`.
        seed: of the untrained network's weights.
        dense: also probe the patch features linearly.
    """
    train = ImageSet(train_source, image_size, resize_size, cache=True)
    test = ImageSet(test_source, image_size, resize_size, cache=True)
    labels = paired_labels(train_source, test_source)
    vectors: dict[str, tuple[Tensor, Tensor]] = {
        RAW_PIXELS: (raw_pixels(train), raw_pixels(test)),
        COLOUR_HISTOGRAM: (colour_histogram(train), colour_histogram(test)),
    }
    grids: dict[str, tuple[Tensor, Tensor]] = {}
    if dense:
        size = backbone.patch_size
        grids[RAW_PIXELS] = (raw_patches(train, size), raw_patches(test, size))
    options = {"mean": mean, "std": std, "batch_size": batch_size, "amp_dtype": amp_dtype}
    networks = {
        "random init": (random_init_backbone(backbone, seed), RANDOM_CLS, RANDOM_PATCHES),
        "trained": (backbone, TRAINED_CLS, TRAINED_PATCHES),
    }
    for state, (network, cls_name, patch_name) in networks.items():
        both = [extract_features(network, s, patches=dense, **options) for s in (train, test)]
        vectors[cls_name] = (both[0].cls, both[1].cls)
        vectors[patch_name] = (both[0].mean_patch, both[1].mean_patch)
        if dense:
            grids[state] = (both[0].patches, both[1].patches)
    return RepresentationTable(
        rows=[_row(name, *pair, *labels, k) for name, pair in vectors.items()],
        chance=chance_level(*labels),
        num_train=len(train),
        num_test=len(test),
        image_size=image_size,
        dense=_dense(grids, train, test) if dense else {},
    )


def _row(
    name: str, train: Tensor, test: Tensor, train_labels: Tensor, test_labels: Tensor, k
) -> Row:
    scores = knn_classify(train, train_labels, test, test_labels, k)
    top1 = {size: score.top1 for size, score in scores.items()}
    return Row(name, train.shape[1], top1, effective_rank(test))


def _dense(
    grids: dict[str, tuple[Tensor, Tensor]], train: ImageSet, test: ImageSet
) -> dict[str, DenseProbeResult]:
    classes = check_semantic_classes(train.source, test.source)
    masks = stack_masks(train), stack_masks(test)
    return {
        name: dense_linear_probe(a, masks[0], b, masks[1], classes)
        for name, (a, b) in grids.items()
    }


def _cell(value: float, best: float) -> str:
    return f"[bold]{value:.1f}[/bold]" if value == best else f"{value:.1f}"


# --- What training must beat: raw pixels, colour histograms, the untrained network ---


def raw_pixels(images: Dataset, size: int = 16) -> Tensor:
    """Pixels at ``size`` x ``size``, centred image by image: (N, 3 * size^2) fp32.

    Without the centring, cosine similarity mostly compares mean brightness.
    """

    def describe(image: Tensor) -> Tensor:
        small = F.interpolate(image[None].float() / 255, size=(size, size), mode="area").flatten()
        return small - small.mean()

    return _describe(images, describe)


def colour_histogram(images: Dataset, bins: int = 8) -> Tensor:
    """Square roots of joint RGB histograms, (N, bins^3) fp32.

    Their cosine is the Bhattacharyya coefficient of the two colour distributions.
    """

    def describe(image: Tensor) -> Tensor:
        levels = (image.flatten(1).long() * bins) // 256
        cells = (levels[0] * bins + levels[1]) * bins + levels[2]
        return (torch.bincount(cells, minlength=bins**3) / cells.numel()).sqrt()

    return _describe(images, describe)


def raw_patches(images: Dataset, patch_size: int = 16) -> Tensor:
    """Pixels of every patch, (N, P, 3 * patch_size^2) fp32: the dense counterpart of raw pixels."""

    def describe(image: Tensor) -> Tensor:
        columns = F.unfold(image[None].float() / 255, patch_size, stride=patch_size)
        return columns[0].T.contiguous()

    return _describe(images, describe)


def random_init_backbone(backbone: nn.Module, seed: int = 0) -> nn.Module:
    """The same architecture with freshly drawn weights, on the same device, in eval mode.

    Args:
        backbone: a module whose class rebuilds it from ``arch_settings``.
        seed: of the weights; the global random state is left alone.
    """
    with preserved_random_state():
        torch.manual_seed(seed)
        fresh = type(backbone)(arch=backbone.arch_settings)
        fresh.init_weights()
    return fresh.to(next(backbone.parameters()).device).eval()


def _describe(images: Dataset, describe) -> Tensor:
    """Stack ``describe(image)`` over this rank's share and gather the ranks' rows in order."""
    rows = torch.stack([describe(images[index]) for index in shard_indices(len(images))])
    return gather_shards(rows, len(images))

"""What a trained representation must beat: raw pixels, colour histograms, the untrained network."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from .features import preserved_random_state
from .ranks import gather_shards, shard_indices


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

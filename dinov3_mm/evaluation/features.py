"""Frozen features of an image set: CLS, mean patch and patch tokens after the final norm."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch
from mmengine.dist import all_gather, get_dist_info
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinov3_mm.models.pretraining.preprocessor import IMAGENET_MEAN, IMAGENET_STD


class Features(NamedTuple):
    """fp32 features on the CPU, in the order of the image set.

    Attributes:
        cls: (N, D) CLS tokens.
        mean_patch: (N, D) mean of the patch tokens.
        patches: (N, P, D) patch tokens in row-major order, or None when not asked for.
    """

    cls: Tensor
    mean_patch: Tensor
    patches: Tensor | None = None


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every sub-module into eval mode and give each its own mode back afterwards."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Give Python, NumPy and torch (CPU and current CUDA device) their random state back."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def extract_features(
    backbone: nn.Module,
    images: Dataset,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    patches: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    amp_dtype: torch.dtype | None = None,
) -> Features:
    """Features of all images from a backbone with ``forward_tokens``.

    Every rank of an initialised process group takes a contiguous share and receives the whole
    result in order; all ranks run the same number of batches, so sharded backbones work. The
    backbone runs in eval mode without gradients on its own device, and its modes are restored.

    Args:
        backbone: ``forward_tokens(images (B, C, S, S)) -> object with .cls and .patches``.
        images: (C, S, S) tensors by index, uint8 or float32 in 0..255, e.g. an `ImageSet`.
        mean, std: per-channel statistics in [0, 1], those the backbone was trained with
            (:func:`dinov3_mm.checkpoints.read_statistics`).
        patches: also return all patch tokens (N * P * D * 4 bytes of host memory on every rank).
        batch_size: images per forward of one rank.
        num_workers: loading processes; 0 loads in this process.
        amp_dtype: autocast to this dtype (``torch.bfloat16``); None runs in the parameters' dtype.

    Raises:
        ValueError: if images, statistics and backbone are for different numbers of channels.
    """
    device = next(backbone.parameters()).device
    indices = shard_indices(len(images))
    loader = DataLoader(
        _Subset(images, indices),
        batch_size=batch_size,
        num_workers=num_workers,
        generator=torch.Generator(),  # else the loader draws its seed from the global generator
    )
    offset = torch.tensor(mean, device=device).view(-1, 1, 1) * 255
    scale = 1 / (torch.tensor(std, device=device).view(-1, 1, 1) * 255)
    autocast = torch.autocast(device.type, amp_dtype) if amp_dtype else nullcontext()
    parts: list[Features] = []
    with torch.no_grad(), evaluating(backbone), autocast:
        for batch in loader:
            _check_channels(batch, mean, std, backbone)
            batch = batch.to(device).float().sub_(offset).mul_(scale)
            tokens = backbone.forward_tokens(batch)
            features = tokens.patches.float()
            parts.append(
                Features(
                    tokens.cls.float().cpu(),
                    features.mean(dim=1).cpu(),
                    features.cpu() if patches else None,
                )
            )
    columns = [torch.cat(c) if c[0] is not None else None for c in zip(*parts)]
    return Features(*[None if c is None else gather_shards(c, len(images)) for c in columns])


def _check_channels(
    batch: Tensor, mean: Sequence[float], std: Sequence[float], backbone: nn.Module
) -> None:
    channels = batch.shape[1]
    taken = getattr(backbone, "arch_settings", {}).get("in_channels", channels)
    if not channels == len(mean) == len(std) == taken:
        raise ValueError(
            f"the images have {channels} channels, mean and std {len(mean)} and {len(std)} values, "
            f"and the backbone takes {taken} channels: give the statistics that the backbone was "
            "trained with (read_statistics(FILE)) and images of as many channels"
        )


def shard_indices(total: int) -> list[int]:
    """This rank's contiguous share of ``range(total)``, equally long on all (the last repeats)."""
    rank, world_size = get_dist_info()
    share = -(-total // world_size)
    return [min(index, total - 1) for index in range(rank * share, (rank + 1) * share)]


def gather_shards(values: Tensor, total: int) -> Tensor:
    """All ranks' rows for `shard_indices` in order, without the repetitions: (total, ...)."""
    if get_dist_info()[1] == 1:
        return values
    return torch.cat(all_gather(values))[:total]


class _Subset(Dataset):
    """Chosen indices of a dataset; a cached `ImageSet` so keeps only this rank's share."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Tensor:
        return self.dataset[self.indices[position]]

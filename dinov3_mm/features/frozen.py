"""Frozen features of an image set: CLS, mean patch and patch tokens after the final norm."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from mmengine.dist import all_gather, all_gather_object, all_reduce, get_dist_info
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinov3_mm.models.backbones.zoo import IMAGENET_MEAN, IMAGENET_STD


class Features(NamedTuple):
    """fp32 features in the order of the image set.

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
    device: str | torch.device | None = "cpu",
    gather: bool = True,
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
        patches: also return all patch tokens (N * P * D * 4 bytes of memory on every rank, over
            the number of ranks without ``gather``).
        batch_size: images per forward of one rank.
        num_workers: loading processes; 0 loads in this process.
        amp_dtype: autocast to this dtype (``torch.bfloat16``); None runs in the parameters' dtype.
        device: where the features are kept; None for the backbone's, with which nothing is copied
            to the host.
        gather: give every rank all rows; False leaves each its own, those of
            :func:`~dinov3_mm.features.frozen.share_of`.

    Raises:
        ValueError: if images, statistics and backbone are for different numbers of channels.
        OtherRankError: if another rank could not read or describe its images.
    """
    options = (mean, std, patches, batch_size, num_workers, amp_dtype, device)
    own = together("extraction", lambda: _own_rows(backbone, images, *options))
    if not gather:
        count = len(share_of(len(images)))
        return Features(*[None if c is None else c[:count] for c in own])
    return Features(*[None if c is None else gather_shards(c, len(images)) for c in own])


@torch.no_grad()
def _own_rows(
    backbone: nn.Module,
    images: Dataset,
    mean: Sequence[float],
    std: Sequence[float],
    patches: bool,
    batch_size: int,
    num_workers: int,
    amp_dtype: torch.dtype | None,
    kept_on: str | torch.device | None,
) -> Features:
    """Features of this rank's images, those repeated at the end included."""
    device = next(backbone.parameters()).device
    kept_on = device if kept_on is None else torch.device(kept_on)
    on_gpu = device.type == "cuda"
    loader = DataLoader(
        _Subset(images, shard_indices(len(images))),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=on_gpu,
        generator=torch.Generator(),  # else the loader draws its seed from the global generator
    )
    offset = torch.tensor(mean, device=device).view(-1, 1, 1) * 255
    scale = 1 / (torch.tensor(std, device=device).view(-1, 1, 1) * 255)
    autocast = torch.autocast(device.type, amp_dtype) if amp_dtype else nullcontext()
    parts: list[Features] = []
    batches, error = iter(loader), None
    with evaluating(backbone), autocast:
        for _ in range(len(loader)):
            if error is None:
                try:
                    batch = next(batches)
                except Exception as caught:  # raised below
                    # The forwards of a sharded backbone are collectives: the others wait for them.
                    batch, error = _blank(backbone, len(mean)), caught
            _check_channels(batch, mean, std, backbone)
            pixels = batch.to(device, non_blocking=on_gpu).float().sub_(offset).mul_(scale)
            tokens = backbone.forward_tokens(pixels)
            features = tokens.patches.float()
            parts.append(
                Features(
                    tokens.cls.float().to(kept_on),
                    features.mean(dim=1).to(kept_on),
                    features.to(kept_on) if patches else None,
                )
            )
    if error is not None:
        raise error
    return Features(*[torch.cat(c) if c[0] is not None else None for c in zip(*parts)])


def _blank(backbone: nn.Module, channels: int) -> Tensor:
    """One image of a patch, for forwards whose results do not count."""
    side = getattr(backbone, "token_stride", 32)
    return torch.zeros(1, channels, side, side, dtype=torch.uint8)


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


class _Subset(Dataset):
    """Chosen indices of a dataset; a cached `ImageSet` so keeps only this rank's share."""

    def __init__(self, dataset: Dataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Tensor:
        return self.dataset[self.indices[position]]


# --- Work shared by ranks ---
#
# What a rank does between two collectives is given to :func:`together`, so that the ranks meet
# again before each collective and an error on one of them ends all.


Result = TypeVar("Result")


class OtherRankError(RuntimeError):
    """Another rank failed; this one had no error of its own."""


def share_of(total: int) -> range:
    """This rank's rows of ``total``: contiguous, none twice; the last ranks may have none."""
    rank, world_size = get_dist_info()
    share = -(-total // world_size)
    return range(min(rank * share, total), min((rank + 1) * share, total))


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


def sum_over_ranks(*values: Tensor) -> tuple[Tensor, ...]:
    """Sums of tensors over the ranks, the same on all of them; the tensors are not changed."""
    if get_dist_info()[1] == 1:
        return values
    summed = tuple(value.clone() for value in values)
    for value in summed:
        all_reduce(value)
    return summed


def together(what: str, work: Callable[[], Result]) -> Result:
    """Run work without collectives on every rank; an error on any of them is an error on all.

    Args:
        what: the work in words, for the message on the other ranks.
        work: gives this rank's result.

    Raises:
        OtherRankError: Another rank failed, named with its error. The error itself is raised on the
            rank that had it.
    """
    error, result = None, None
    try:
        result = work()
    except Exception as caught:  # raised below, when the others know
        error = caught
    if get_dist_info()[1] > 1:
        failed = torch.tensor(int(error is not None))
        all_reduce(failed, "max")
        if failed.item():
            errors = all_gather_object(
                None if error is None else f"{type(error).__name__}: {error}"
            )
            if error is None:
                rank, text = next((r, text) for r, text in enumerate(errors) if text is not None)
                raise OtherRankError(f"{what} failed on rank {rank}: {text}")
    if error is not None:
        raise error
    return result


@dataclass(frozen=True)
class Sharing:
    """Whether an evaluation is shared by the ranks, or each rank does all of it for itself.

    Attributes:
        on: shared; of no effect in one process.
    """

    on: bool

    def rows(self, total: int) -> slice:
        """The rows that this rank takes."""
        rows = share_of(total) if self.on else range(total)
        return slice(rows.start, rows.stop)

    def mine(self, number: int) -> bool:
        """Whether this rank takes the task of a number."""
        rank, world_size = get_dist_info()
        return not self.on or number % world_size == rank

    def meet(self, what: str, work: Callable[[], Result]) -> Result:
        """See :func:`together`."""
        return together(what, work) if self.on else work()

    def add(self, *values: Tensor) -> tuple[Tensor, ...]:
        """See :func:`sum_over_ranks`."""
        return sum_over_ranks(*values) if self.on else values

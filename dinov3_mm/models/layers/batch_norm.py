"""Batch normalisation in networks that are averaged over time and trained on several processes."""

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn
from torch.nn import functional as F

BATCH_NORM_MODES = ("sync", "frozen", "group")
_GROUPS = 32


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with the statistics of all processes' images, on any device.

    Equal numbers of images on all processes. Values and gradients are those of one process with the
    whole batch, and the running statistics stay equal on all of them. A batch that is not finite
    leaves the running statistics as they are.

    Attributes:
        keeps_statistics (bool): whether batches in training move the running statistics.
    """

    keeps_statistics = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dims = (0, 2, 3)
        with torch.autocast(x.device.type, enabled=False):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            mean = _mean_over_ranks(wide.mean(dims))
            centred = wide - mean[:, None, None]
            variance = _mean_over_ranks(centred.square().mean(dims))
            if self.keeps_statistics:
                self._track(mean.detach(), variance.detach(), x.numel() // x.shape[1])
            scale = torch.rsqrt(variance + self.eps) * self.weight
            return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        count *= dist.get_world_size() if _is_distributed() else 1
        unbiased = variance * (count / max(1, count - 1))
        for running, value in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(torch.where(value.isfinite(), value, running), self.momentum)
        self.num_batches_tracked += 1


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that always uses its running statistics; weight and bias train."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


def convert_batch_norm(module: nn.Module, mode: str) -> nn.Module:
    """Replace every ``BatchNorm2d`` below ``module`` in place.

    Args:
        module: network. What a subclass of ``BatchNorm2d`` holds as sub-modules (timm's dropout
            and activation) runs after the norm, as before.
        mode: 'sync' for :class:`SyncedBatchNorm2d`, 'frozen' for :class:`FrozenBatchNorm2d`,
            'group' for ``GroupNorm`` with 32 groups, or fewer where the channels do not divide.

    Returns:
        The module, or what replaces it.

    Raises:
        ValueError: An unknown mode.
    """
    if mode not in BATCH_NORM_MODES:
        raise ValueError(f"batch_norm must be one of {BATCH_NORM_MODES}, got {mode!r}")
    if isinstance(module, nn.BatchNorm2d):
        return _converted(module, mode)
    for name, child in list(module.named_children()):
        setattr(module, name, convert_batch_norm(child, mode))
    return module


def _converted(norm: nn.BatchNorm2d, mode: str) -> nn.Module:
    after = list(norm.children())
    if mode == "group":
        groups = next(g for g in range(_GROUPS, 0, -1) if norm.num_features % g == 0)
        new = nn.GroupNorm(groups, norm.num_features, eps=norm.eps)
        new.weight, new.bias = norm.weight, norm.bias
        return nn.Sequential(new, *after) if after else new
    # The class only: parameters, buffers, names and what a subclass holds stay.
    synced, frozen = (SyncedBatchNormThen, FrozenBatchNormThen) if after else _PLAIN
    norm.__class__ = synced if mode == "sync" else frozen
    return norm.train(norm.training)


class _ThenChildren:
    """A norm followed by the modules it holds, in order: dropout and activation in timm."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for child in self.children():
            x = child(x)
        return x


class SyncedBatchNormThen(_ThenChildren, SyncedBatchNorm2d):
    """:class:`SyncedBatchNorm2d` followed by the modules it holds."""


class FrozenBatchNormThen(_ThenChildren, FrozenBatchNorm2d):
    """:class:`FrozenBatchNorm2d` followed by the modules it holds."""


_PLAIN = (SyncedBatchNorm2d, FrozenBatchNorm2d)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of a tensor over all processes; gradients flow back to all of them."""
    if not _is_distributed():
        return values
    return dist_nn.all_reduce(values) / dist.get_world_size()

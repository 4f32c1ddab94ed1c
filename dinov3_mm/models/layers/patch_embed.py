"""Patch embedding."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PatchEmbed(nn.Module):
    """Linear embedding of non-overlapping square patches.

    The weight has the layout of a convolution (D, C, p, p), but it is applied as a matrix product.

    Args:
        in_channels: image channels C.
        dims: output channels D.
        patch_size: side p in pixels.
    """

    def __init__(self, in_channels: int, dims: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, dims, patch_size, patch_size)

    def grid_size(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of ``image`` (..., H, W); trailing pixels do not count."""
        return image.shape[-2] // self.patch_size, image.shape[-1] // self.patch_size

    def forward(self, images: list[Tensor]) -> Tensor:
        """Embed the patches of batches (B, C, H, W) into one matrix (sum of B * h * w, D).

        Rows are ordered by entry, image, patch row, patch column.
        """
        weight = self.proj.weight
        pixels = [self._unfold(batch.to(weight.dtype)) for batch in images]
        pixels = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
        return F.linear(pixels, weight.flatten(1), self.proj.bias)

    def _unfold(self, batch: Tensor) -> Tensor:
        p = self.patch_size
        images, channels = batch.shape[:2]
        rows, columns = self.grid_size(batch)
        batch = batch[..., : rows * p, : columns * p]
        batch = batch.reshape(images, channels, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5)
        return batch.reshape(images * rows * columns, channels * p * p)

    def init_weights(self) -> None:
        """Draw weight and bias from U(-1/sqrt(C p^2), 1/sqrt(C p^2))."""
        bound = 1 / math.sqrt(self.proj.weight[0].numel())
        nn.init.uniform_(self.proj.weight, -bound, bound)
        nn.init.uniform_(self.proj.bias, -bound, bound)

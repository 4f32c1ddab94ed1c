"""The building blocks of ConvNeXt (Liu et al., arXiv 2201.03545), on maps (B, H, W, C).

With the channels last, norms and pointwise layers need no copy, and the map seen as (B, C, H, W)
has the ``channels_last`` memory format, the fast one for convolutions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import Linear
from .block import LayerNorm, run_recomputed

# Inference on the CPU runs as many positions at a time as keep the hidden layer within this many
# bytes: it stays in the cache, and its buffer is kept by the allocator. Buffers of 32 MiB and more
# are mapped afresh by the operating system each time, page fault by page fault.
_CHUNK_BYTES = 8 * 2**20


class PatchConv2d(nn.Conv2d):
    """Convolution with equal kernel and stride; trailing rows and columns are dropped.

    Args:
        in_channels, out_channels: channels of input and output.
        stride: side of the kernel, and step.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H // stride, W // stride, D)."""
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DepthwiseConv2d(nn.Conv2d):
    """7 x 7 convolution of each channel with itself, padded to keep the size.

    Args:
        dims: channels.
    """

    def __init__(self, dims: int) -> None:
        super().__init__(dims, dims, 7, padding=3, groups=dims)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, H, W, C) to the same shape."""
        # Through this view the gradient has the strides of the weight, and of DDP's buckets.
        weight = self.weight.flatten(1).view(self.weight.shape)
        return self._conv_forward(x.permute(0, 3, 1, 2), weight, self.bias).permute(0, 2, 3, 1)


class ConvNeXtBlock(nn.Module):
    """``x + gamma * pwconv2(gelu(pwconv1(norm(dwconv(x)))))`` with per-sample stochastic depth.

    Args:
        dims: width C; the hidden width is 4 C.
        layer_scale_init_value: initial ``gamma``; 0 leaves it out.
        drop_rate: probability that an image skips the residual branch in training.
        with_cp: one of ``recompute.MODES``: what the backward pass computes again.
    """

    def __init__(
        self,
        dims: int,
        *,
        layer_scale_init_value: float = 0.0,
        drop_rate: float = 0.0,
        with_cp: bool | str = False,
    ) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.drop_rate = drop_rate
        self.init_value = layer_scale_init_value
        # Registration order is the key order of the official files.
        self.gamma = (
            nn.Parameter(torch.full((dims,), layer_scale_init_value))
            if layer_scale_init_value
            else None
        )
        self.dwconv = DepthwiseConv2d(dims)
        self.norm = LayerNorm(dims, eps=1e-6)
        self.pwconv1 = Linear(dims, 4 * dims)
        self.pwconv2 = Linear(4 * dims, dims)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Run the block.

        Args:
            x: map (B, H, W, C).
            scale: factor on the residual of each image (B, 1, 1, 1), see :meth:`draw_scale`.
        """
        if self.with_cp and torch.is_grad_enabled():
            # Within the block, so that a compiler of the block sees what is to be kept.
            return run_recomputed(self.with_cp, self._add_branch, x, scale)
        return self._add_branch(x, scale)

    def _add_branch(self, x: Tensor, scale: Tensor | None) -> Tensor:
        branch = self.dwconv(x)
        rows = self._max_chunk_rows(x)
        if rows is None:
            return self._add_pointwise(x, branch, scale)
        # Positions are independent of each other.
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        parts = (tensor.reshape(-1, x.shape[-1]).split(rows) for tensor in (out, x, branch))
        for out_part, x_part, branch_part in zip(*parts):
            out_part.copy_(self._add_pointwise(x_part, branch_part, None))
        return out

    def _add_pointwise(self, x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
        """``x`` plus the scaled pointwise layers of ``branch``, both (..., C)."""
        branch = self.pwconv2(F.gelu(self.pwconv1(self.norm(branch))))
        gamma = None if self.gamma is None else self.gamma.to(x.dtype)
        if scale is not None:
            gamma = scale.to(x.dtype) if gamma is None else gamma * scale.to(x.dtype)
        return x + branch if gamma is None else torch.addcmul(x, branch, gamma)

    def _max_chunk_rows(self, x: Tensor) -> int | None:
        """Positions to run at a time, None for all."""
        if self.training or torch.is_grad_enabled() or x.device.type != "cpu":
            return None
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return None
        rows = _CHUNK_BYTES // (self.pwconv1.out_features * x.element_size())
        return rows if rows < x.numel() // x.shape[-1] else None

    def draw_scale(self, images: int, device: torch.device) -> Tensor | None:
        """Draw which images keep the residual: 0, or 1 / (1 - drop_rate); None in eval mode."""
        if not self.training or not self.drop_rate:
            return None
        keep_rate = 1 - self.drop_rate
        kept = torch.floor(keep_rate + torch.rand(images, 1, 1, 1, device=device))
        return kept / keep_rate

"""The simple feature pyramid of ViTDet (arXiv 2203.16527, section 3)."""

import math
from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Levels of several strides from the last feature map of a backbone of one stride.

    Each level is made from the same map: transposed convolutions of stride 2 for finer levels, max
    pooling of stride 2 for coarser ones. A 1x1 and a 3x3 convolution, each with a LayerNorm over
    the channels, then bring every level to ``out_channels``.

    Args:
        in_channels: channels of the feature map.
        out_channels: channels of every level.
        in_stride: stride of the feature map in pixels: the patch size.
        strides: strides of the levels in pixels, ascending; each is ``in_stride`` times a power of
            two, at least ``in_stride / 4``. None stands for ``in_stride`` times 1/4, 1/2, 1, 2.
        num_outs: number of outputs; those beyond ``strides`` take every second value of the one
            before. None for as many as strides.
        init_cfg: MMEngine initialisation config.

    Attributes:
        strides: stride of every output in pixels, for anchors and RoI extractors.

    Raises:
        ValueError: If strides or ``num_outs`` do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        *,
        in_stride: int = 16,
        strides: Sequence[float] | None = None,
        num_outs: int | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        octaves = (-2, -1, 0, 1)
        if strides is not None:
            octaves = [_octave(stride, in_stride) for stride in strides]
            if not octaves or octaves != sorted(set(octaves)):
                raise ValueError(f"strides are {strides}; expected distinct strides, ascending")
        num_outs = len(octaves) if num_outs is None else num_outs
        if num_outs < len(octaves):
            raise ValueError(f"num_outs is {num_outs} for {len(octaves)} levels; expected no fewer")
        self.in_channels = in_channels
        self.out_channels = out_channels
        extra = range(octaves[-1] + 1, octaves[-1] + 1 + num_outs - len(octaves))
        self.strides = tuple(_stride(octave, in_stride) for octave in (*octaves, *extra))
        self.levels = nn.ModuleList(_level(in_channels, out_channels, o) for o in octaves)

    def forward(self, inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Build the pyramid.

        Args:
            inputs: feature map (B, ``in_channels``, h, w), or the outputs of a backbone, whose last
                one is taken.

        Returns:
            Levels (B, ``out_channels``, ...), the finest first.
        """
        features = inputs if isinstance(inputs, Tensor) else inputs[-1]
        outputs = [level(features) for level in self.levels]
        while len(outputs) < len(self.strides):
            outputs.append(outputs[-1][..., ::2, ::2])
        return tuple(outputs)


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map (B, C, H, W), in the dtype of the map."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise each position of ``x`` (B, C, H, W)."""
        y = F.layer_norm(
            x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps
        ).movedim(-1, 1)
        return y.to(x.dtype, memory_format=torch.contiguous_format)


def _octave(stride: float, in_stride: int) -> int:
    """Doublings of the stride from the input to a level, negative for finer levels."""
    octave = math.log2(stride / in_stride) if stride > 0 else math.nan
    if octave not in range(-2, 16):
        known = ", ".join(str(_stride(octave, in_stride)) for octave in range(-2, 3))
        raise ValueError(
            f"a map of stride {in_stride} has no level of stride {stride}; expected {known}, ..."
        )
    return int(octave)


def _stride(octave: int, in_stride: int) -> int | float:
    stride = in_stride * 2.0**octave
    return int(stride) if stride.is_integer() else stride


def _level(in_channels: int, out_channels: int, octave: int) -> nn.Sequential:
    resized, channels = _resize(in_channels, octave)
    return nn.Sequential(
        *resized,
        nn.Conv2d(channels, out_channels, 1, bias=False),
        ChannelLayerNorm(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        ChannelLayerNorm(out_channels),
    )


def _resize(channels: int, octave: int) -> tuple[list[nn.Module], int]:
    """Layers that multiply the stride by ``2**octave``, and the number of channels they return.

    A transposed convolution halves the channels; between two of them stand a norm and a GELU.
    """
    if octave >= 0:
        return [nn.MaxPool2d(2) for _ in range(octave)], channels
    layers: list[nn.Module] = []
    for _ in range(-octave):
        if layers:
            layers += [ChannelLayerNorm(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
        channels //= 2
    return layers, channels

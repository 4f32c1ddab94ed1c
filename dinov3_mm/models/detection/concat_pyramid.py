"""A pyramid over several layers of a plain ViT."""

from collections.abc import Sequence

import torch
from mmengine.registry import MODELS
from torch import Tensor

from dinov3_mm.models.adapters import SimpleFeaturePyramid


@MODELS.register_module()
class DINOv3ConcatPyramid(SimpleFeaturePyramid):
    """:class:`SimpleFeaturePyramid` over all maps of the backbone, concatenated on the channels.

    The released detector, too, concatenates four layers. ``in_channels`` is the number of layers
    times the width of the backbone, whose ``out_indices`` name the layers.
    """

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Build the pyramid.

        Args:
            inputs: maps (B, C, h, w) of one size.

        Returns:
            Levels (B, ``out_channels``, ...), the finest first.

        Raises:
            ValueError: if the maps are of several sizes, or do not add up to ``in_channels``.
        """
        sizes = {tuple(x.shape[-2:]) for x in inputs}
        channels = sum(x.shape[1] for x in inputs)
        if len(sizes) > 1 or channels != self.in_channels:
            raise ValueError(
                f"got {len(inputs)} maps of sizes {sorted(sizes)} and {channels} channels "
                f"together, expected maps of one size and in_channels={self.in_channels}: the "
                "layers in out_indices of a ViT times its width; a ConvNeXt takes an FPN"
            )
        return super().forward(torch.cat(tuple(inputs), dim=1))

"""The linear probe of depth: batch norm and a 1 x 1 convolution on frozen features."""

from collections.abc import Sequence

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from .depth_head import DepthHead
from .features import check_levels


@MODELS.register_module()
class DINOv3LinearDepthHead(DepthHead):
    """A linear layer per patch.

    Maps of all layers are resized bilinearly to the first one's size and put together, then come
    batch norm and a 1 x 1 convolution. Parameters carry the names of the official trainer's files
    (kind 'linear_depth').

    Args:
        in_channels: width of each layer.
        use_batchnorm: normalise the features.
        use_cls_token: put CLS behind the channels of each layer, the same at every patch.
        init_cfg: MMEngine initialisation config; by default of the convolution, N(0, 0.01).
        **kwargs: see :class:`DepthHead`.
    """

    # A probe is a small product, and what it shows should not depend on rounding.
    computes_in_fp32 = True

    def __init__(
        self,
        in_channels: int | Sequence[int],
        *,
        use_batchnorm: bool = True,
        use_cls_token: bool = False,
        init_cfg: dict | list[dict] | None = None,
        **kwargs,
    ) -> None:
        initial = init_cfg or dict(type="Normal", layer="Conv2d", std=0.01)
        super().__init__(in_channels, init_cfg=initial, **kwargs)
        self.use_cls_token = use_cls_token
        width = sum(self.in_channels) * (1 + use_cls_token)
        self.batchnorm_layer = nn.BatchNorm2d(width) if use_batchnorm else nn.Identity()
        self.conv_depth = nn.Conv2d(width, self.num_bins, 1)

    def forward(self, feats: Sequence) -> Tensor:
        """Logits (B, ``num_bins``, h, w) at the resolution of the first layer.

        Raises:
            ValueError: if the layers are not those of ``in_channels``.
        """
        levels = check_levels(
            feats, self.in_channels, needs_cls=self.use_cls_token, head=type(self).__name__
        )
        size = levels[0][0].shape[-2:]
        parts = []
        for featmap, cls in levels:
            if self.use_cls_token:
                spread = cls[:, :, None, None].expand(-1, -1, *featmap.shape[-2:])
                featmap = torch.cat((featmap, spread), dim=1)
            if featmap.shape[-2:] != size:
                featmap = F.interpolate(featmap, size=size, mode="bilinear", align_corners=False)
            parts.append(featmap)
        return self.conv_depth(self.batchnorm_layer(torch.cat(parts, dim=1)))

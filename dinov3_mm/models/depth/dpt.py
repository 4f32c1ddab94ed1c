"""DPT (arXiv 2103.13413) for depth: the head of the released depth and canopy-height models."""

from collections.abc import Sequence

import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmseg.models.decode_heads.dpt_head import FeatureFusionBlock
from torch import Tensor, nn

from .depth_head import DepthHead
from .dpt_reassemble import DPTReassemble
from .features import check_levels


class DepthOutput(BaseModule):
    """From fused features to logits at twice their resolution.

    There is no activation before the upsampling.

    Args:
        channels: width of the features.
        hidden_channels: width before the last convolution.
        num_bins: channels of the output.
    """

    def __init__(self, channels: int, hidden_channels: int, num_bins: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 3, padding=1),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            nn.Conv2d(channels // 2, hidden_channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden_channels, num_bins, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, ``num_bins``, 2 H, 2 W)."""
        return self.head(x)


@MODELS.register_module()
class DINOv3DPTDepthHead(DepthHead):
    """DPT on four layers: reassembled at four strides, fused from coarse to fine.

    The trunk is that of mmseg's ``DPTHead``. All parameters carry the names of the released files
    (kind 'dpt_depth'). With layers (B, C, h, w) of one stride 16 the logits have the size
    ``32 ceil(h / 2) x 32 ceil(w / 2)``: that of the image if h and w are even, up to 16 pixels more
    otherwise.

    Args:
        in_channels: widths of the four layers, shallow to deep.
        channels: width D of the fused features.
        post_process_channels: widths of the four reassembled maps.
        hidden_channels: width before the last convolution.
        readout, use_batchnorm, rescale: see
            :class:`~dinov3_mm.models.depth.dpt_reassemble.DPTReassemble`.
        use_bias: biases in the residual units.
        projection_after_fusion: a 3 x 3 convolution and ReLU before the output.
        **kwargs: see :class:`DepthHead`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        channels: int = 512,
        post_process_channels: Sequence[int] = (1024, 1024, 1024, 1024),
        hidden_channels: int = 32,
        readout: str = "ignore",
        use_batchnorm: bool = True,
        rescale: bool = True,
        use_bias: bool = False,
        projection_after_fusion: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(in_channels, **kwargs)
        self.readout = readout
        self.reassemble_blocks = DPTReassemble(
            self.in_channels,
            post_process_channels,
            readout=readout,
            use_batchnorm=use_batchnorm,
            rescale=rescale,
        )
        self.convs = nn.ModuleList(
            ConvModule(width, channels, 3, padding=1, act_cfg=None, bias=False)
            for width in post_process_channels
        )
        self.fusion_blocks = nn.ModuleList(
            FeatureFusionBlock(channels, act_cfg=dict(type="ReLU"), norm_cfg=None)
            for _ in self.convs
        )
        # The coarsest map has nothing to be added to.
        self.fusion_blocks[0].res_conv_unit1 = None
        if use_bias:
            _add_biases(self.fusion_blocks)
        self.project = (
            ConvModule(channels, channels, 3, padding=1)
            if projection_after_fusion
            else nn.Identity()
        )
        self.conv_depth = DepthOutput(channels, hidden_channels, self.num_bins)

    def fuse(self, feats: Sequence) -> Tensor:
        """Fused features (B, D, H, W), before the output.

        Raises:
            ValueError: if the layers are not those of ``in_channels``.
        """
        levels = check_levels(
            feats, self.in_channels, needs_cls=self.readout != "ignore", head=type(self).__name__
        )
        maps = [conv(x) for conv, x in zip(self.convs, self.reassemble_blocks(levels))]
        fused = self.fusion_blocks[0](maps[-1])
        for block, finer in zip(self.fusion_blocks[1:], reversed(maps[:-1])):
            fused = block(fused, finer)
        return self.project(fused)

    def forward(self, feats: Sequence) -> Tensor:
        """Logits (B, ``num_bins``, H', W')."""
        return self.conv_depth(self.fuse(feats))


def _add_biases(blocks: nn.ModuleList) -> None:
    """Give the residual units of mmseg, which have none, biases of 0."""
    for block in blocks:
        for unit in filter(None, (block.res_conv_unit1, block.res_conv_unit2)):
            for conv in (unit.conv1.conv, unit.conv2.conv):
                conv.bias = nn.Parameter(torch.zeros(conv.out_channels))

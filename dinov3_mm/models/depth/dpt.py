"""DPT (arXiv 2103.13413) for depth: the head of the released depth and canopy-height models."""

from collections.abc import Sequence

import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmseg.models.decode_heads.dpt_head import FeatureFusionBlock
from torch import Tensor, nn

from dinov3_mm.errors import hint

from .heads import DepthHead, Level, check_levels


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
            :class:`~dinov3_mm.models.depth.dpt.DPTReassemble`.
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


# --- The first part of DPT: tokens of four layers become maps of four strides ---


READOUTS = ("ignore", "add", "project")


class DPTReassemble(BaseModule):
    """Per layer: CLS into the patches, batch norm, 1 x 1 convolution, another stride.

    mmseg's ``ReassembleBlocks`` with its parameter names, plus batch norm and a width per layer.

    Args:
        in_channels: widths C_i of the four layers.
        out_channels: widths P_i of the four maps.
        readout: what becomes of CLS: 'ignore', 'add', or 'project' (patch and CLS through a linear
            layer and GELU).
        use_batchnorm: normalise what goes into the convolution.
        rescale: make maps of 4, 2, 1 and 1/2 times the resolution of their layer, as layers of one
            stride need; False leaves the layers of a pyramid as they are.

    Raises:
        ValueError: if the readout is unknown, or there are not four layers.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: Sequence[int],
        *,
        readout: str,
        use_batchnorm: bool,
        rescale: bool,
    ) -> None:
        super().__init__()
        if readout not in READOUTS:
            raise ValueError(f"readout is {readout!r}; {hint(readout, READOUTS)}")
        if (len(in_channels), len(out_channels)) != (4, 4):
            raise ValueError(
                f"DPT takes four layers and makes four maps, in_channels is {list(in_channels)} "
                f"and post_process_channels {list(out_channels)}"
            )
        self.readout = readout
        self.projects = nn.ModuleList(
            ConvModule(c, p, 1, act_cfg=None) for c, p in zip(in_channels, out_channels)
        )
        self.resize_layers = nn.ModuleList(
            _resize_layers(out_channels) if rescale else [nn.Identity() for _ in out_channels]
        )
        if readout == "project":
            self.readout_projects = nn.ModuleList(
                nn.Sequential(nn.Linear(2 * c, c), nn.GELU()) for c in in_channels
            )
        self.batchnorm_layers = nn.ModuleList(
            nn.BatchNorm2d(c) if use_batchnorm else nn.Identity() for c in in_channels
        )

    def forward(self, levels: Sequence[Level]) -> list[Tensor]:
        """Maps (B, P_i, h_i, w_i) of pairs of patch map (B, C_i, h, w) and CLS (B, C_i)."""
        maps = []
        for i, (featmap, cls) in enumerate(levels):
            featmap = self.batchnorm_layers[i](self._read_out(i, featmap, cls))
            maps.append(self.resize_layers[i](self.projects[i](featmap)))
        return maps

    def _read_out(self, i: int, featmap: Tensor, cls: Tensor | None) -> Tensor:
        if self.readout == "ignore":
            return featmap
        if self.readout == "add":
            return featmap + cls[:, :, None, None]
        tokens = featmap.permute(0, 2, 3, 1)
        tokens = torch.cat((tokens, cls[:, None, None].expand_as(tokens)), dim=-1)
        return self.readout_projects[i](tokens).permute(0, 3, 1, 2)


def _resize_layers(channels: Sequence[int]) -> list[nn.Module]:
    quarter, half, _, double = channels
    return [
        nn.ConvTranspose2d(quarter, quarter, 4, stride=4),
        nn.ConvTranspose2d(half, half, 2, stride=2),
        nn.Identity(),
        nn.Conv2d(double, double, 3, stride=2, padding=1),
    ]

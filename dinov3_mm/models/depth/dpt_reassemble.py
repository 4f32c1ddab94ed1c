"""The first part of DPT: tokens of four layers become maps of four strides."""

from collections.abc import Sequence

import torch
from mmcv.cnn import ConvModule
from mmengine.model import BaseModule
from torch import Tensor, nn

from dinov3_mm.suggest import hint

from .features import Level

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

"""Depth heads: check of their input, what they have in common, and the linear probe."""

from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from dinov3_mm.errors import hint

from .bins import NORMS, bin_centers, expected_depth, regressed_depth

Level = tuple[Tensor, Tensor | None]


def check_levels(
    feats: Sequence, in_channels: Sequence[int], *, needs_cls: bool, head: str
) -> list[Level]:
    """Pairs of patch map (B, C, h, w) and CLS (B, C) or None, one per layer of the backbone.

    Args:
        feats: what the backbone gives: pairs (``out_type='featmap+cls'``) or maps.
        in_channels: expected width of each layer.
        needs_cls: whether CLS is used.
        head: name for the errors.

    Raises:
        ValueError: if there are more or fewer layers, of other widths, or without CLS.
    """
    levels = [(level, None) if isinstance(level, Tensor) else tuple(level) for level in feats]
    if len(levels) != len(in_channels):
        raise ValueError(
            f"{head} takes {len(in_channels)} layers, the backbone gives {len(levels)}: "
            "model.backbone.out_indices and model.decode_head.in_channels must agree"
        )
    widths = [featmap.shape[1] for featmap, _ in levels]
    if any(featmap.ndim != 4 for featmap, _ in levels) or widths != list(in_channels):
        shapes = [tuple(featmap.shape) for featmap, _ in levels]
        raise ValueError(
            f"{head} takes maps (B, C, h, w) of widths {list(in_channels)}, given {shapes}: set "
            f"model.decode_head.in_channels={widths}, and backbone.out_type='featmap+cls'"
        )
    if needs_cls and any(cls is None for _, cls in levels):
        raise ValueError(
            f"{head} uses CLS, which the backbone does not give: set "
            "model.backbone.out_type='featmap+cls'"
        )
    return levels


def as_widths(in_channels: int | Sequence[int]) -> list[int]:
    """One width per layer; a number is one layer."""
    return [in_channels] if isinstance(in_channels, int) else list(in_channels)


class DepthHead(BaseModule):
    """Base of the depth heads; subclasses turn features into logits (B, ``num_bins``, H', W').

    Depth is the mean of ``num_bins`` depths under a distribution made of the logits; with one bin
    it is ``ReLU(logit) + min_depth``. Decoding and losses run in fp32 under any autocast.

    Args:
        in_channels: width of each layer that the backbone gives; a number for one layer.
        num_bins: channels of the output.
        min_depth, max_depth: range of the bins, in metres or whatever the truth is in.
        bins: where the bins lie, see :func:`~dinov3_mm.models.depth.bins.bin_centers`.
        norm: how logits become a distribution, see
            :func:`~dinov3_mm.models.depth.bins.expected_depth`.
        loss_decode: config of a loss, or of several, whose sum counts.
        zero_is_valid: whether a truth of 0 is a measurement, as a canopy height is; otherwise 0
            means that nothing was measured. Negative and infinite values and NaN never count.
        init_cfg: MMEngine initialisation config.

    Raises:
        ValueError: if bins or norm are unknown, or the range is no range.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        *,
        num_bins: int = 256,
        min_depth: float = 1e-3,
        max_depth: float = 10.0,
        bins: str = "linear",
        norm: str = "linear",
        loss_decode: dict | Sequence[dict] = (dict(type="DINOv3SigLoss"),),
        zero_is_valid: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        self.in_channels = as_widths(in_channels)
        self.num_bins = num_bins
        self.min_depth = min_depth
        self.max_depth = max_depth
        if norm not in NORMS:
            raise ValueError(f"norm is {norm!r}; {hint(norm, NORMS)}")
        self.norm = norm
        centers = None if num_bins == 1 else bin_centers(bins, num_bins, min_depth, max_depth)
        self.register_buffer("bins", centers, persistent=False)
        self.zero_is_valid = zero_is_valid
        configs = [loss_decode] if isinstance(loss_decode, dict) else loss_decode
        self.losses = nn.ModuleList(MODELS.build(config) for config in configs)
        names = [loss.loss_name for loss in self.losses]
        if len(set(names)) < len(names):
            raise ValueError(f"losses are called {names}; give each a loss_name of its own")

    def forward(self, feats: Sequence) -> Tensor:
        """Logits (B, ``num_bins``, H', W') of the layers that the backbone gives."""
        raise NotImplementedError

    def decode(self, logits: Tensor) -> Tensor:
        """Depth (B, 1, H', W') of logits, in fp32."""
        if self.bins is None:
            return regressed_depth(logits, self.min_depth)
        return expected_depth(logits, self.bins, self.norm)

    def predict(self, feats: Sequence) -> Tensor:
        """Depth (B, 1, H', W') at the resolution of the head, in fp32."""
        return self.decode(self(feats))

    def loss(
        self, feats: Sequence, target: Tensor, *, step: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Losses of the prediction, resized to the truth.

        Args:
            feats: layers that the backbone gives.
            target: depth (B, 1, H, W).
            step: training steps that are done.
        """
        depth = self.predict(feats)
        depth = F.interpolate(depth, size=target.shape[-2:], mode="bilinear", align_corners=False)
        measured = (target >= 0) if self.zero_is_valid else (target > 0)
        mask = measured & target.isfinite()
        return {loss.loss_name: loss(depth, target, mask, step=step) for loss in self.losses}


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

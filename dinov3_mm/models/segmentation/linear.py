"""The linear segmentation probe of DINOv3."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.registry import MODELS
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.batch_norm import SyncedBatchNorm2d


@MODELS.register_module()
class DINOv3LinearSegHead(BaseDecodeHead):
    """Batch normalisation and a 1x1 convolution on the patches of one layer, or of several.

    In training, whole channels are dropped before the normalisation, whose statistics are those of
    all processes' images. Several layers are resized to
    the first and concatenated. Heads of the official trainer are files of kind
    'linear_segmentation'.

    Args:
        in_channels: width of the feature map; a list for several.
        num_classes: classes.
        in_index: which outputs of the backbone; by default the last, or the first as many as there
            are in ``in_channels``.
        use_batchnorm: whether to normalise.
        use_cls_token: whether to put CLS beside every patch of its layer, after its channels. For a
            backbone with ``out_type='featmap+cls'``.
        dropout_ratio: share of channels that are dropped in training.
        **kwargs: ``loss_decode``, ``ignore_index``, ``sampler``, ``align_corners`` and so on of
            mmseg's ``BaseDecodeHead``.

    Raises:
        ValueError: If ``in_channels`` and ``in_index`` differ in length.
    """

    # A probe is a small product, and what it shows should not depend on rounding.
    computes_in_fp32 = True

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_classes: int,
        *,
        in_index: int | Sequence[int] | None = None,
        use_batchnorm: bool = True,
        use_cls_token: bool = False,
        dropout_ratio: float = 0.1,
        **kwargs: Any,
    ) -> None:
        several = not isinstance(in_channels, int)
        widths = list(in_channels) if several else [in_channels]
        if in_index is None:
            in_index = list(range(len(widths))) if several else [-1]
        indices = [in_index] if isinstance(in_index, int) else list(in_index)
        if len(indices) != len(widths):
            raise ValueError(
                f"in_channels {in_channels} names {len(widths)} layers and in_index {in_index} "
                f"names {len(indices)}; expected as many"
            )
        channels = sum(widths) * (2 if use_cls_token else 1)
        super().__init__(
            widths,
            channels,
            num_classes=num_classes,
            in_index=indices,
            input_transform="resize_concat",
            dropout_ratio=dropout_ratio,
            **kwargs,
        )
        self.widths = widths
        self.use_cls_token = use_cls_token
        self.bn = SyncedBatchNorm2d(channels) if use_batchnorm else nn.Identity()

    def forward(self, inputs: Sequence[Tensor] | Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Logits at the resolution of the first layer.

        Args:
            inputs: outputs of a backbone: maps (B, C, h, w), or with ``use_cls_token`` pairs of map
                and CLS (B, C).

        Returns:
            (B, ``num_classes``, h, w).

        Raises:
            ValueError: If they are of another kind or width.
        """
        features = self._features(inputs)
        if self.dropout is not None:
            features = self.dropout(features)
        return self.conv_seg(self.bn(features))

    def _features(self, inputs: Sequence) -> Tensor:
        """The chosen layers side by side (B, ``channels``, h, w)."""
        levels = [
            self._level(inputs[index], width) for index, width in zip(self.in_index, self.widths)
        ]
        size = levels[0].shape[2:]
        return torch.cat(
            [
                level
                if level.shape[2:] == size
                else F.interpolate(level, size, mode="bilinear", align_corners=self.align_corners)
                for level in levels
            ],
            dim=1,
        )

    def _level(self, output: Tensor | tuple[Tensor, Tensor], width: int) -> Tensor:
        """One layer's map, with CLS at every position if it is used."""
        is_pair = not isinstance(output, Tensor)
        if is_pair != self.use_cls_token:
            wanted = "featmap+cls" if self.use_cls_token else "featmap"
            raise ValueError(
                f"a head with use_cls_token={self.use_cls_token} got "
                f"{'pairs of map and CLS' if is_pair else 'maps without CLS'}: set "
                f"model.backbone.out_type={wanted!r}"
            )
        featmap = output[0] if is_pair else output
        if featmap.shape[1] != width:
            raise ValueError(
                f"DINOv3LinearSegHead takes features of width {width}, the backbone and neck give "
                f"{featmap.shape[1]}: set model.decode_head.in_channels"
            )
        if not is_pair:
            return featmap
        cls = output[1][:, :, None, None].expand_as(featmap)
        return torch.cat((featmap, cls), dim=1)

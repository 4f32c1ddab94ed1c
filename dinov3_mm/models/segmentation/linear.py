"""The linear segmentation probe, its Dice loss, and a segmentor for images of any size."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.segmentors import EncoderDecoder
from torch import Tensor, nn
from torch.nn import functional as F

from dinov3_mm.models.layers.batch_norm import SyncedBatchNorm2d


@MODELS.register_module()
class DINOv3DiceLoss(nn.Module):
    """One minus the Dice overlap of softmax and labels, averaged over images and classes.

    For class c, over the pixels of an image: ``1 - (2 sum p y + s) / (sum p^e + sum y^e + s)``. A
    pixel to ignore is left out of the numerator; in the denominator it counts as one of the last
    class, as in the official trainer. mmseg's ``DiceLoss`` squares otherwise and has another
    smoothing.

    Args:
        smooth: s, against classes that are absent.
        exponent: e.
        loss_weight: factor.
        loss_name: name in the log.
    """

    def __init__(
        self,
        *,
        smooth: float = 1.0,
        exponent: float = 2.0,
        loss_weight: float = 1.0,
        loss_name: str = "loss_dice",
    ) -> None:
        super().__init__()
        self.smooth = smooth
        self.exponent = exponent
        self.loss_weight = loss_weight
        self.loss_name = loss_name

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor | None = None,
        ignore_index: int = 255,
        **_: object,
    ) -> Tensor:
        """The loss of logits (B, K, H, W) and labels (B, H, W).

        Raises:
            ValueError: If there are weights, which this loss does not take.
        """
        if weight is not None:
            raise ValueError("DINOv3DiceLoss takes no pixel weights; set decode_head.sampler=None")
        num_classes = logits.shape[1]
        probability = logits.softmax(1)
        one_hot = F.one_hot(labels.clamp(0, num_classes - 1), num_classes)
        truth = one_hot.movedim(-1, 1).to(probability.dtype)
        valid = (labels != ignore_index)[:, None]
        pixels = (2, 3)
        overlap = 2 * (probability * truth * valid).sum(pixels) + self.smooth
        size = (probability**self.exponent + truth**self.exponent).sum(pixels) + self.smooth
        return self.loss_weight * torch.mean(1 - overlap / size)


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


@MODELS.register_module()
class DINOv3PaddedEncoderDecoder(EncoderDecoder):
    """mmseg's ``EncoderDecoder``, which pads images in prediction.

    Each window (in 'whole' mode the image) is padded with zeros at the right and bottom to sides
    that are multiples of ``size_divisor``, and the padding is cut off its result. Windows that are
    such multiples are predicted as they are, as by the official segmentor; padding a whole image
    in advance would move the last windows. An image smaller than the crop in both directions is
    covered by squares of its shorter side, as in the official sliding-window inference.

    In training, the size of the crops has to fit.

    Args:
        size_divisor: 32 for ``DINOv3ViTAdapter`` and for ConvNeXts, the patch size for plain ViTs.
        **arguments: of mmseg's ``EncoderDecoder``.
    """

    def __init__(self, *, size_divisor: int = 32, **arguments: Any) -> None:
        super().__init__(**arguments)
        if size_divisor < 1:
            raise ValueError(f"size_divisor is {size_divisor}; expected at least 1")
        self.size_divisor = size_divisor

    def encode_decode(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Semantic maps (B, classes, H, W) of windows (B, 3, H, W) of any size."""
        height, width = inputs.shape[-2:]
        bottom, right = -height % self.size_divisor, -width % self.size_divisor
        padded = F.pad(inputs, (0, right, 0, bottom))
        size = tuple(padded.shape[-2:])
        metas = [{**meta, "img_shape": size, "pad_shape": size} for meta in batch_img_metas]
        return super().encode_decode(padded, metas)[..., :height, :width]

    def slide_inference(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Mean over windows of ``test_cfg.crop_size`` every ``test_cfg.stride``."""
        sides = tuple(inputs.shape[-2:])
        config = self.test_cfg
        if any(crop <= side for crop, side in zip(config.crop_size, sides)):
            return super().slide_inference(inputs, batch_img_metas)
        side = min(sides)
        stride = tuple(min(step, side) for step in config.stride)
        self.test_cfg = ConfigDict({**config, "crop_size": (side, side), "stride": stride})
        try:
            return super().slide_inference(inputs, batch_img_metas)
        finally:
            self.test_cfg = config

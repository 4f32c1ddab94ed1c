"""Mask2Former on DINOv3: adapter, head and segmentor; needs mmseg, mmdet and mmcv's operators.

A config lists this module in ``custom_imports``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.model.weight_init import initialize
from mmengine.registry import MODELS
from torch import Tensor
from torch.nn import functional as F

from dinov3_mm.hosts import require_host

require_host("mmseg")
require_host("mmdet")

from mmdet.models.layers import MSDeformAttnPixelDecoder  # noqa: E402
from mmseg.models.decode_heads import Mask2FormerHead  # noqa: E402

from dinov3_mm.models.adapters.vit_adapter import (  # noqa: E402
    DeformableAttention,
    DINOv3ViTAdapter,
)

from .linear import DINOv3PaddedEncoderDecoder  # noqa: E402

__all__ = [
    "DINOv3Mask2FormerHead",
    "DINOv3PaddedEncoderDecoder",
    "DINOv3ViTAdapter",
    "semantic_map",
]

_NUM_LEVELS = 3
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class FloatPixelDecoder(MSDeformAttnPixelDecoder):
    """mmdet's pixel decoder, in float32 under autocast, with :class:`DeformableAttention`."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        for layer in self.encoder.layers:
            layer.self_attn = DeformableAttention(**layer.self_attn_cfg)

    def forward(self, feats: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Mask features and multi-scale features of the maps, the finest map first."""
        with torch.autocast(feats[0].device.type, enabled=False):
            return super().forward([feat.float() for feat in feats])


@MODELS.register_module()
class DINOv3Mask2FormerHead(Mask2FormerHead):
    """mmseg's ``Mask2FormerHead`` (arXiv 2112.01527) with the defaults of the released segmentor.

    Parameters are those of mmseg's head, and the released file loads into them with
    ``init_cfg=dict(type='DINOv3HeadPretrained', kind='mask2former', checkpoint=FILE)``. The widths
    of mmseg's own configs are ``feat_channels=256, num_heads=8, encoder_ffn_channels=1024,
    decoder_ffn_channels=2048``.

    Args:
        in_channels: channels of the maps of strides 4, 8, 16 and 32.
        num_classes: classes without the no-object class.
        feat_channels: width of both decoders.
        num_heads: heads of both decoders.
        num_queries: queries.
        num_encoder_layers: layers of the pixel decoder.
        num_decoder_layers: layers of the transformer decoder.
        encoder_ffn_channels, decoder_ffn_channels: hidden widths of their FFNs.
        no_object_weight: weight of the no-object class in the classification loss.
        loss_weights: of classification, mask and dice; the costs of the matching too.
        num_points: points at which masks are compared.
        semantic_dtype: dtype of the probabilities in prediction, 'fp32' or 'bf16'. The official
            sliding-window inference has 'bf16'.
        align_corners: of the resize that ends a prediction.
        ignore_index: label without a class.
        train_cfg: replaces the matching and the sampling of points, in mmseg's form.
        init_cfg: MMEngine initialisation config.

    Raises:
        ValueError: if widths do not fit.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int = 150,
        *,
        feat_channels: int = 2048,
        num_heads: int = 16,
        num_queries: int = 100,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 9,
        encoder_ffn_channels: int = 4096,
        decoder_ffn_channels: int = 4096,
        no_object_weight: float = 0.1,
        loss_weights: Sequence[float] = (2.0, 5.0, 5.0),
        num_points: int = 12544,
        semantic_dtype: str = "fp32",
        align_corners: bool = False,
        ignore_index: int = 255,
        train_cfg: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        _check(in_channels, num_classes, feat_channels, num_heads, semantic_dtype)
        width = {"embed_dims": feat_channels, "num_heads": num_heads}
        sine = {"num_feats": feat_channels // 2, "normalize": True}
        super().__init__(
            num_classes=num_classes,
            align_corners=align_corners,
            ignore_index=ignore_index,
            in_channels=list(in_channels),
            strides=[4, 8, 16, 32],
            feat_channels=feat_channels,
            out_channels=feat_channels,
            num_queries=num_queries,
            num_transformer_feat_level=_NUM_LEVELS,
            pixel_decoder=_pixel_decoder(width, sine, num_encoder_layers, encoder_ffn_channels),
            transformer_decoder=_decoder(width, num_decoder_layers, decoder_ffn_channels),
            positional_encoding=sine,
            train_cfg=ConfigDict(train_cfg or _matching(loss_weights, num_points)),
            init_cfg=init_cfg,
            **_losses(loss_weights, num_classes, no_object_weight),
        )
        self.in_channels = list(in_channels)
        self.semantic_dtype = semantic_dtype

    def init_weights(self) -> None:
        """mmdet's initialisation of decoders and queries, then ``init_cfg``."""
        for module in (self.query_embed, self.query_feat, self.level_embed):
            module.reset_parameters()
        for module in (self.cls_embed, *self.mask_embed[::2]):
            module.reset_parameters()
        super().init_weights()
        if self.init_cfg:
            initialize(self, self.init_cfg)
        self._is_init = True

    def forward(
        self, x: Sequence[Tensor], batch_data_samples: list | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Class logits (B, Q, classes + 1) and mask logits (B, Q, h, w) of every layer.

        Raises:
            ValueError: if the channels of the maps are not ``in_channels``.
        """
        given = [feature.shape[1] for feature in x]
        if given != self.in_channels:
            raise ValueError(
                f"features have {given} channels; the head was built for in_channels="
                f"{self.in_channels}. Take embed_dims of the ViT four times, or feature_dims of "
                "the ConvNeXt"
            )
        return super().forward(x, batch_data_samples)

    def loss(self, x: Sequence[Tensor], batch_data_samples: list, train_cfg: dict) -> dict:
        """Losses of all layers.

        Raises:
            ValueError: if a label is neither a class nor ``ignore_index``.
        """
        for sample in batch_data_samples:
            labels = sample.gt_sem_seg.data
            is_class = (labels >= 0) & (labels < self.num_classes)
            wrong = labels[~is_class & (labels != self.ignore_index)]
            if wrong.numel():
                raise ValueError(
                    f"{sample.metainfo.get('img_path', 'an image')} has label "
                    f"{int(wrong.max())}; expected 0 to {self.num_classes - 1} or "
                    f"{self.ignore_index}. Check num_classes and reduce_zero_label"
                )
        return super().loss(x, batch_data_samples, train_cfg)

    def loss_by_feat(
        self, cls_scores: list[Tensor], mask_preds: list[Tensor], *truth: list
    ) -> dict[str, Tensor]:
        """Losses of all layers in float32; under autocast the matching would be in bfloat16."""
        cls_scores = [scores.float() for scores in cls_scores]
        mask_preds = [masks.float() for masks in mask_preds]
        with torch.autocast(cls_scores[0].device.type, enabled=False):
            return super().loss_by_feat(cls_scores, mask_preds, *truth)

    def predict(self, x: Sequence[Tensor], batch_img_metas: list[dict], test_cfg: dict) -> Tensor:
        """Semantic maps (B, ``num_classes``, H, W) of ``img_shape``, values in [0, queries].

        Masks are resized to ``img_shape``. mmseg's head takes ``pad_shape`` where there is one,
        which is not the size of a window.
        """
        logits, masks = self(x)
        masks = F.interpolate(
            masks[-1], size=tuple(batch_img_metas[0]["img_shape"][:2]), mode="bilinear"
        )
        return semantic_map(logits[-1], masks, _DTYPES[self.semantic_dtype]).float()


def semantic_map(logits: Tensor, masks: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sum over queries of class probability times mask probability.

    Args:
        logits: (B, Q, classes + 1); the last class is no object.
        masks: mask logits (B, Q, H, W).
        dtype: of the probabilities and the result.

    Returns:
        (B, classes, H, W).
    """
    classes = logits.softmax(-1)[..., :-1].to(dtype)
    return torch.einsum("bqc,bqhw->bchw", classes, masks.sigmoid().to(dtype))


def _pixel_decoder(width: dict, sine: dict, num_layers: int, ffn_channels: int) -> ConfigDict:
    attention = {**width, "num_levels": _NUM_LEVELS, "num_points": 4, "dropout": 0.0}
    return ConfigDict(
        type=FloatPixelDecoder,
        num_outs=_NUM_LEVELS,
        norm_cfg={"type": "GN", "num_groups": 32},
        act_cfg={"type": "ReLU"},
        positional_encoding=sine,
        encoder={
            "num_layers": num_layers,
            "layer_cfg": {
                "self_attn_cfg": {**attention, "batch_first": True},
                "ffn_cfg": _ffn(width, ffn_channels),
            },
        },
    )


def _decoder(width: dict, num_layers: int, ffn_channels: int) -> ConfigDict:
    attention = {**width, "batch_first": True}
    return ConfigDict(
        return_intermediate=True,
        num_layers=num_layers,
        layer_cfg={
            "self_attn_cfg": attention,
            "cross_attn_cfg": attention,
            "ffn_cfg": _ffn(width, ffn_channels),
        },
    )


def _ffn(width: dict, channels: int) -> dict:
    return {
        "embed_dims": width["embed_dims"],
        "feedforward_channels": channels,
        "num_fcs": 2,
        "ffn_drop": 0.0,
        "act_cfg": {"type": "ReLU", "inplace": True},
    }


def _losses(weights: Sequence[float], num_classes: int, no_object_weight: float) -> dict:
    classification, mask, dice = weights
    entropy = {"type": "mmdet.CrossEntropyLoss", "reduction": "mean"}
    return {
        "loss_cls": ConfigDict(
            **entropy,
            use_sigmoid=False,
            loss_weight=classification,
            class_weight=[1.0] * num_classes + [no_object_weight],
        ),
        "loss_mask": ConfigDict(**entropy, use_sigmoid=True, loss_weight=mask),
        "loss_dice": ConfigDict(
            type="mmdet.DiceLoss",
            use_sigmoid=True,
            activate=True,
            reduction="mean",
            naive_dice=True,
            eps=1.0,
            loss_weight=dice,
        ),
    }


def _matching(weights: Sequence[float], num_points: int) -> dict:
    classification, mask, dice = weights
    return {
        "num_points": num_points,
        "oversample_ratio": 3.0,
        "importance_sample_ratio": 0.75,
        "assigner": {
            "type": "mmdet.HungarianAssigner",
            "match_costs": [
                {"type": "mmdet.ClassificationCost", "weight": classification},
                {"type": "mmdet.CrossEntropyLossCost", "weight": mask, "use_sigmoid": True},
                {"type": "mmdet.DiceCost", "weight": dice, "pred_act": True, "eps": 1.0},
            ],
        },
        "sampler": {"type": "mmdet.MaskPseudoSampler"},
    }


def _check(
    in_channels: Sequence[int], num_classes: int, width: int, num_heads: int, dtype: str
) -> None:
    if len(in_channels) != 4:
        raise ValueError(
            f"in_channels is {list(in_channels)}; expected the channels of the maps of strides 4, "
            "8, 16 and 32"
        )
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}; expected at least 1")
    if width % num_heads or width % 32 or width % 4:
        raise ValueError(
            f"feat_channels is {width} with {num_heads} heads; expected a multiple of the heads "
            "and of 32, the groups of the norms"
        )
    if dtype not in _DTYPES:
        raise ValueError(f"semantic_dtype is {dtype!r}; expected one of {tuple(_DTYPES)}")

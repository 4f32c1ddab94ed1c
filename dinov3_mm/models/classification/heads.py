"""The attention probe: classification of attentively pooled patches."""

import torch
from mmengine.registry import MODELS
from mmpretrain.models import ClsHead
from torch import Tensor, nn

from ..layers.attentive_pooling import AttentivePooling
from .width import check_width

_HEAD_DIMS = 64


@MODELS.register_module()
class DINOv3AttentionHead(ClsHead):
    """A learned query gathers the patches by cross-attention, a linear layer classifies the result.

    For a backbone with ``out_type='featmap'`` (patches only) or ``'featmap+cls'`` (the query sees
    CLS too). See :class:`~dinov3_mm.models.layers.attentive_pooling.AttentivePooling`.

    Args:
        num_classes: classes.
        in_channels: width of the last feature map.
        num_heads: attention heads; None for one per 64 channels.
        num_layers: 1 pools the patches directly; n puts n - 1 self-attention layers before.
        ffn_ratio: hidden width of the feed-forward networks over ``in_channels``.
        init_cfg: MMEngine initialisation config; by default of the classifier, N(0, 0.01).
        **kwargs: ``loss``, ``topk`` and ``cal_acc`` of ``ClsHead``.

    Raises:
        ValueError: if ``num_classes`` is not positive or the heads do not divide the width.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        *,
        num_heads: int | None = None,
        num_layers: int = 1,
        ffn_ratio: float = 4.0,
        init_cfg: dict | list[dict] | None = None,
        **kwargs,
    ) -> None:
        classifier = {"type": "Normal", "layer": [], "std": 0.01, "override": {"name": "fc"}}
        super().__init__(init_cfg=init_cfg or classifier, **kwargs)
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; expected 1 or more")
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.pool = AttentivePooling(
            in_channels,
            num_heads=num_heads or max(1, in_channels // _HEAD_DIMS),
            num_layers=num_layers,
            ffn_ratio=ffn_ratio,
        )
        self.fc = nn.Linear(in_channels, num_classes)

    def pre_logits(self, feats: tuple) -> Tensor:
        """Pooled features (B, ``in_channels``) of the last entry: a map, or a map and CLS.

        Raises:
            ValueError: if they are of another width, or no map.
        """
        last = feats[-1]
        featmap, cls = (last, None) if isinstance(last, Tensor) else last
        check_width(featmap, self.in_channels, type(self).__name__)
        if featmap.ndim != 4:
            raise ValueError(
                f"{type(self).__name__} pools a map (B, C, h, w), given {tuple(featmap.shape)}: "
                "set model.backbone.out_type='featmap' and model.neck=None"
            )
        tokens = featmap.flatten(2).transpose(1, 2)
        if cls is not None:
            tokens = torch.cat((cls[:, None], tokens), dim=1)
        return self.pool(tokens)[:, 0]

    def forward(self, feats: tuple) -> Tensor:
        """Scores (B, ``num_classes``) before the softmax."""
        return self.fc(self.pre_logits(feats))

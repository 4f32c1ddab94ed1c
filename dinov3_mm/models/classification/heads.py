"""DINOv3's classifiers: their input, the linear head, and the attention probe."""

from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmpretrain.models import ClsHead, LinearClsHead
from torch import Tensor, nn


class AttentivePooling(nn.Module):
    """Pooling by cross-attention, after any number of self-attention layers.

    Layers before the last are pre-norm transformer layers over the tokens. The last one lets
    learned queries q attend to the tokens x: ``q + attention(q, norm(x), norm(x))``, then
    ``q + ffn(norm(q))``. The four-layer attentive probe of video features is ``num_layers=4``. Of
    positions it knows what the tokens know.

    Args:
        dims: width of the tokens.
        num_heads: attention heads.
        num_layers: layers, the one of the queries included.
        num_queries: learned queries.
        ffn_ratio: hidden width of the feed-forward networks over ``dims``.

    Raises:
        ValueError: if the heads do not divide the width, or there is no layer or query.
    """

    def __init__(
        self,
        dims: int,
        *,
        num_heads: int,
        num_layers: int = 1,
        num_queries: int = 1,
        ffn_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dims % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {dims}")
        if num_layers < 1 or num_queries < 1:
            raise ValueError(
                f"num_layers is {num_layers} and num_queries {num_queries}; expected 1 or more"
            )
        hidden = int(dims * ffn_ratio)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dims,
                num_heads,
                hidden,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(num_layers - 1)
        )
        self.query = nn.Parameter(torch.zeros(1, num_queries, dims))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.token_norm = nn.LayerNorm(dims)
        self.attention = nn.MultiheadAttention(dims, num_heads, batch_first=True)
        self.query_norm = nn.LayerNorm(dims)
        self.ffn = nn.Sequential(nn.Linear(dims, hidden), nn.GELU(), nn.Linear(hidden, dims))

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool.

        Args:
            tokens: (B, N, ``dims``).

        Returns:
            (B, ``num_queries``, ``dims``).
        """
        for layer in self.layers:
            tokens = layer(tokens)
        tokens = self.token_norm(tokens)
        query = self.query.expand(len(tokens), -1, -1)
        query = query + self.attention(query, tokens, tokens, need_weights=False)[0]
        return query + self.ffn(self.query_norm(query))


def check_width(features: Tensor, expected: int, head: str) -> Tensor:
    """Return ``features`` (B, C, ...), or raise a ``ValueError`` if C is not ``expected``."""
    if not isinstance(features, Tensor):
        raise ValueError(
            f"{head} got a {type(features).__name__} of features; expected a tensor: put a "
            "DINOv3ClsPatchNeck before it, or set model.backbone.out_type"
        )
    if features.shape[1] != expected:
        raise ValueError(
            f"{head} takes features of width {expected}, the backbone and neck give "
            f"{features.shape[1]}: set model.head.in_channels={features.shape[1]}"
        )
    return features


@MODELS.register_module()
class DINOv3ClsPatchNeck(BaseModule):
    """Concatenates the CLS tokens of all layers, and the mean patch of the last.

    The released linear classifier takes the last layer, ``(CLS, mean patch)``: 2 C channels. Put it
    behind a backbone with ``out_type='featmap+cls'`` whose ``out_indices`` name the layers; with n
    layers of width C it gives (n + 1) C channels.

    Args:
        patch_mean: whether to append the mean patch.
        init_cfg: MMEngine initialisation config.
    """

    def __init__(self, *, patch_mean: bool = True, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.patch_mean = patch_mean

    def forward(self, feats: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor]:
        """Concatenate.

        Args:
            feats: per layer, ascending, a map (B, C, h, w) and CLS (B, C).

        Returns:
            One tensor (B, channels), in at least fp32.

        Raises:
            TypeError: if the backbone gives something else.
        """
        for output in feats:
            if isinstance(output, Tensor) or len(output) != 2:
                given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
                raise TypeError(
                    f"DINOv3ClsPatchNeck got {given} per layer; expected pairs of map and CLS: set "
                    "model.backbone.out_type='featmap+cls'"
                )
        parts = [cls for _, cls in feats]
        dtype = torch.promote_types(parts[-1].dtype, torch.float32)
        if self.patch_mean:
            parts.append(feats[-1][0].mean((2, 3), dtype=dtype))
        return (torch.cat([part.to(dtype) for part in parts], dim=1),)


@MODELS.register_module()
class DINOv3LinearClsHead(LinearClsHead):
    """``LinearClsHead`` that says which width the features have if it is another than its own.

    The released classifier of the ViT-7B is one, with ``num_classes=1000, in_channels=8192`` behind
    :class:`DINOv3ClsPatchNeck`; its file is of kind 'linear_classifier'. Weights start from
    N(0, 0.01), the bias from 0.

    Args:
        num_classes: classes.
        in_channels: width of the features.
        **kwargs: see ``LinearClsHead``.
    """

    # A probe is a small product, and what it shows should not depend on rounding.
    computes_in_fp32 = True

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
        """The features (B, ``in_channels``) of the last entry.

        Raises:
            ValueError: if they are of another width.
        """
        return check_width(feats[-1], self.in_channels, type(self).__name__)


_HEAD_DIMS = 64


@MODELS.register_module()
class DINOv3AttentionHead(ClsHead):
    """A learned query gathers the patches by cross-attention, a linear layer classifies the result.

    For a backbone with ``out_type='featmap'`` (patches only) or ``'featmap+cls'`` (the query sees
    CLS too). See :class:`~dinov3_mm.models.classification.heads.AttentivePooling`.

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

"""The released detector: detector and head of mmdet, category ids, and the boxes that come out."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from mmdet.models.detectors import SingleStageDetector
from mmdet.models.layers import SinePositionalEncoding
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, get_box_tensor
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor, nn

from dinov3_mm.errors import hint

from .criterion import PlainDETRCriterion, mean_count
from .decoder import BoxPredictions
from .transformer import PlainDETRTransformer

_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
# The ids of the 80 classes in their order; the largest is 90.
COCO_CATEGORY_IDS = tuple(number for number in range(1, 91) if number not in _UNUSED)

_NAMED = {"coco": COCO_CATEGORY_IDS}


def resolve_category_ids(ids: str | Sequence[int] | None, num_classes: int) -> list[int]:
    """The class output of each label.

    Args:
        ids: 'coco', one output a label, or None for labels that are outputs themselves.
        num_classes: labels.

    Raises:
        ValueError: if the name is unknown, or the numbers are not one for each label.
    """
    if isinstance(ids, str):
        if ids not in _NAMED:
            raise ValueError(f"category_ids is {ids!r}; {hint(ids, _NAMED)}, or a list of numbers")
        ids = _NAMED[ids]
    ids = list(range(num_classes) if ids is None else ids)
    if len(ids) != num_classes or len(set(ids)) != num_classes or min(ids, default=0) < 0:
        raise ValueError(
            f"category_ids holds {len(set(ids))} numbers for {num_classes} classes; expected one "
            "for each, 0 or more; for classes of your own leave category_ids=None"
        )
    return ids


def padding_mask(
    shapes: Sequence[tuple[int, ...]] | None,
    grid: tuple[int, int],
    stride: int,
    device: torch.device,
) -> Tensor | None:
    """True where a position holds no pixel of its image.

    Args:
        shapes: height and width of each image in pixels, its top left corner at that of the map;
            None for images that fill it.
        grid: rows and columns of the map.
        stride: pixels from one position to the next.
        device: of the mask.

    Returns:
        bool (B, rows, columns), or None if all images fill the map.
    """
    if shapes is None:
        return None
    valid = [tuple(-(-side // stride) for side in shape[:2]) for shape in shapes]
    if all(sides == tuple(grid) for sides in valid):
        return None
    mask = torch.ones(len(valid), *grid, dtype=torch.bool)
    for image, (rows, columns) in zip(mask, valid):
        image[:rows, :columns] = False
    return mask.to(device, non_blocking=True)


def best_boxes(
    logits: Tensor,
    boxes: Tensor,
    max_per_img: int,
    image_shape: tuple[int, ...],
    scale_factor: tuple[float, float] | None = None,
) -> InstanceData:
    """The best pairs of query and class; a query may appear with several classes.

    Args:
        logits: class logits (Q, C).
        boxes: centre and size in pixels of the input (Q, 4).
        max_per_img: pairs to return, or all that there are.
        image_shape: height and width of the input without padding; corners are clipped to it.
        scale_factor: width and height of the input as multiples of the original's; None leaves the
            boxes in pixels of the input.

    Returns:
        ``bboxes`` as corners, ``scores`` and ``labels``, best first.
    """
    scores, pairs = logits.sigmoid().flatten().topk(min(max_per_img, logits.numel()))
    corners = bbox_cxcywh_to_xyxy(boxes)[pairs // logits.shape[1]]
    height, width = image_shape[:2]
    limits = corners.new_tensor([width, height, width, height])
    corners = corners.clamp(min=0).minimum(limits)
    if scale_factor is not None:
        corners = corners / corners.new_tensor(scale_factor).repeat(2)
    return InstanceData(bboxes=corners, scores=scores, labels=pairs % logits.shape[1])


_GROUPS = 32
_PRIOR = 0.01


@MODELS.register_module()
class DINOv3PlainDETRHead(BaseModule):
    """Plain-DETR with box reparametrisation and a hybrid branch (paper section 6.3.1).

    Parameters carry the names of the released head, except those of the encoder, which is mmdet's;
    a file of the release is of kind 'detector'.

    In training ``num_one2many_queries`` more queries learn from every object repeated
    ``num_repeats`` times; prediction leaves them out. With fewer proposals than queries (images
    below about 300 x 300 px for 1500 queries at stride 16) the last queries are left out.

    Args:
        num_classes: classes of the data set.
        in_channels: channels of the map.
        category_ids: output of each class: 'coco' for the released 91 outputs, which are counted by
            COCO's ids, a list, or None for as many outputs as classes.
        embed_dims: channels of the transformer, a multiple of 32.
        num_heads, encoder_ffn_dims, decoder_ffn_dims, num_encoder_layers, num_decoder_layers: see
            :class:`PlainDETRTransformer`, like the next five.
        encoder_dropout, rpe_hidden_dims, rpe_type, proposal_strides, min_proposal_size: see there.
        stride: pixels from one position of the map to the next.
        num_queries: queries of prediction.
        num_one2many_queries: additional queries of training; 0 for none.
        num_repeats: repetitions of each object for these.
        one2many_weight: weight of their losses.
        with_cp: recompute decoder layers in the backward pass instead of storing activations.
        loss_cls_weight, loss_bbox_weight, loss_iou_weight: weights of the terms.
        train_cfg: ``assigner`` to match by; None for Hungarian matching with the weights of
            Plain-DETR.
        test_cfg: ``max_per_img``, default 1500: pairs of query and class that are returned.
        init_cfg: MMEngine initialisation config;
            ``dict(type='DINOv3HeadPretrained', kind='detector', checkpoint=...)`` loads a release.

    Raises:
        ValueError: if the arguments do not fit each other.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        *,
        category_ids: str | Sequence[int] | None = None,
        embed_dims: int = 768,
        num_heads: int = 8,
        encoder_ffn_dims: int = 2048,
        decoder_ffn_dims: int = 2048,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        encoder_dropout: float = 0.1,
        rpe_hidden_dims: int = 512,
        rpe_type: str = "linear",
        stride: int = 16,
        proposal_strides: Sequence[int] = (8, 16, 32, 64),
        min_proposal_size: float = 50,
        num_queries: int = 1500,
        num_one2many_queries: int = 1500,
        num_repeats: int = 6,
        one2many_weight: float = 1.0,
        with_cp: bool = False,
        loss_cls_weight: float = 2.0,
        loss_bbox_weight: float = 1.0,
        loss_iou_weight: float = 2.0,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if embed_dims % _GROUPS:
            raise ValueError(f"embed_dims is {embed_dims}; expected a multiple of {_GROUPS}")
        self.num_classes = num_classes
        self.in_channels = in_channels
        self.stride = stride
        self.num_queries = num_queries
        self.num_repeats = num_repeats
        self.one2many_weight = one2many_weight
        self.max_per_img = (test_cfg or {}).get("max_per_img", 1500)
        self.category_ids = resolve_category_ids(category_ids, num_classes)
        self.cls_out_channels = max(self.category_ids) + 1
        self.criterion = PlainDETRCriterion(
            (train_cfg or {}).get("assigner"),
            cls_weight=loss_cls_weight,
            bbox_weight=loss_bbox_weight,
            iou_weight=loss_iou_weight,
        )
        self.positional_encoding = SinePositionalEncoding(
            embed_dims // 2, normalize=True, offset=-0.5, eps=1e-6
        )
        self.input_proj = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(in_channels, embed_dims, 1), nn.GroupNorm(_GROUPS, embed_dims)
                )
            ]
        )
        self.query_embed = nn.Embedding(num_queries + num_one2many_queries, embed_dims)
        stages = range(num_decoder_layers + 1)
        self.class_embed = nn.ModuleList(
            nn.Linear(embed_dims, self.cls_out_channels) for _ in stages
        )
        self.bbox_embed = nn.ModuleList(BoxMLP(embed_dims) for _ in stages)
        self.transformer = PlainDETRTransformer(
            embed_dims=embed_dims,
            num_heads=num_heads,
            encoder_ffn_dims=encoder_ffn_dims,
            decoder_ffn_dims=decoder_ffn_dims,
            num_encoder_layers=num_encoder_layers,
            num_decoder_layers=num_decoder_layers,
            stride=stride,
            proposal_strides=proposal_strides,
            min_proposal_size=min_proposal_size,
            encoder_dropout=encoder_dropout,
            rpe_hidden_dims=rpe_hidden_dims,
            rpe_type=rpe_type,
            with_cp=with_cp,
        )

    def init_weights(self) -> None:
        """Draw the parameters as the release does, then run ``init_cfg``."""
        if not self.is_init:
            self._draw()
        super().init_weights()

    def _draw(self) -> None:
        self.transformer.reset_parameters()
        nn.init.normal_(self.query_embed.weight)
        nn.init.xavier_uniform_(self.input_proj[0][0].weight)
        nn.init.zeros_(self.input_proj[0][0].bias)
        for layer in self.class_embed:
            nn.init.constant_(layer.bias, -math.log((1 - _PRIOR) / _PRIOR))
        for mlp in self.bbox_embed:
            nn.init.zeros_(mlp.layers[-1].weight)
            nn.init.zeros_(mlp.layers[-1].bias)

    def forward(
        self,
        x: Sequence[Tensor],
        data_samples: Sequence[DetDataSample] | None = None,
        *,
        one2many: bool = False,
    ) -> tuple[list[BoxPredictions], BoxPredictions]:
        """Predictions of each decoder layer and of all proposals.

        Args:
            x: the map (B, ``in_channels``, h, w), as a sequence of one.
            data_samples: give ``img_shape``, beyond which an image is padding; None for images
                without padding.
            one2many: run the additional queries of training too.

        Raises:
            ValueError: if the map has another width.
        """
        (features,) = x
        if features.shape[1] != self.in_channels:
            raise ValueError(
                f"the map has {features.shape[1]} channels, in_channels of the head is "
                f"{self.in_channels}; it is views x layers x width of the backbone, 2 views with "
                "windows and 1 without"
            )
        shapes = None if data_samples is None else [s.img_shape for s in data_samples]
        mask = padding_mask(shapes, features.shape[-2:], self.stride, features.device)
        source = self.input_proj[0](features)
        position = self.positional_encoding(mask, source)
        memory = self.transformer.encode(source, mask, position)
        queries = self.query_embed.weight
        return self.transformer(
            memory,
            queries if one2many else queries[: self.num_queries],
            num_one2one=self.num_queries,
            bbox_embed=self.bbox_embed,
            class_embed=self.class_embed,
        )

    def loss(self, x: Sequence[Tensor], batch_data_samples: list[DetDataSample]) -> dict:
        """Losses of the last layer, of those before (``d0.`` ...), of the proposals (``enc_``) and
        of the one-to-many branch (``o2m_``).

        Crowd regions, which mmdet keeps apart, and boxes without area are no objects.

        Raises:
            ValueError: if a label is no class.
        """
        layers, first = self(x, batch_data_samples, one2many=True)
        targets = [self._target(sample) for sample in batch_data_samples]
        binary = [InstanceData(bboxes=t.bboxes, labels=torch.zeros_like(t.labels)) for t in targets]
        count = mean_count(targets, first.logits.device)
        losses = _prefixed("enc_", self.criterion(first, binary, count))
        one2one = [layer.select(slice(self.num_queries)) for layer in layers]
        losses |= self._layer_losses(one2one, targets, count, prefix="")
        if self.query_embed.num_embeddings > self.num_queries:
            repeated = [InstanceData.cat([target] * self.num_repeats) for target in targets]
            count = mean_count(repeated, first.logits.device)
            one2many = [layer.select(slice(self.num_queries, None)) for layer in layers]
            extra = self._layer_losses(one2many, repeated, count, prefix="o2m_")
            losses |= {name: self.one2many_weight * value for name, value in extra.items()}
        return losses

    def predict(
        self,
        x: Sequence[Tensor],
        batch_data_samples: list[DetDataSample],
        rescale: bool = True,
    ) -> list[InstanceData]:
        """The best pairs of query and class of each image.

        Args:
            x: see :meth:`forward`.
            batch_data_samples: sizes of the images.
            rescale: give boxes in pixels of the original images and not of the inputs.

        Returns:
            ``bboxes`` (n, 4) as corners, ``scores`` and ``labels``, best first.
        """
        layers, _ = self(x, batch_data_samples)
        return [
            best_boxes(
                logits[:, self.category_ids],
                boxes,
                self.max_per_img,
                sample.img_shape,
                sample.scale_factor if rescale else None,
            )
            for logits, boxes, sample in zip(
                layers[-1].logits, layers[-1].boxes, batch_data_samples
            )
        ]

    def _layer_losses(
        self,
        layers: list[BoxPredictions],
        targets: list[InstanceData],
        count: float,
        *,
        prefix: str,
    ) -> dict[str, Tensor]:
        losses = _prefixed(prefix, self.criterion(layers[-1], targets, count))
        for index, layer in enumerate(layers[:-1]):
            losses |= _prefixed(f"d{index}.{prefix}", self.criterion(layer, targets, count))
        return losses

    def _target(self, sample: DetDataSample) -> InstanceData:
        """Boxes with area, and the outputs of their classes."""
        boxes = get_box_tensor(sample.gt_instances.bboxes).float()
        labels = sample.gt_instances.labels
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(
                f"labels from {int(labels.min())} to {int(labels.max())} for num_classes="
                f"{self.num_classes}; set num_classes of the head to the classes of the data set"
            )
        has_area = (boxes[:, 2:] > boxes[:, :2]).all(1)
        outputs = labels.new_tensor(self.category_ids)[labels]
        return InstanceData(bboxes=boxes[has_area], labels=outputs[has_area])


class BoxMLP(nn.Module):
    """Three linears with ReLU between them that give the four offsets of a box.

    Args:
        embed_dims: input and hidden width.
    """

    def __init__(self, embed_dims: int) -> None:
        super().__init__()
        widths = (embed_dims, embed_dims, embed_dims, 4)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        """(..., ``embed_dims``) to (..., 4)."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def _prefixed(prefix: str, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in losses.items()}


@MODELS.register_module()
class DINOv3PlainDETR(SingleStageDetector):
    """Plain-DETR on one map of a backbone in windows (paper section 6.3.1).

    Args:
        backbone: config of a :class:`DINOv3WindowedBackbone`.
        bbox_head: config of a :class:`DINOv3PlainDETRHead`.
        train_cfg, test_cfg: passed on to the head.
        data_preprocessor: config of a ``DetDataPreprocessor``.
        init_cfg: MMEngine initialisation config.

    Raises:
        ValueError: if the head does not fit the map of the backbone.
    """

    def __init__(
        self,
        backbone: dict,
        bbox_head: dict,
        *,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        data_preprocessor: dict | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(
            backbone=backbone,
            bbox_head=dict(bbox_head),
            train_cfg=train_cfg,
            test_cfg=test_cfg,
            data_preprocessor=data_preprocessor,
            init_cfg=init_cfg,
        )
        given = (self.backbone.out_channels, self.backbone.stride)
        expected = (self.bbox_head.in_channels, self.bbox_head.stride)
        if given != expected:
            raise ValueError(
                f"the backbone's map has {given[0]} channels and stride {given[1]}, the head "
                f"expects in_channels={expected[0]}, stride={expected[1]}; set both in bbox_head"
            )

    def _forward(
        self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Class logits (B, Q, outputs) and boxes (B, Q, 4), centre and size in pixels."""
        layers, _ = self.bbox_head(self.extract_feat(batch_inputs), batch_data_samples)
        return layers[-1].logits, layers[-1].boxes

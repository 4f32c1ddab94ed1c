"""The official names of models with heads: their configs, weights of any format, plain calls."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn
from torch.nn import functional as F

from dinov3_mm.engine.config.host import HEAD, initializers, leave_random, set_host_weights
from dinov3_mm.engine.config.read import SHIPPED
from dinov3_mm.errors import hint

CONFIGS = SHIPPED / "configs"


class HeadModel(nn.Module):
    """A host's model behind a call on normalised images.

    Args:
        model: of mmpretrain, mmseg or mmdet, in eval mode.
        scope: of the host.
    """

    def __init__(self, model: nn.Module, scope: str) -> None:
        super().__init__()
        self.model = model
        self.scope = scope

    def forward(self, x: Tensor) -> Any:
        """The model's tensors for images (B, 3, H, W)."""
        with DefaultScope.overwrite_default_scope(self.scope):
            return self._compute(x)

    def _compute(self, x: Tensor) -> Any:
        return self.model(x, mode="tensor")


class OfficialClassifier(HeadModel):
    """``model(x)``: logits (B, 1000) of ImageNet-1k classes."""


class OfficialDepther(HeadModel):
    """``model(x)``: depth (B, 1, H', W') in metres, at the resolution of the head.

    Sides that are no multiples of the patch size are padded around, and the padding stays: resize
    the result to the image. ViT-7B SYNTHMIX: relative depth; CHMv2: canopy height.
    """


class OfficialSegmentor(HeadModel):
    """``model(x)``: ``pred_logits`` (B, 100, 151) and ``pred_masks`` (B, 100, H / 4, W / 4).

    Sides are multiples of 32.
    """

    def _compute(self, x: Tensor) -> dict[str, Tensor]:
        logits, masks = self.model.decode_head(self.model.extract_feat(x))
        return {"pred_logits": logits[-1], "pred_masks": masks[-1]}

    @torch.inference_mode()
    def predict(self, x: Tensor, rescale_to: tuple[int, int] | None = None) -> Tensor:
        """Semantic maps (B, 150, H, W) of the images, or resized to ``rescale_to``.

        Each value is a sum over queries of class probability times mask probability.
        """
        from dinov3_mm.models.segmentation.mask2former import semantic_map

        output = self(x)
        size = rescale_to or tuple(x.shape[-2:])
        masks = F.interpolate(output["pred_masks"], size=size, mode="bilinear")
        return semantic_map(output["pred_logits"], masks)


class OfficialDetector(HeadModel):
    """``model(images)``: a dict with ``scores``, ``labels`` and ``boxes`` for each image.

    Images are normalised tensors (3, H, W) of any size; labels are COCO's category ids (1 to 90),
    boxes corners in pixels, best first.
    """

    def forward(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Detect in a list of images."""
        from mmdet.structures import DetDataSample

        from dinov3_mm.models.detection.plain_detr import best_boxes

        height, width = (max(image.shape[side] for image in images) for side in (1, 2))
        batch = torch.stack(
            [F.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images]
        )
        shapes = [tuple(image.shape[1:]) for image in images]
        samples = [DetDataSample(metainfo={"img_shape": shape}) for shape in shapes]
        with DefaultScope.overwrite_default_scope(self.scope):
            logits, boxes = self.model._forward(batch, samples)
        found = [
            best_boxes(scores, corners, self.model.bbox_head.max_per_img, shape, None)
            for scores, corners, shape in zip(logits, boxes, shapes)
        ]
        return [
            {"scores": item.scores, "labels": item.labels, "boxes": item.bboxes} for item in found
        ]


class HeadEntry(NamedTuple):
    """Attributes:
    config: below ``configs/``.
    model: class that is returned.
    """

    config: str
    model: type[HeadModel]


ENTRIES = {
    "dinov3_vit7b16_lc": HeadEntry("classification/linear_vit7b16_in1k.py", OfficialClassifier),
    "dinov3_vit7b16_dd": HeadEntry("depth/dpt_vit7b16_synthmix.py", OfficialDepther),
    "dinov3_vit7b16_de": HeadEntry("detection/plain-detr_vit7b16_coco.py", OfficialDetector),
    "dinov3_vit7b16_ms": HeadEntry("segmentation/mask2former_vit7b16_ade20k.py", OfficialSegmentor),
    "dinov3_vitl16_chmv2": HeadEntry("depth/chmv2_vitl16sat.py", OfficialDepther),
}


def official_head_model(
    name: str,
    *,
    pretrained: bool = True,
    weights: str | os.PathLike | None = None,
    backbone_weights: str | os.PathLike | None = None,
) -> HeadModel:
    """Build a released model with a head, in eval mode.

    Args:
        name: a key of ``ENTRIES``.
        pretrained: load weights; False initialises at random.
        weights: file of the head; None takes the released one from torch hub's cache.
        backbone_weights: weights of the backbone in any known format, or the name of a released
            checkpoint; None takes the released one from torch hub's cache.

    Raises:
        FileNotFoundError: If weights are not there; the message says where to get them.
        ImportError: If the host of the head is not installed.
        ValueError: If the name is unknown, or weights cannot be read or do not fit.
    """
    if name not in ENTRIES:
        raise ValueError(f"{name!r} is no model with a head; {hint(name, ENTRIES)}")
    if not pretrained and (weights is not None or backbone_weights is not None):
        raise ValueError("pretrained=False takes no weights")
    entry = ENTRIES[name]
    cfg = Config.fromfile(CONFIGS / entry.config)
    for init_cfg in initializers(cfg.model, HEAD):
        init_cfg["checkpoint"] = weights or init_cfg["checkpoint"]
    if backbone_weights is not None:
        set_host_weights(cfg, os.fspath(backbone_weights))
    return build_head_model(cfg, entry.model, pretrained=pretrained)


def build_head_model(cfg: Config, kind: type[HeadModel], *, pretrained: bool) -> HeadModel:
    """The model of a config behind the calls of ``kind``, in eval mode."""
    if not pretrained:
        leave_random(cfg)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
        model.init_weights()
    return kind(model, cfg.default_scope).eval()


def head_entry_points() -> dict[str, Callable[..., HeadModel]]:
    """A function per name, as ``torch.hub`` calls them."""
    return {name: _entry_point(name) for name in ENTRIES}


def _entry_point(name: str) -> Callable[..., HeadModel]:
    def entry_point(
        *,
        pretrained: bool = True,
        weights: str | os.PathLike | None = None,
        backbone_weights: str | os.PathLike | None = None,
    ) -> HeadModel:
        return official_head_model(
            name, pretrained=pretrained, weights=weights, backbone_weights=backbone_weights
        )

    entry_point.__name__ = entry_point.__qualname__ = name
    entry_point.__doc__ = (
        f"{name}: ``pretrained``, ``weights`` (the head) and ``backbone_weights``, see "
        f"``dinov3_mm.apis.hub_heads.official_head_model``. {ENTRIES[name].model.__doc__}"
    )
    return entry_point

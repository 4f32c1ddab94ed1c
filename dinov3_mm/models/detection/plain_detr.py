"""The released detector as a detector of mmdet."""

from mmdet.models.detectors import SingleStageDetector
from mmdet.structures import DetDataSample
from mmengine.registry import MODELS
from torch import Tensor


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

"""mmseg's segmentor for images of any size."""

from typing import Any

from mmengine.config import ConfigDict
from mmengine.registry import MODELS
from mmseg.models.segmentors import EncoderDecoder
from torch import Tensor
from torch.nn import functional as F


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

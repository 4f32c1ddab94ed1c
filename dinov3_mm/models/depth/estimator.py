"""Depth estimation as a model of mmseg: backbone, depth head, ``SegDataSample`` in and out."""

from collections.abc import Callable, Mapping, Sequence

import torch
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from mmseg.models.segmentors.base import BaseSegmentor
from mmseg.registry import MODELS as MMSEG_MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn
from torch.nn import functional as F

from dinov3_mm.errors import hint
from dinov3_mm.models.backbones import DINOv3ConvNeXt

# To what the official evaluation pads images for a ConvNeXt, whose last stride is 32.
_CONVNEXT_MULTIPLE = 4
_TEST_OPTIONS = ("flip",)


@MODELS.register_module()
class DINOv3DepthEstimator(BaseSegmentor):
    """A backbone, frozen or not, and a head that turns its layers into a depth map.

    In the config of the backbone, ``out_type='featmap+cls'`` gives the head patches and CLS, and
    ``out_indices`` chooses the layers: -1 the last, ``(-4, -3, -2, -1)`` the four last,
    ``four_layers`` of ``configs/_base_/backbones`` four evenly spaced ones. ``final_norm`` (the
    default) applies the backbone's norm to each. The head is a :class:`DINOv3LinearDepthHead` or
    :class:`DINOv3DPTDepthHead`.

    Samples bring ``gt_depth_map`` and get ``pred_depth_map``, a ``PixelData`` (1, H, W) in the size
    of the original image.

    Args:
        backbone: config.
        decode_head: config.
        input_size: how images come to multiples of the patch size: 'pad' (zeros around), 'stretch'
            or 'keep'. As in the official models, what was padded is not cut off again: the
            prediction of the padded image is resized to the original one.
        input_multiple: the multiple, in pixels; None for the patch size of a ViT, and 4 for a
            ConvNeXt.
        data_preprocessor: config of mmseg's ``SegDataPreProcessor``, whose ``seg_pad_val`` must
            stand for 'not measured'.
        train_cfg, pretrained: unused; mmseg's tools set them.
        test_cfg: ``dict(flip=True)`` averages the predictions of the image and its mirror image.
        init_cfg: MMEngine initialisation config.

    Raises:
        ValueError: if an argument is unknown, or padding would count as depth.
    """

    def __init__(
        self,
        backbone: dict,
        decode_head: dict,
        *,
        input_size: str = "pad",
        input_multiple: int | None = None,
        data_preprocessor: dict | nn.Module | None = None,
        train_cfg: dict | None = None,
        test_cfg: dict | None = None,
        pretrained: None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(data_preprocessor=data_preprocessor, init_cfg=init_cfg)
        if pretrained is not None:
            raise ValueError(
                f"pretrained is {pretrained!r}; name weights in backbone.init_cfg=dict("
                "type='DINOv3Pretrained', checkpoint=...)"
            )
        if input_size not in INPUT_SIZES:
            raise ValueError(f"input_size is {input_size!r}; {hint(input_size, INPUT_SIZES)}")
        self.test_cfg = dict(test_cfg or {})
        for name in self.test_cfg:
            if name not in _TEST_OPTIONS:
                raise ValueError(f"test_cfg has {name!r}; {hint(name, _TEST_OPTIONS)}")
        self.backbone = MMSEG_MODELS.build(backbone)
        self.decode_head = MMSEG_MODELS.build(decode_head)
        self.input_size = input_size
        self.input_multiple = input_multiple or _multiple(self.backbone)
        self._check_padding()
        # Losses may change with time, and a resumed run goes on where it was.
        self.register_buffer("train_steps", torch.zeros((), dtype=torch.long))

    def _check_padding(self) -> None:
        pad = getattr(self.data_preprocessor, "seg_pad_val", 0)
        zero_is_valid = self.decode_head.zero_is_valid
        if pad > 0 or (zero_is_valid and pad == 0):
            value = "-1" if zero_is_valid else "0"
            raise ValueError(
                f"model.data_preprocessor.seg_pad_val is {pad}, which would count as a depth of "
                f"{pad} where a batch is padded: set seg_pad_val={value}"
            )

    def extract_feat(self, inputs: Tensor) -> tuple:
        """What the backbone gives for images (B, 3, H, W) of any size."""
        return self.backbone(INPUT_SIZES[self.input_size](inputs, self.input_multiple))

    def encode_decode(self, inputs: Tensor, batch_data_samples: object = None) -> Tensor:
        """Depth (B, 1, H', W') at the resolution of the head."""
        return self.decode_head.predict(self.extract_feat(inputs))

    def loss(self, inputs: Tensor, data_samples: Sequence[SegDataSample]) -> dict[str, Tensor]:
        """Losses of a batch; see :meth:`DepthHead.loss`.

        Raises:
            ValueError: if a sample has no depth, or depths of one batch differ in size.
        """
        target = _stack_depth(data_samples).to(inputs.device)
        losses = self.decode_head.loss(self.extract_feat(inputs), target, step=self.train_steps)
        self.train_steps += 1
        return losses

    def predict(
        self, inputs: Tensor, data_samples: Sequence[SegDataSample] | None = None
    ) -> list[SegDataSample]:
        """Samples with ``pred_depth_map`` in the size of ``ori_shape``, or else of the inputs."""
        depth = self.encode_decode(inputs)
        if self.test_cfg.get("flip"):
            depth = (depth + self.encode_decode(inputs.flip(-1)).flip(-1)) / 2
        if data_samples is None:
            data_samples = [
                SegDataSample(metainfo={"ori_shape": tuple(inputs.shape[-2:])}) for _ in inputs
            ]
        for sample, map_ in zip(data_samples, depth.split(1), strict=True):
            in_place = _undo(map_, sample.metainfo, tuple(inputs.shape[-2:]))
            sample.set_data({"pred_depth_map": PixelData(data=in_place[0])})
        return list(data_samples)

    def _forward(self, inputs: Tensor, data_samples: object = None) -> Tensor:
        """Depth (B, 1, H', W') at the resolution of the head."""
        return self.encode_decode(inputs)


def _multiple(backbone: nn.Module) -> int:
    if isinstance(backbone, DINOv3ConvNeXt):
        return _CONVNEXT_MULTIPLE
    patch_size = getattr(backbone, "patch_size", None)
    if not isinstance(patch_size, int):
        raise ValueError(
            f"{type(backbone).__name__} has no patch_size: give the model an input_multiple"
        )
    return patch_size


def _stack_depth(data_samples: Sequence[SegDataSample]) -> Tensor:
    """Truth (B, 1, H, W) of a batch."""
    if data_samples is None or any("gt_depth_map" not in sample for sample in data_samples):
        raise ValueError(
            "a sample has no gt_depth_map; its data set must give depth_map_path, and the pipeline "
            "LoadDepthMap before PackSegInputs"
        )
    maps = [sample.gt_depth_map.data for sample in data_samples]
    sizes = {tuple(depth.shape[-2:]) for depth in maps}
    if len(sizes) > 1:
        raise ValueError(
            f"depth maps of one batch have sizes {sorted(sizes)}; crop them alike, or set "
            "model.data_preprocessor.size_divisor"
        )
    return torch.stack([depth.reshape(1, *depth.shape[-2:]) for depth in maps]).float()


def _undo(depth: Tensor, meta: Mapping, size: tuple[int, int]) -> Tensor:
    """Depth (1, 1, H', W') of an input of ``size`` in the pixels of the original image."""
    padding = meta.get("img_padding_size", meta.get("padding_size", (0, 0, 0, 0)))
    if any(padding):
        left, right, top, bottom = padding
        depth = _resized(depth, size)[..., top : size[0] - bottom, left : size[1] - right]
    if meta.get("flip"):
        depth = depth.flip(-1 if meta["flip_direction"] == "horizontal" else -2)
    return _resized(depth, tuple(meta["ori_shape"][:2]))


def _resized(depth: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(depth, size=size, mode="bilinear", align_corners=False)


# --- Images of any size for a backbone that takes multiples of its patch size ---


def pad_to_center(images: Tensor, multiple: int) -> Tensor:
    """Put images in the middle of the next larger multiple, surrounded by zeros.

    Of an odd rest, right and bottom get the pixel more. Zeros are grey in normalised images.

    Args:
        images: (B, C, H, W).
        multiple: of which both sides become multiples, in pixels.
    """
    height, width = (-side % multiple for side in images.shape[-2:])
    left, top = width // 2, height // 2
    return F.pad(images, (left, width - left, top, height - top))


def stretch(images: Tensor, multiple: int) -> Tensor:
    """Resize images (B, C, H, W) bilinearly to the next larger multiple."""
    size = tuple(side + -side % multiple for side in images.shape[-2:])
    if size == tuple(images.shape[-2:]):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def keep(images: Tensor, multiple: int) -> Tensor:
    """Leave images as they are; the backbone drops pixels that fill no patch."""
    return images


INPUT_SIZES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "pad": pad_to_center,
    "stretch": stretch,
    "keep": keep,
}

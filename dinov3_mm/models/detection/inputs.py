"""What detection heads are given: windows of large images, and a pyramid over several layers."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor
from torch.nn import functional as F

from dinov3_mm.models.adapters import SimpleFeaturePyramid

Window = tuple[int, int, int, int]  # top, left, height, width


@MODELS.register_module()
class DINOv3WindowedBackbone(BaseModule):
    """Maps of a global view and of windows, concatenated on the channels (paper section 6.3.1).

    The image is cut into ``num_windows`` x ``num_windows`` windows of whole patches; those at the
    right and bottom take what is left. Each window goes through the backbone alone. The global view
    is the image resized to the size of a window, its maps resized back. Windows of equal size and
    the global view share one call of the backbone.

    Images whose sides are no multiple of the patch size are padded with zeros at the right and
    bottom. An image too small for all windows has fewer.

    Args:
        backbone: config of a ViT with 'featmap' outputs of one stride; its ``out_indices`` are the
            layers that are concatenated.
        num_windows: windows along each side. None takes the maps of the image itself, without
            windows and global view.
        init_cfg: MMEngine initialisation config.

    Attributes:
        stride: pixels from one position of the map to the next.
        out_channels: channels of the map.

    Raises:
        ValueError: if ``num_windows`` is below 1, or the backbone has no maps of one stride.
    """

    def __init__(
        self,
        backbone: dict,
        *,
        num_windows: int | None = 3,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if num_windows is not None and num_windows < 1:
            raise ValueError(f"num_windows is {num_windows}; expected 1 or more, or None")
        self.backbone = MODELS.build(backbone)
        _check_backbone(self.backbone)
        self.num_windows = num_windows
        self.stride = self.backbone.patch_size
        views = 1 if num_windows is None else 2
        self.out_channels = views * len(self.backbone.out_indices) * self.backbone.embed_dims

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Features of normalised images.

        Args:
            x: normalised images (B, 3, H, W).

        Returns:
            One map (B, ``out_channels``, ceil(H / stride), ceil(W / stride)): the layers of the
            global view, then those of the windows.
        """
        x = _pad(x, self.stride)
        # A backbone that does not train runs without a graph, on few images at a time on the CPU.
        trains = any(parameter.requires_grad for parameter in self.backbone.parameters())
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            if self.num_windows is None:
                return (self._layers(x),)
            return (self._views(x),)

    def _views(self, x: Tensor) -> Tensor:
        rows = split_side(x.shape[-2], self.num_windows, self.stride)
        columns = split_side(x.shape[-1], self.num_windows, self.stride)
        small = F.interpolate(x, (rows[0], columns[0]), mode="bilinear", antialias=True)
        crops = [
            [window.contiguous() for window in row.split(columns, dim=3)]
            for row in x.split(rows, dim=2)
        ]
        overview, *maps = self._batched([small, *(crop for row in crops for crop in row)])
        tiled = torch.cat(
            [
                torch.cat(maps[start : start + len(columns)], dim=3)
                for start in range(0, len(maps), len(columns))
            ],
            dim=2,
        )
        # Always enlarged: no antialiasing, with which torch 2.11 gets maps of one column wrong.
        overview = F.interpolate(overview, tiled.shape[-2:], mode="bilinear")
        return torch.cat((overview, tiled), dim=1)

    def _batched(self, images: list[Tensor]) -> list[Tensor]:
        """Maps of batches of images; equal sizes in one call."""
        groups = defaultdict(list)
        for index, batch in enumerate(images):
            groups[batch.shape[-2:]].append(index)
        maps: list[Tensor] = [torch.empty(0)] * len(images)
        for indices in groups.values():
            outputs = self._layers(torch.cat([images[i] for i in indices]))
            for index, output in zip(indices, outputs.chunk(len(indices))):
                maps[index] = output
        return maps

    def _layers(self, x: Tensor) -> Tensor:
        return torch.cat(self.backbone(x), dim=1)


def split_side(length: int, num_windows: int, stride: int) -> list[int]:
    """Lengths of the windows along a side, in pixels.

    Args:
        length: the side, a multiple of ``stride``.
        num_windows: windows wanted.
        stride: unit of length.

    Returns:
        Positive multiples of ``stride`` that sum to ``length``, all equal but for the last; fewer
        than ``num_windows`` where ``length`` does not suffice.
    """
    unit = -(-(length // num_windows) // stride) * stride
    unit = max(unit, stride)
    lengths = []
    for _ in range(num_windows - 1):
        lengths.append(min(unit, length - sum(lengths)))
    lengths.append(length - sum(lengths))
    return [length for length in lengths if length > 0]


def _pad(x: Tensor, stride: int) -> Tensor:
    bottom, right = (-side % stride for side in x.shape[-2:])
    return F.pad(x, (0, right, 0, bottom)) if bottom or right else x


def _check_backbone(backbone: BaseModule) -> None:
    out_type: str | None = getattr(backbone, "out_type", None)
    dims: Sequence[int] | None = getattr(backbone, "feature_dims", None)
    if out_type != "featmap" or dims is not None:
        raise ValueError(
            f"windows need a ViT with out_type='featmap', whose maps have one stride; got "
            f"{type(backbone).__name__} with out_type={out_type!r}. For a ConvNeXt take a detector "
            "over its pyramid, see configs/detection"
        )


@MODELS.register_module()
class DINOv3ConcatPyramid(SimpleFeaturePyramid):
    """:class:`SimpleFeaturePyramid` over all maps of the backbone, concatenated on the channels.

    The released detector, too, concatenates four layers. ``in_channels`` is the number of layers
    times the width of the backbone, whose ``out_indices`` name the layers.
    """

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Build the pyramid.

        Args:
            inputs: maps (B, C, h, w) of one size.

        Returns:
            Levels (B, ``out_channels``, ...), the finest first.

        Raises:
            ValueError: if the maps are of several sizes, or do not add up to ``in_channels``.
        """
        sizes = {tuple(x.shape[-2:]) for x in inputs}
        channels = sum(x.shape[1] for x in inputs)
        if len(sizes) > 1 or channels != self.in_channels:
            raise ValueError(
                f"got {len(inputs)} maps of sizes {sorted(sizes)} and {channels} channels "
                f"together, expected maps of one size and in_channels={self.in_channels}: the "
                "layers in out_indices of a ViT times its width; a ConvNeXt takes an FPN"
            )
        return super().forward(torch.cat(tuple(inputs), dim=1))

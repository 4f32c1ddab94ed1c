"""From a collated batch of crops to what the algorithm takes."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import MODELS
from torch import Tensor

from dinov3_mm.checkpoints.locate import statistics_of_data
from dinov3_mm.models.backbones.zoo import IMAGENET_MEAN, IMAGENET_STD

from .colors import COLORED_CROPS, apply_colors

REQUIRED = ("global_crops", "local_crops", "masks", "mask_indices", "masks_weight")
CROPS = ("global_crops", "local_crops", "gram_crops")


@MODELS.register_module()
class MultiCropPreprocessor(BaseDataPreprocessor):
    """Moves a collated batch to the device and normalises its crops there.

    8-bit crops travel as uint8, a quarter of the bytes of float32. A batch that brings drawn
    ``colors`` (``MultiCrop(color_on='device')``) is distorted first.

    Args:
        mean: mean per channel, of values in 0..1; default: ImageNet's.
        std: standard deviation per channel, of values in 0..1; default: ImageNet's.
        non_blocking: copy from pinned memory without waiting.
        statistics: instead of ``mean`` and ``std`` the data of a released model, whose values are
            taken: 'LVD-1689M' or 'SAT-493M'.

    Attributes:
        statistics (tuple): ``mean`` and ``std`` as lists.

    Raises:
        ValueError: ``mean`` and ``std`` of different lengths or out of range, one without the
            other, or beside ``statistics``; unknown ``statistics``.
    """

    def __init__(
        self,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        non_blocking: bool = True,
        *,
        statistics: str | None = None,
    ) -> None:
        super().__init__(non_blocking)
        mean, std = _resolve(mean, std, statistics)
        self.statistics = ([float(value) for value in mean], [float(value) for value in std])
        in_range = all(0 <= m <= 1 for m in mean) and all(0 < s <= 1 for s in std)
        if not mean or len(mean) != len(std) or not in_range:
            raise ValueError(
                "mean and std are one value per channel for images in 0..1 (divide 0..255 values "
                f"by 255), got {list(mean)} and {list(std)}"
            )
        # On the CPU also where the model is built without storage.
        mean, std = (
            torch.tensor(values, dtype=torch.float64, device="cpu") for values in self.statistics
        )
        scale = 1 / (255 * std)
        shift = 255 * scale * mean
        self.register_buffer("scale", scale.float().view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.float().view(1, -1, 1, 1), persistent=False)

    def forward(self, data: Mapping, training: bool = False) -> dict:
        """Return ``dict(inputs=batch, data_samples=None)`` for the algorithm's ``forward``.

        Args:
            data: batch of the multi-crop collate function: ``global_crops`` (2B, C, S, S) and
                ``local_crops`` (L*B, C, s, s), optionally ``gram_crops`` (2B, C, Sg, Sg), uint8 or
                float32 in 0..255; ``masks`` (2B, N) bool, ``mask_indices`` (M,) int64,
                ``masks_weight`` (M,) float32; perhaps ``colors``, with which the global and local
                crops are then distorted. Other entries stay behind.
            training: has no effect: a batch that was drawn is distorted.

        Raises:
            TypeError: ``data`` is no such dict, or crops of another dtype.
            ValueError: entries are missing, or crops do not have the channels of ``mean``.
        """
        if not isinstance(data, Mapping):
            raise TypeError(
                "MultiCropPreprocessor takes the dict of the multi-crop collate function, got "
                f"{type(data).__name__}"
            )
        missing = [key for key in REQUIRED if not isinstance(data.get(key), Tensor)]
        if missing:
            raise ValueError(
                f"the batch lacks the tensors {', '.join(missing)}; it has {', '.join(data)}. Use "
                "the multi-crop collate function (train_dataloader.transform of type MultiCrop)"
            )
        wanted = [*REQUIRED, *(["gram_crops"] if data.get("gram_crops") is not None else [])]
        batch = self.receive(data, wanted)
        for key in CROPS:
            if key in batch:
                batch[key] = self.normalize(key, batch[key])
        return dict(inputs=batch, data_samples=None)

    def receive(self, data: Mapping, keys: Iterable[str]) -> dict:
        """Entries of a collated batch on the device, their crops distorted but not normalised.

        Raises:
            ValueError: ``colors`` that were not drawn for these crops.
        """
        batch = self.cast_data({key: data[key] for key in keys})
        colors = data.get("colors")
        if colors is not None:
            for key in COLORED_CROPS:
                batch[key] = apply_colors(
                    batch[key],
                    colors[key],
                    blur_kernel=colors["blur_kernel"],
                    solarize_threshold=colors["solarize_threshold"],
                )
        return batch

    def normalize(self, key: str, crops: Tensor) -> Tensor:
        """``(crops / 255 - mean) / std`` in float32.

        Args:
            key: what the crops are, for messages.
            crops: (n, C, S, S), uint8 or float32 in 0..255, on the device.
        """
        if crops.dtype not in (torch.uint8, torch.float32):
            raise TypeError(f"{key} must be uint8 or float32 in 0..255, got {crops.dtype}")
        if crops.ndim != 4 or crops.shape[1] != self.scale.shape[1]:
            raise ValueError(
                f"{key} has shape {tuple(crops.shape)}, expected (n, {self.scale.shape[1]}, H, W): "
                "mean and std give one value per channel"
            )
        return (crops * self.scale).sub_(self.shift)


def _resolve(
    mean: Sequence[float] | None, std: Sequence[float] | None, statistics: str | None
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation from what was given."""
    if (mean is None) != (std is None):
        raise ValueError("mean and std belong together: give both or neither")
    if statistics is None:
        return (IMAGENET_MEAN, IMAGENET_STD) if mean is None else (mean, std)
    if mean is not None:
        raise ValueError(f"statistics={statistics!r} names mean and std: give one or the other")
    return statistics_of_data(statistics)[:2]

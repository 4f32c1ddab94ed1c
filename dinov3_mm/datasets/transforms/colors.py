"""Drawn colour distortions of a batch as tensors, for ``MultiCropPreprocessor``."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov3_mm.datasets.transforms.params import Distortion
from dinov3_mm.models.pretraining.device_colors import COLORED_CROPS, JITTER


def stack_colors(samples: Sequence[dict[str, Any]], channels: int) -> dict[str, Any]:
    """``colors`` of ``B`` samples to one dict, with rows in the order of the stacked crops.

    Args:
        samples: what ``MultiCrop(color_on='device')`` returns as ``colors``.
        channels: of the crops.

    Returns:
        dict: ``global_crops`` and ``local_crops``, each a dict of tensors as
        :func:`~dinov3_mm.models.pretraining.device_colors.apply_colors` takes it; ``blur_kernel``
        and ``solarize_threshold``.
    """
    first = samples[0]
    stacked = {
        key: _tensors([s[key][c] for c in range(len(first[key])) for s in samples], channels)
        for key in COLORED_CROPS
    }
    return {**stacked, **{key: value for key, value in first.items() if key not in COLORED_CROPS}}


def _tensors(drawn: list[Distortion], channels: int) -> dict[str, Tensor]:
    # Filled as arrays: writing single elements of tensors takes many times longer.
    jitter = np.full((len(drawn), len(JITTER)), -1)
    factors = np.ones((len(drawn), len(JITTER)))
    dropped = np.zeros((len(drawn), channels), bool)
    for row, distortion in enumerate(drawn):
        for place, (name, factor) in enumerate(distortion.jitter):
            jitter[row, place], factors[row, place] = JITTER.index(name), factor
        for channel in distortion.dropped:
            dropped[row, channel] = True
    return {
        "jitter": torch.from_numpy(jitter),
        "factors": torch.from_numpy(factors),
        "grayscale": torch.tensor([each.grayscale for each in drawn]),
        "blur_sigma": torch.tensor([each.blur_sigma or 0.0 for each in drawn], dtype=torch.float64),
        "solarize": torch.tensor([each.solarize for each in drawn]),
        "dropped": torch.from_numpy(dropped),
    }

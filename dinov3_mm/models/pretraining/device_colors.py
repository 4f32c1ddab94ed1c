"""The drawn colour distortions of a batch, applied where the model is."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from . import color_ops

JITTER = ("brightness", "contrast", "saturation", "hue")
# Pixels that are worked on at a time; bounds the memory of intermediate float images.
_MAX_PIXELS = 1 << 23
_COLORS = 3
COLORED_CROPS = ("global_crops", "local_crops")
KEYS = ("jitter", "factors", "grayscale", "blur_sigma", "solarize", "dropped")


def apply_colors(
    crops: Tensor, colors: Mapping[str, Tensor], *, blur_kernel: int, solarize_threshold: int
) -> Tensor:
    """Jitter, grayscale, blur, solarisation and dropping of channels, in this order.

    Saturation, hue and grayscale are left out for other than three channels. The parameters stay
    on the host, which so knows without waiting which images an operation is for.

    Args:
        crops: (n, C, S, S), uint8 or float32 in 0..255; not changed.
        colors: on the CPU ``jitter`` (n, 4) int64, the operations in their order as indices into
            ``JITTER``, -1 for none, and their ``factors`` (n, 4) float64; ``grayscale`` (n,) bool;
            ``blur_sigma`` (n,) float64, 0 for none; ``solarize`` (n,) bool; ``dropped`` (n, C)
            bool, channels to set to 0.
        blur_kernel: side of the blur kernel.
        solarize_threshold: first inverted value.

    Raises:
        ValueError: parameters that are missing or of another number of images or channels.
    """
    _check(crops, colors)
    steps = _plan(crops.shape[1], colors, blur_kernel, solarize_threshold)
    steps = [(apply, rows, values) for apply, rows, values in steps if len(rows)]
    if not steps:
        return crops
    crops = crops.clone()
    limit = max(1, _MAX_PIXELS // crops[0, 0].numel())
    counts = [len(rows) for _, rows, _ in steps]
    # One copy for all operations.
    rows_of = torch.cat([rows for _, rows, _ in steps]).to(crops.device, non_blocking=True)
    values_of = torch.cat([values for *_, values in steps]).to(crops.device, non_blocking=True)
    for (apply, *_), rows, values in zip(steps, rows_of.split(counts), values_of.split(counts)):
        for some, own in zip(rows.split(limit), values.split(limit)):
            crops.index_copy_(0, some, apply(crops.index_select(0, some), own))
    return crops


Step = tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]


def _plan(channels: int, colors: Mapping[str, Tensor], kernel: int, threshold: int) -> list[Step]:
    """Operations in their order, the rows that each is for, and a number for each row."""
    steps: list[Step] = []
    names = JITTER if channels == _COLORS else JITTER[:2]
    for place in range(colors["jitter"].shape[1]):
        for code, name in enumerate(names):
            rows = (colors["jitter"][:, place] == code).nonzero().flatten()
            operation = getattr(color_ops, f"adjust_{name}")
            steps.append((operation, rows, colors["factors"][rows, place]))
    if channels == _COLORS:
        steps.append(_flagged(lambda images, _: color_ops.grayscale(images), colors["grayscale"]))
    blurred = colors["blur_sigma"].nonzero().flatten()
    steps.append(
        (
            lambda images, sigma: color_ops.gaussian_blur(images, sigma, kernel),
            blurred,
            colors["blur_sigma"][blurred],
        )
    )
    steps.append(
        _flagged(lambda images, _: color_ops.solarize(images, threshold), colors["solarize"])
    )
    steps += [_flagged(_drop(each), colors["dropped"][:, each]) for each in range(channels)]
    return steps


def _drop(channel: int) -> Callable[[Tensor, Tensor], Tensor]:
    def drop(images: Tensor, _: Tensor) -> Tensor:
        images[:, channel] = 0
        return images

    return drop


def _flagged(operation: Callable[[Tensor, Tensor], Tensor], flags: Tensor) -> Step:
    rows = flags.nonzero().flatten()
    return operation, rows, torch.zeros(len(rows), dtype=torch.float64)


def _check(crops: Tensor, colors: Mapping[str, Tensor]) -> None:
    missing = [key for key in KEYS if key not in colors]
    if missing:
        raise ValueError(f"the drawn colours lack {', '.join(missing)}; they have {list(colors)}")
    for key in KEYS:
        if len(colors[key]) != len(crops):
            raise ValueError(
                f"colours are drawn for {len(colors[key])} crops ({key}), the batch has "
                f"{len(crops)}: crops and colours must come from the same collate function"
            )
    if colors["dropped"].shape[1] != crops.shape[1]:
        raise ValueError(
            f"colours are drawn for {colors['dropped'].shape[1]} channels, the crops have "
            f"{crops.shape[1]}"
        )

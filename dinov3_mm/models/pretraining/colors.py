"""The drawn colour distortions of a batch, applied where the model is."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

# --- The operations, with parameters for each image ---
#
# They give what ``dinov3_mm.datasets.transforms.pixel_ops`` gives image by image with OpenCV: on
# uint8 with its fixed-point arithmetic and roundings, on float32 in 0..255 without rounding. All
# work elementwise, so the result does not depend on the matrix precision of the device.


LUMA = (0.299, 0.587, 0.114)
# OpenCV's 8-bit luma, and its colour matrices, are integers over these.
_LUMA_BITS, _INTEGER_LUMA = 15, (9798, 19235, 3735)
_MATRIX_BITS = 10
_HSV_BITS = 12
# Values of a blend are truncated, as PIL does, by a shift before rounding.
_TRUNCATE = -0.498
# A Gaussian tap below half a grey level of full contrast changes nothing in 8 bits.
_NEGLIGIBLE_TAP = 1 / 512


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """``factor * image``, clipped.

    Args:
        images: (n, C, H, W), uint8 or float32 in 0..255.
        factor: (n,) float64.
    """
    scaled = images * _per_image(factor)
    if images.dtype == torch.uint8:
        scaled = (scaled + _per_image(torch.where(factor == 0, 0.0, _TRUNCATE))).abs_()
    return _as(images, scaled)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """``factor * image + (1 - factor) * mean luma``, clipped; of other than three channels the mean
    of all.
    """
    means = images.sum((2, 3), dtype=torch.float64) / images[0, 0].numel()
    if images.shape[1] == len(LUMA):
        level = (means * means.new_tensor(LUMA)).sum(1)
    else:
        level = means.mean(1)
    shift = (1 - factor) * level
    if images.dtype == torch.uint8:
        shift = (1 - factor) * (level + 0.5).floor() + _TRUNCATE
    return _as(images, images * _per_image(factor) + _per_image(shift))


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """``factor * image + (1 - factor) * luma``, clipped; three channels."""
    scale = factor.float()[:, None]
    others = (1 - factor).float()[:, None] * scale.new_tensor(LUMA)
    own = others + scale
    if images.dtype == torch.uint8:
        others, own = ((matrix * 2**_MATRIX_BITS).round() for matrix in (others, own))
    own, others = (weights[..., None, None] for weights in (own - others, others))
    turned = (images * others).sum(1, keepdim=True) + images * own
    if images.dtype == torch.uint8:
        shift = round((_TRUNCATE + 0.5) * 2**_MATRIX_BITS)
        turned = ((turned + shift) / 2**_MATRIX_BITS).floor_()
    return _as(images, turned)


def adjust_hue(images: Tensor, factor: Tensor) -> Tensor:
    """Turn the hue by ``factor`` of a full circle in HSV; three channels."""
    if images.dtype == torch.uint8:
        hue, saturation, value = _to_hsv_8bit(images)
        # OpenCV's hue has 256 steps on the way there and 255 on the way back.
        step = (factor * 255).trunc().to(torch.int32)[:, None, None]
        sextant = ((hue + step) % 256).float() * (6 / 255)
        return _as(images, _from_hsv(sextant, saturation.float() / 255, value.float()))
    hue, saturation, value = _to_hsv(images)
    return _as(images, _from_hsv(hue + 6 * factor.float()[:, None, None], saturation, value))


def grayscale(images: Tensor) -> Tensor:
    """ITU-R 601 luma, repeated over the three channels."""
    if images.dtype == torch.uint8:
        weights = torch.tensor(_INTEGER_LUMA, device=images.device, dtype=torch.int32)
        total = (images * weights.view(1, 3, 1, 1)).sum(1, keepdim=True, dtype=torch.int32)
        luma = (total + (1 << _LUMA_BITS - 1)) >> _LUMA_BITS
    else:
        luma = (images * images.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True)
    return luma.to(images.dtype).expand_as(images)


def gaussian_blur(images: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Gaussian blur of odd ``kernel_size`` with mirrored borders (the edge pixel not repeated).

    Args:
        images: (n, C, H, W), sides larger than half of the kernel.
        sigma: (n,) float64, pixels.
        kernel_size: taps.
    """
    radius = kernel_size // 2
    offsets = torch.arange(radius + 1, device=sigma.device, dtype=torch.float64)
    taps = torch.exp(-(offsets**2) / (2 * sigma[:, None] ** 2))
    if images.dtype == torch.uint8:
        reach = sigma[:, None] * math.sqrt(-2 * math.log(_NEGLIGIBLE_TAP))
        taps = torch.where((offsets == 0) | (offsets <= reach), taps, 0.0)
    taps = (taps / (taps[:, :1] + 2 * taps[:, 1:].sum(1, keepdim=True))).float()
    blurred = F.pad(images.float(), [radius] * 4, mode="reflect")
    for dim in (2, 3):
        blurred = _filter(blurred, taps, dim)
    return _as(images, blurred)


def _filter(images: Tensor, taps: Tensor, dim: int) -> Tensor:
    """Symmetric filter along an axis; (n, radius + 1) taps from the centre outwards."""
    radius = taps.shape[1] - 1
    length = images.shape[dim] - 2 * radius

    def shifted(offset: int) -> Tensor:
        return images.narrow(dim, radius + offset, length)

    result = shifted(0) * _per_image(taps[:, 0])
    for offset in range(1, radius + 1):
        result.addcmul_(shifted(offset) + shifted(-offset), _per_image(taps[:, offset]))
    return result


def solarize(images: Tensor, threshold: int) -> Tensor:
    """Invert every value from ``threshold`` on."""
    return torch.where(images < threshold, images, 255 - images)


def _to_hsv_8bit(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue of 256 steps, saturation and value of OpenCV's integer conversion, (n, H, W) int32."""
    red, green, blue = images.int().unbind(1)
    value = images.amax(1).int()
    spread = value - images.amin(1).int()
    divisors = torch.arange(256, device=images.device, dtype=torch.float64).clamp_(min=1)
    one, half = 1 << _HSV_BITS, 1 << _HSV_BITS - 1
    hue_table, saturation_table = (
        (top * one / divisors).round_().int() for top in (256 / 6, 255.0)
    )
    sextants = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = (sextants * hue_table[spread] + half) >> _HSV_BITS
    saturation = (spread * saturation_table[value] + half) >> _HSV_BITS
    return hue, saturation, value


def _to_hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in sextants, saturation in 0..1 and value, (n, H, W)."""
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    spread = value - images.amin(1)
    inverse = 1 / (spread + torch.finfo(torch.float32).eps)
    hue = torch.where(
        value == red,
        (green - blue) * inverse,
        torch.where(value == green, (blue - red) * inverse + 2, (red - green) * inverse + 4),
    )
    return hue, spread / (value.abs() + torch.finfo(torch.float32).eps), value


def _from_hsv(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Hue in sextants, saturation in 0..1 and value (n, H, W) to (n, 3, H, W)."""
    depth = value * saturation
    channels = []
    for first in (5, 3, 1):
        place = (hue + first) % 6
        channels.append(value - depth * torch.minimum(place, 4 - place).clamp_(0, 1))
    return torch.stack(channels, 1)


def _per_image(values: Tensor) -> Tensor:
    """(n,) to float32 (n, 1, 1, 1)."""
    return values.float().view(-1, 1, 1, 1)


def _as(images: Tensor, values: Tensor) -> Tensor:
    """Values clipped to 0..255, rounded where ``images`` are 8-bit."""
    if images.dtype == torch.uint8:
        values = values.round()
    return values.clamp(0, 255).to(images.dtype)


# --- What was drawn, applied ---


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
_ADJUST = {
    "brightness": adjust_brightness,
    "contrast": adjust_contrast,
    "saturation": adjust_saturation,
    "hue": adjust_hue,
}


def _plan(channels: int, colors: Mapping[str, Tensor], kernel: int, threshold: int) -> list[Step]:
    """Operations in their order, the rows that each is for, and a number for each row."""
    steps: list[Step] = []
    names = JITTER if channels == _COLORS else JITTER[:2]
    for place in range(colors["jitter"].shape[1]):
        for code, name in enumerate(names):
            rows = (colors["jitter"][:, place] == code).nonzero().flatten()
            operation = _ADJUST[name]
            steps.append((operation, rows, colors["factors"][rows, place]))
    if channels == _COLORS:
        steps.append(_flagged(lambda images, _: grayscale(images), colors["grayscale"]))
    blurred = colors["blur_sigma"].nonzero().flatten()
    steps.append(
        (
            lambda images, sigma: gaussian_blur(images, sigma, kernel),
            blurred,
            colors["blur_sigma"][blurred],
        )
    )
    steps.append(_flagged(lambda images, _: solarize(images, threshold), colors["solarize"]))
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

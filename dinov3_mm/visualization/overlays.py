"""Predictions drawn over their images."""

from collections.abc import Sequence

import cv2
import matplotlib
import numpy as np

Colour = tuple[int, int, int]

_FONT = cv2.FONT_HERSHEY_SIMPLEX


def class_colours(count: int, palette: Sequence[Colour] = ()) -> np.ndarray:
    """RGB colours (count, 3) of uint8: those of ``palette``, or distinct ones if it is short."""
    if len(palette) >= count:
        return np.array(palette[:count], np.uint8)
    hues = (np.arange(count) * 0.61803398875) % 1  # the golden ratio keeps neighbours apart
    hsv = np.stack([hues * 179, np.full(count, 200), 255 - 60 * (np.arange(count) % 3)], axis=1)
    return cv2.cvtColor(hsv.astype(np.uint8)[None], cv2.COLOR_HSV2RGB)[0]


def draw_segments(
    image: np.ndarray,
    labels: np.ndarray,
    palette: Sequence[Colour] = (),
    *,
    opacity: float = 0.55,
    ignore: int = 255,
) -> np.ndarray:
    """Classes as colours over an image.

    Args:
        image: (H, W, 3) uint8.
        labels: (H, W) class of every pixel.
        palette: a colour for each class.
        opacity: of the colours, 0 to 1.
        ignore: label that is left as it is.

    Returns:
        (H, W, 3) uint8.
    """
    known = labels != ignore
    colours = class_colours(int(labels[known].max(initial=0)) + 1, palette)
    result = image.astype(np.float32)
    result[known] = (1 - opacity) * result[known] + opacity * colours[labels[known]]
    return result.round().astype(np.uint8)


def draw_boxes(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    captions: Sequence[str],
    palette: Sequence[Colour] = (),
    masks: np.ndarray | None = None,
) -> np.ndarray:
    """Boxes with captions, and masks where there are any, over an image.

    Args:
        image: (H, W, 3) uint8.
        boxes: (N, 4) x1, y1, x2, y2 in pixels.
        labels: (N,) class, which decides the colour.
        captions: N texts.
        palette: a colour for each class.
        masks: (N, H, W) bool.

    Returns:
        (H, W, 3) uint8.
    """
    colours = class_colours(int(labels.max(initial=0)) + 1, palette)
    result = image.astype(np.float32)
    for label, mask in zip(labels, masks if masks is not None else ()):
        result[mask] = 0.5 * result[mask] + 0.5 * colours[label]
    result = np.ascontiguousarray(result.round().astype(np.uint8))
    scale = max(0.35, min(image.shape[:2]) / 1200)
    thickness = max(1, round(min(image.shape[:2]) / 400))
    for box, label, caption in zip(boxes, labels, captions):
        colour = tuple(int(value) for value in colours[label])
        left, top, right, bottom = (round(float(value)) for value in box)
        cv2.rectangle(result, (left, top), (right, bottom), colour, thickness)
        (width, height), base = cv2.getTextSize(caption, _FONT, scale, 1)
        # Inside of the picture where the box touches its upper border.
        line = max(top, height + base)
        cv2.rectangle(result, (left, line - height - base), (left + width, line), colour, -1)
        ink = (0, 0, 0) if sum(colour) > 380 else (255, 255, 255)
        cv2.putText(result, caption, (left, line - base // 2), _FONT, scale, ink, 1, cv2.LINE_AA)
    return result


def draw_caption(image: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """An image with lines of text in a bar above it; a narrow image is framed to the text."""
    scale = max(0.4, min(image.shape[:2]) / 900)
    sizes = [cv2.getTextSize(line, _FONT, scale, 1) for line in lines]
    step = max(height + base + 4 for (_, height), base in sizes)
    width = max(image.shape[1], *(length + 8 for (length, _), _ in sizes))
    result = np.full((image.shape[0] + step * len(lines) + 4, width, 3), 255, np.uint8)
    for number, line in enumerate(lines, 1):
        place = (4, step * number - 4)
        cv2.putText(result, line, place, _FONT, scale, (0, 0, 0), 1, cv2.LINE_AA)
    result[-image.shape[0] :, : image.shape[1]] = image
    return result


def colour_depth(
    depth: np.ndarray, low: float | None = None, high: float | None = None
) -> np.ndarray:
    """Depth as colours, near is bright.

    Args:
        depth: (H, W); values that are not finite or not positive become black.
        low, high: depths of the ends of the scale; None for 2 and 98 % of the values.

    Returns:
        (H, W, 3) uint8.
    """
    known = np.isfinite(depth) & (depth > 0)
    if not known.any():
        return np.zeros((*depth.shape, 3), np.uint8)
    low = float(np.percentile(depth[known], 2)) if low is None else low
    high = float(np.percentile(depth[known], 98)) if high is None else high
    scaled = np.clip((high - np.where(known, depth, high)) / max(high - low, 1e-6), 0, 1)
    colours = matplotlib.colormaps["magma"](scaled)[..., :3]
    return (255 * colours * known[..., None]).round().astype(np.uint8)

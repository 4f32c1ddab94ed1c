"""Two-crop retrieval: is an image recognised from another view of it? Needs no labels."""

import cv2
import numpy as np
import torch
from torch import Tensor

from dinov3_mm.datasets.evaluation_images import CachedImages, ImageSource, to_chw
from dinov3_mm.features.frozen import Sharing

from .knn import nearest_neighbours


class RandomViews(CachedImages):
    """One augmented view of every image: random crop, flip, colour change, sometimes greyscale.

    View ``view`` of image ``index`` is a function of (seed, index, view) only, so that runs and
    ranks see the same views. The augmentation is fixed and does not follow the training's, which
    keeps scores of different recipes comparable. Images that do not have three channels change in
    brightness and contrast only.

    Args:
        source: images by ``load_image(i)``, (H, W, C) uint8 or float32 in 0..255.
        image_size: side S of the (C, S, S) views.
        view: which view, 0 or 1 for a retrieval pair.
        seed: start of the random streams.
        min_area: smallest area of the crop as a share of the image.
        cache: keep views in memory.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        view: int,
        *,
        seed: int = 0,
        min_area: float = 0.25,
        cache: bool = False,
    ) -> None:
        if not 0 < min_area <= 1:
            raise ValueError(f"min_area must be in (0, 1], got {min_area}")
        if len(source) < 2:
            raise ValueError(f"retrieval needs at least two images, got {len(source)}")
        super().__init__(source, cache)
        self.image_size, self.view = int(image_size), int(view)
        self.seed, self.min_area = seed, min_area

    def read(self, index: int) -> Tensor:
        """View (C, S, S), of the image's type."""
        rng = np.random.default_rng([self.seed, index, self.view])
        image = _random_crop(self.source.load_image(index), self.image_size, self.min_area, rng)
        if rng.random() < 0.5:
            image = image[:, ::-1]
        return to_chw(_random_colour(image, rng))


def _random_crop(
    image: np.ndarray, size: int, min_area: float, rng: np.random.Generator
) -> np.ndarray:
    """Crop of a random area and aspect ratio (3/4 to 4/3), resized to ``size`` x ``size``."""
    height, width = image.shape[:2]
    area = rng.uniform(min_area, 1) * height * width
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    crop_w = int(np.clip(round(np.sqrt(area * ratio)), 1, width))
    crop_h = int(np.clip(round(np.sqrt(area / ratio)), 1, height))
    top, left = rng.integers(height - crop_h + 1), rng.integers(width - crop_w + 1)
    crop = image[top : top + crop_h, left : left + crop_w]
    shrinking = crop_h > size or crop_w > size
    mode = cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC
    # cv2.resize takes up to four channels at a time, and drops the axis of a single one.
    parts = [crop[..., first : first + 4] for first in range(0, crop.shape[2], 4)]
    resized = [cv2.resize(part, (size, size), interpolation=mode) for part in parts]
    return np.dstack(resized) if len(parts) > 1 else resized[0].reshape(size, size, -1)


def _random_colour(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation by factors in [0.6, 1.4]; grey with probability 0.2.

    Saturation and grey need three channels.
    """
    brightness, contrast, saturation = rng.uniform(0.6, 1.4, 3)
    saturation = 0.0 if rng.random() < 0.2 else saturation
    values = image.astype(np.float32) * brightness
    values = (values - values.mean()) * contrast + values.mean()
    if image.shape[2] == 3:
        grey = (values @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]
        values = grey + (values - grey) * saturation
    values = np.clip(values if image.dtype == np.float32 else np.rint(values), 0, 255)
    return values.astype(image.dtype)


def two_crop_retrieval(first: Tensor, second: Tensor, *, shared: bool = False) -> float:
    """Top-1 in percent: first views whose nearest second view (cosine) is that of the same image.

    Args:
        first, second: (N, D) features of the two views, image by image. Chance is 100 / N.
        shared: every rank holds all rows and looks for its share of the first views; the counts are
            added up.
    """
    if first.shape != second.shape or len(first) < 2:
        raise ValueError(
            f"need two equal (N, D) matrices with N >= 2, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    ranks = Sharing(shared)
    own = ranks.rows(len(first))

    def count() -> Tensor:
        _, nearest = nearest_neighbours(first[own], second, 1)
        return (nearest[:, 0] == torch.arange(own.start, own.stop, device=first.device)).sum()

    (hits,) = ranks.add(ranks.meet("retrieval", count))
    return 100 * (hits.item() / len(first))

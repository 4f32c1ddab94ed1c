"""The images with which an exported file is compared to PyTorch."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dinov3_mm.apis.preparation import ImageLike, ImagePreparation, load_pixels
from dinov3_mm.checkpoints import Statistics
from dinov3_mm.datasets import SyntheticScenes
from dinov3_mm.datasets.image_files import LeftOut, find_files, image_extensions
from dinov3_mm.datasets.images import read_image

from .shapes import InputShapes, Size

# Evenly spaced files of a folder, or rendered scenes: enough to tell a wrong graph from rounding.
NUM_IMAGES = 2
_SCENES_SEED = 2026


def find_images(paths: Sequence[str | os.PathLike]) -> list[str]:
    """The files among ``paths``, and a few of those in folders.

    Raises:
        FileNotFoundError: if a path does not exist or a folder holds no images.
    """
    found: list[str] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no image or folder of images at {path}")
        if path.is_file():
            found.append(str(path))
            continue
        left_out = LeftOut()
        files = list(find_files(str(path), image_extensions(), left_out))
        if not files:
            raise FileNotFoundError(
                f"no images under {path}" + (f"; {left_out}" if left_out else "")
            )
        found += (str(path / file) for file in files[:: -(-len(files) // NUM_IMAGES)])
    return found


class CheckBatches:
    """Normalised batches (B, C, H, W) of every shape that is checked.

    Each size is run with all images at once, the first also with one image, unless the batch is
    fixed.

    Args:
        shapes: sizes and batch.
        statistics: of the input normalisation.
        images: paths, arrays (H, W, C) or anything that ``load_pixels`` takes; None renders scenes.
    """

    def __init__(
        self,
        shapes: InputShapes,
        statistics: Statistics,
        images: Sequence[ImageLike] | None = None,
    ) -> None:
        if images is None and shapes.channels != 3:
            raise ValueError(
                f"the backbone takes {shapes.channels} channels and the rendered scenes have 3; "
                "give images to check the file with"
            )
        if images is not None and not len(images):
            raise ValueError("images is empty; give at least one, or None for rendered scenes")
        self.shapes = shapes
        self.statistics = statistics
        self.images = images

    def __iter__(self) -> Iterator[Tensor]:
        for index, size in enumerate(self.shapes.sizes):
            batch = self._batch(size)
            if self.shapes.batch:
                repeats = -(-self.shapes.batch // len(batch))
                yield batch.repeat(repeats, 1, 1, 1)[: self.shapes.batch]
                continue
            yield batch
            if index == 0 and len(batch) > 1:
                yield batch[:1]

    def _batch(self, size: Size) -> Tensor:
        images: Sequence[ImageLike] | None = self.images
        if images is None:
            scenes = SyntheticScenes(NUM_IMAGES, seed=_SCENES_SEED, image_size=max(size))
            images = [scenes.load_image(index) for index in range(NUM_IMAGES)]
        prepare = ImagePreparation(
            self.shapes.channels, self.shapes.multiple, size, "short_side_crop"
        )
        pixels = torch.stack([prepare(load_pixels(image, read_image)).float() for image in images])
        mean, std = (
            torch.tensor(values).view(-1, 1, 1)
            for values in (self.statistics.mean, self.statistics.std)
        )
        return (pixels / 255 - mean) / std

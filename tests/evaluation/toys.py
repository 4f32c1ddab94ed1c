"""Small sources and a closed-form backbone for the evaluation tests."""

import random
from typing import NamedTuple

import numpy as np
import torch
from mmengine.registry import DATASETS
from torch import Tensor, nn

PALETTE = np.array([[230, 30, 30], [30, 200, 40], [40, 60, 220], [220, 210, 40]], np.uint8)


@DATASETS.register_module()
class ColourSquares:
    """Images of class colour with a noisy right half; semantic classes are left/right by class."""

    num_classes = 4
    num_semantic_classes = 5

    def __init__(self, length: int, size: int = 32, seed: int = 0) -> None:
        self.length, self.size, self.seed = length, size, seed
        self.loads = 0

    def __len__(self) -> int:
        return self.length

    def load_image(self, index: int) -> np.ndarray:
        self.loads += 1
        rng = np.random.default_rng([self.seed, index])
        image = np.empty((self.size, self.size, 3), np.uint8)
        image[:] = PALETTE[self.label(index)]
        half = self.size // 2
        image[:, half:] = rng.integers(0, 256, (self.size, half, 3))
        return image

    def label(self, index: int) -> int:
        return index % 4

    def semantic_mask(self, index: int) -> np.ndarray:
        mask = np.zeros((self.size, self.size), np.int64)
        mask[:, : self.size // 2] = 1 + self.label(index)
        return mask


@DATASETS.register_module()
class UnlabelledSquares:
    """The same images without any label."""

    def __init__(self, length: int) -> None:
        self.source = ColourSquares(length, size=48)

    def __len__(self) -> int:
        return len(self.source)

    def load_image(self, index: int) -> np.ndarray:
        return self.source.load_image(index)


class Tokens(NamedTuple):
    cls: Tensor
    patches: Tensor


class MeanColour(nn.Module):
    """CLS = weight * mean colour of the image, patches = mean colour of each 16-pixel patch.

    ``draws`` makes a forward consume random numbers, which must not reach the training.
    """

    def __init__(self, draws: bool = False) -> None:
        super().__init__()
        self.draws = draws
        self.weight = nn.Parameter(torch.ones(3))
        self.drop = nn.Dropout(0.5)
        self.batches: list[int] = []
        self.dtypes: list[torch.dtype] = []

    def forward_tokens(self, images: Tensor) -> Tokens:
        self.batches.append(len(images))
        if self.draws:
            torch.rand(5), np.random.rand(), random.random()
        identity = torch.eye(3, device=images.device)
        self.dtypes.append((images.mean((2, 3)) @ identity).dtype)
        patches = nn.functional.avg_pool2d(images, 16).flatten(2).transpose(1, 2)
        return Tokens(self.drop(images.mean((2, 3))) * self.weight, patches * self.weight)

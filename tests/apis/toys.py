"""Images and small extractors for the tests of the apis."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dinov3_mm.apis import FeatureExtractor
from dinov3_mm.models.backbones.outputs import TokenOutput
from tests.checkpoints.toys import toy_backbone

STATISTICS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}


def toy_extractor(backbone: nn.Module | None = None, **options) -> FeatureExtractor:
    """Extractor of a redrawn toy ViT (patch 8, width 32, 2 blocks) for 32 px images."""
    options = {"image_size": 32, **STATISTICS, **options}
    return FeatureExtractor(backbone or toy_backbone(), **options)


def toy_pictures(count: int, height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    """Smooth random pictures (count, height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, height // 8, width // 8, 3), dtype=np.uint8)
    size = (width, height)
    return np.stack([np.asarray(Image.fromarray(p).resize(size, 2)) for p in small])


def write_pictures(folder: Path, count: int, **options) -> list[Path]:
    """PNG files ``00.png`` and so on; PNG keeps the pixels exactly."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index:02d}.png" for index in range(count)]
    for path, picture in zip(paths, toy_pictures(count, **options)):
        Image.fromarray(picture).save(path)
    return paths


class MeanPatches(nn.Module):
    """A backbone whose tokens are mean colours: a patch token depends on its own pixels only.

    ``passes`` records the shapes of the images, ``fail_at`` raises in that pass.
    """

    token_stride, num_layers = 8, 1

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.passes: list[tuple[int, ...]] = []
        self.fail_at = fail_at

    def forward_tokens(self, images: Tensor) -> TokenOutput:
        self.passes.append(tuple(images.shape))
        if self.fail_at == len(self.passes):
            raise RuntimeError("this pass fails")
        patches = nn.functional.avg_pool2d(images, 8).flatten(2).transpose(1, 2)
        cls = images.mean((2, 3))
        return TokenOutput(cls, cls[:, None], patches, patches)

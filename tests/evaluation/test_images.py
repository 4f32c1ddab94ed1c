"""Geometry of evaluation inputs and masks, labels of images and patches."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_mm.datasets.evaluation_images import ImageSet, class_labels, patch_labels, to_chw
from tests.evaluation.toys import ColourSquares, UnlabelledSquares


class OneImage:
    """A source of one given image and mask."""

    def __init__(self, image: np.ndarray, mask: np.ndarray | None = None) -> None:
        self.image, self.mask = image, mask

    def __len__(self) -> int:
        return 1

    def load_image(self, index: int) -> np.ndarray:
        return self.image

    def semantic_mask(self, index: int) -> np.ndarray:
        return self.mask


def _smooth_image(height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))


@pytest.mark.parametrize(("height", "width"), [(120, 180), (200, 90), (40, 64)])
def test_resize_and_crop_match_pillow(height, width):
    image = _smooth_image(height, width)
    scale = 72 / min(height, width)
    size = int(width * scale), int(height * scale)
    resized = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
    top, left = round((size[1] - 64) / 2), round((size[0] - 64) / 2)
    expected = resized[top : top + 64, left : left + 64]
    actual = ImageSet(OneImage(image), 64, 72)[0]
    assert actual.shape == (3, 64, 64) and actual.dtype == torch.uint8
    difference = np.abs(actual.permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.max() <= 2 and difference.mean() < 0.1  # fixed-point weights


def test_image_of_the_right_size_is_untouched():
    image = _smooth_image(32, 32)
    assert np.array_equal(ImageSet(OneImage(image), 32)[0].permute(1, 2, 0).numpy(), image)


def test_mask_follows_the_image():
    mask = np.zeros((100, 160), np.int64)
    mask[30:70, 60:120] = 3
    image = np.repeat((mask[..., None] * 80).astype(np.uint8), 3, axis=2)
    images = ImageSet(OneImage(image, mask), 48, 56)
    squared = images.mask(0)
    assert squared.shape == (48, 48) and set(squared.unique().tolist()) == {0, 3}
    agreement = ((images[0][0] > 120) == (squared == 3)).float().mean()
    assert agreement > 0.97  # the image's edges are blurred by half a pixel


def test_cache_reads_once():
    source = ColourSquares(3)
    cached, plain = ImageSet(source, 32, cache=True), ImageSet(source, 32)
    first = cached[1]
    assert torch.equal(cached[1], first) and source.loads == 1
    assert torch.equal(plain[1], plain[1]) and source.loads == 3


def test_patch_labels_majority_ties_and_ignored():
    mask = torch.full((1, 4, 8), 255)
    mask[0, :2, :2] = torch.tensor([[1, 1], [1, 2]])  # majority
    mask[0, :2, 2:4] = torch.tensor([[2, 2], [1, 1]])  # tie: the lower class
    mask[0, :2, 4:6] = torch.tensor([[0, 255], [255, 255]])  # mostly ignored
    mask[0, :2, 6:8] = torch.tensor([[2, 255], [255, 2]])  # half ignored still counts
    expected = torch.tensor([[[1, 1, 255, 2], [255, 255, 255, 255]]])
    assert torch.equal(patch_labels(mask, 2, 3), expected)


def test_patch_labels_refuse_bad_masks():
    with pytest.raises(ValueError, match="no multiple of patch size 5"):
        patch_labels(torch.zeros(1, 4, 8, dtype=torch.int64), 5, 3)
    with pytest.raises(ValueError, match=r"span \[0, 3\]"):
        patch_labels(torch.tensor([[[0, 3], [0, 0]]]), 2, 3)


def test_class_labels():
    assert class_labels(ColourSquares(6)).tolist() == [0, 1, 2, 3, 0, 1]
    with pytest.raises(TypeError, match="two-crop retrieval"):
        class_labels(UnlabelledSquares(3))
    source = ColourSquares(3)
    source.label = lambda index: -1 if index == 2 else 0
    with pytest.raises(ValueError, match="image 2"):
        class_labels(source)


def test_bad_sets_and_images_are_refused():
    with pytest.raises(ValueError, match="no images"):
        ImageSet(ColourSquares(0), 32)
    with pytest.raises(ValueError, match="at most resize_size"):
        ImageSet(ColourSquares(2), 64, 32)
    for bad in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.uint16)):
        with pytest.raises(TypeError, match="uint8 image"):
            to_chw(bad)

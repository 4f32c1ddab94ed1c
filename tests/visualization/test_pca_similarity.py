"""PCA colours and similarity maps against closed forms, and the figures they become."""

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_mm.visualization.patches import (
    PatchPCA,
    foreground_mask,
    pca_images,
    save_pca_grid,
    save_similarity_figure,
    similarity_maps,
)


def _features(num: int = 3, side: int = 6, dims: int = 10) -> torch.Tensor:
    return torch.randn(num, side**2, dims) * torch.linspace(4, 0.1, dims) + 2


def _pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_projection_is_white_and_its_sign_is_fixed():
    features = _features()
    pca = PatchPCA(features)
    z = pca.project(features).flatten(0, 1).double()
    torch.testing.assert_close(z.mean(0), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(z.T @ z / len(z), torch.eye(3).double(), atol=1e-5, rtol=0)
    for _ in range(5):
        components = PatchPCA(_features()).components
        largest = components.gather(0, components.abs().argmax(0, keepdim=True))
        assert (largest > 0).all()


def test_colours_do_not_depend_on_order_or_scale():
    features = _features()
    colours = pca_images(features)
    assert colours.shape == (3, 6, 6, 3) and colours.min() >= 0 and colours.max() <= 1
    turned = pca_images(features.flip(0)).flip(0)
    torch.testing.assert_close(turned, colours, atol=1e-5, rtol=0)
    torch.testing.assert_close(pca_images(50 * features), colours, atol=1e-5, rtol=0)


def test_similar_patches_have_similar_colours():
    labels = torch.randint(0, 3, (2, 36))
    features = torch.eye(3)[labels] @ torch.randn(3, 10) * 5 + 0.1 * torch.randn(2, 36, 10)
    colours = pca_images(features).flatten(0, 2)
    same = labels.flatten()[:, None] == labels.flatten()[None]
    distance = torch.cdist(colours, colours)
    assert distance[~same].min() > distance[same].mean() * 2


def test_features_with_two_directions_stay_finite():
    colours = pca_images(torch.randn(2, 16, 2) @ torch.randn(2, 8))
    assert torch.isfinite(colours).all()


def _subject() -> tuple[torch.Tensor, torch.Tensor]:
    inside = torch.zeros(4, 8, 8, dtype=torch.bool)
    inside[:, 2:6, 3:7] = True
    features = torch.where(inside[..., None], 3.0, -1.0) * torch.randn(10)
    return features + 0.1 * torch.randn(4, 8, 8, 10), inside


def test_foreground_is_the_side_away_from_the_border():
    features, inside = _subject()
    assert torch.equal(foreground_mask(features), inside)
    assert torch.equal(foreground_mask(-features), inside)
    sides = [foreground_mask(features, bright_side=side) for side in (True, False)]
    assert torch.equal(sides[0], ~sides[1])


def test_background_is_black_and_not_fitted():
    features, inside = _subject()
    colours = pca_images(features, inside)
    assert (colours[~inside] == 0).all() and (colours[inside].std(0) > 0.1).all()
    with pytest.raises(ValueError, match="patch grid"):
        pca_images(features, inside[:2])


def test_similarity_maps_are_cosines():
    features = torch.randn(5, 7, 4)
    maps = similarity_maps(features, [(0, 6), (4, 2)])
    expected = torch.nn.functional.cosine_similarity(
        features, features[4, 2].expand(5, 7, 4), dim=-1
    )
    torch.testing.assert_close(maps[1], expected)
    assert maps.shape == (2, 5, 7) and maps[0, 0, 6] == pytest.approx(1)
    for query in [(5, 0), (0, 7), (-1, 0)]:
        with pytest.raises(IndexError, match="5x7"):
            similarity_maps(features, [query])


def test_pca_figure_shows_every_image(tmp_path):
    images = [torch.full((3, 32, 32), 0, dtype=torch.uint8) for _ in range(3)]
    for index, image in enumerate(images):
        image[index] = 255  # red, green, blue
    path = tmp_path / "figures" / "pca.png"
    save_pca_grid(path, images, {"one": _features(), "two": _features()}, columns=2)
    pixels = _pixels(path)
    for index in range(3):
        colour = np.zeros(3, int)
        colour[index] = 255
        assert (np.abs(pixels - colour).sum(2) == 0).mean() > 0.02
    assert [entry.name for entry in path.parent.iterdir()] == ["pca.png"]
    with pytest.raises(ValueError, match="3 images but 2"):
        save_pca_grid(path, images, _features(2))
    with pytest.raises(ValueError, match="square images"):
        save_pca_grid(path, images, torch.randn(3, 35, 10))


def test_similarity_figure(tmp_path):
    images = np.full((2, 32, 32, 3), 200, np.uint8)
    path = tmp_path / "similarity.png"
    save_similarity_figure(path, images, _features(2), [[(0, 0), (1, 2)], [(5, 5), (3, 3)]])
    pixels = _pixels(path)
    assert pixels.shape[1] > pixels.shape[0]  # three columns, two rows
    assert (pixels == [255, 48, 48]).all(2).any()  # the first query's frame
    with pytest.raises(ValueError, match="equally many queries"):
        save_similarity_figure(path, images, _features(2), [[(0, 0)], []])
    with pytest.raises(ValueError, match=r"\.png, \.pdf or \.svg"):
        save_similarity_figure(tmp_path / "a.jpg", images, _features(2), [[(0, 0)]] * 2)

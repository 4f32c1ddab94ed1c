"""Dense probe on features whose answer is known."""

import math

import pytest
import torch

from dinov3_mm.datasets.evaluation_images import ImageSet
from dinov3_mm.evaluation.dense_probe import (
    dense_linear_probe,
    fit_patch_classifier,
    stack_masks,
)
from tests.evaluation.toys import ColourSquares, UnlabelledSquares


def _scene(num: int, classes: int = 4, share: float | None = None) -> tuple:
    """Blocks of 4 pixels per patch; ``share`` makes class 0 that frequent."""
    labels = torch.randint(0, classes, (num, 4, 4))
    if share is not None:
        labels = torch.where(
            torch.rand(num, 4, 4) < share, 0, torch.randint(1, classes, (num, 4, 4))
        )
    masks = labels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    return labels, masks.to(torch.uint8)


@pytest.mark.parametrize("normalization", ["standardize", "l2"])
def test_linear_features_are_solved(normalization):
    mix = torch.randn(4, 16)
    (train_y, train_m), (test_y, test_m) = _scene(40), _scene(20)
    encode = lambda y: (torch.eye(4)[y.flatten(1)] @ mix) + 0.01 * torch.randn(len(y), 16, 16)  # noqa: E731
    result = dense_linear_probe(
        encode(train_y), train_m, encode(test_y), test_m, 4, normalization=normalization
    )
    assert result.patch_miou == result.patch_accuracy == 100.0
    assert 50 < result.pixel_miou < 100  # bilinear logits move the borders of 4-pixel blocks
    assert result.pixel_accuracy < 100


def test_noise_is_at_chance():
    (_, train_m), (_, test_m) = _scene(60), _scene(60)
    result = dense_linear_probe(torch.randn(60, 16, 8), train_m, torch.randn(60, 16, 8), test_m, 4)
    assert result.patch_accuracy == pytest.approx(25, abs=6)


def test_chance_is_the_constant_answer():
    (_, train_m), (test_y, test_m) = _scene(30, share=0.7), _scene(30, share=0.7)
    features = torch.randn(30, 16, 8)
    result = dense_linear_probe(features, train_m, features, test_m, 4)
    assert result.chance_miou == pytest.approx(100 * (test_y == 0).float().mean().item() / 4)


def test_balance_finds_rare_classes():
    torch.manual_seed(1)
    (train_y, train_m), (test_y, test_m) = _scene(80, share=0.9), _scene(40, share=0.9)
    encode = lambda y: 1.2 * torch.eye(4)[y.flatten(1)] + torch.randn(len(y), 16, 4)  # noqa: E731
    arguments = encode(train_y), train_m, encode(test_y), test_m, 4
    plain = dense_linear_probe(*arguments, balances=(0.0,))
    balanced = dense_linear_probe(*arguments)
    assert balanced.balance > 0 and balanced.patch_miou > plain.patch_miou + 3


def test_ignored_patches_and_pixels_do_not_count():
    mix = torch.randn(4, 16)
    (train_y, train_m), (test_y, test_m) = _scene(40), _scene(20)
    train, test = torch.eye(4)[train_y.flatten(1)] @ mix, torch.eye(4)[test_y.flatten(1)] @ mix
    for features, masks in ((train, train_m), (test, test_m)):
        features[:, :4] = torch.randn(len(features), 4, 16)  # first row of patches
        masks[:, :4] = 255
    result = dense_linear_probe(train, train_m, test, test_m, 4)
    assert result.patch_miou == 100.0
    class_iou = dense_linear_probe(train, train_m, test, test_m, 5).class_iou
    assert math.isnan(class_iou[4]) and not math.isnan(class_iou[3])


def test_constant_features_do_not_blow_up():
    labels, _ = _scene(10)
    features = torch.randn(10, 16, 6)
    features[..., 2] = 3.7
    classifier = fit_patch_classifier(features, labels.flatten(1), 4)
    moved = features.clone()
    moved[..., 2] += 1
    torch.testing.assert_close(classifier.logits(moved), classifier.logits(features))


def test_strength_is_chosen_on_training_images_only():
    """The same training set gives the same classifier, whatever is tested."""
    labels, _ = _scene(20)
    features = torch.randn(20, 16, 6)
    first, second = (fit_patch_classifier(features, labels.flatten(1), 4) for _ in range(2))
    assert first.ridge == second.ridge and torch.equal(first.weight, second.weight)


def test_masks_of_a_source():
    masks = stack_masks(ImageSet(ColourSquares(5), 32))
    assert masks.shape == (5, 32, 32) and masks.dtype == torch.uint8
    assert masks[3, 0, 0] == 4 and masks[3, 0, -1] == 0
    with pytest.raises(TypeError, match="semantic_mask"):
        stack_masks(ImageSet(UnlabelledSquares(2), 32))


def test_errors_name_what_was_given():
    labels, masks = _scene(5)
    features = torch.randn(5, 16, 6)
    with pytest.raises(ValueError, match="'standardize' or 'l2'"):
        fit_patch_classifier(features, labels.flatten(1), 4, normalization="none")
    with pytest.raises(ValueError, match="at least two images"):
        fit_patch_classifier(features[:1], labels[:1].flatten(1), 4)
    with pytest.raises(ValueError, match="agree in images"):
        fit_patch_classifier(features, labels[:4].flatten(1), 4)
    with pytest.raises(ValueError, match="square"):
        dense_linear_probe(features[:, :15], masks, features, masks, 4)
    with pytest.raises(ValueError, match="5 images of patches but 4 masks"):
        dense_linear_probe(features, masks, features, masks[:4], 4)
    unlabelled = torch.full((5, 16), 255)
    with pytest.raises(ValueError, match="no labelled patch"):
        fit_patch_classifier(features, unlabelled, 4)

"""DINO, iBOT, KoLeo and Gram losses: closed forms, brute force, and refusals."""

import math

import pytest
import torch

from dinov3_mm.models.losses import dino_loss, gram_loss, ibot_loss, koleo_loss, resize_tokens
from tests.golden import assert_parity


@pytest.mark.parametrize("crops", [(2, 3), (3, 2)])
@pytest.mark.parametrize("ignore", [True, False])
def test_dino_with_unequal_crop_counts_against_a_loop_over_pairs(crops, ignore):
    student = torch.randn(crops[0], 4, 9)
    teacher = torch.rand(crops[1], 4, 9)
    log_probs = torch.log_softmax(student.double() / 0.2, -1)
    pairs = [
        -(teacher[j].double() * log_probs[i]).sum(-1).mean()
        for i in range(crops[0])
        for j in range(crops[1])
        if not (ignore and i == j)
    ]
    loss = dino_loss(student, teacher, student_temp=0.2, ignore_diagonal=ignore)
    assert_parity(loss, torch.stack(pairs).mean().float())


def test_uniform_prediction_costs_the_logarithm_of_the_prototypes():
    uniform = torch.zeros(2, 3, 11)
    targets = torch.softmax(torch.randn(2, 3, 11), -1)
    assert dino_loss(uniform, targets).item() == pytest.approx(math.log(11), rel=1e-6)
    weights = torch.full((3,), 1 / 3)
    assert ibot_loss(uniform[0], targets[0], weights, 2).item() == pytest.approx(math.log(11) / 2)


def test_koleo_of_two_points():
    """Distance sqrt(2) between orthogonal directions, whatever their length."""
    loss = koleo_loss(torch.tensor([[3.0, 0.0], [0.0, 0.1]]))
    assert loss.item() == pytest.approx(-0.5 * math.log(2), abs=1e-6)


def test_koleo_computes_bfloat16_features_in_float32():
    features = torch.randn(6, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert_parity(koleo_loss(features), koleo_loss(features.float()))


def test_gram_ignores_what_leaves_similarities_unchanged():
    student = torch.randn(2, 5, 8)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q
    assert gram_loss(student, student @ rotation * 3).item() == pytest.approx(0, abs=1e-10)
    assert gram_loss(student, student * 3, normalized=False).item() > 1


def test_gram_gives_the_teacher_no_gradient():
    teacher = torch.randn(1, 4, 3, requires_grad=True)
    student = torch.randn(1, 4, 3, requires_grad=True)
    gram_loss(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().max() > 0


def test_resize_keeps_equal_grids_and_non_square_order():
    tokens = torch.arange(6.0).view(1, 6, 1)
    assert resize_tokens(tokens, (2, 3), (2, 3)) is tokens
    doubled = resize_tokens(tokens, (2, 3), (2, 6), method="bilinear").view(2, 6)
    assert doubled[0, 0] == 0 and doubled[0, -1] == 2 and doubled[1, 0] == 3


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: dino_loss(x, x[:, :1]), r"student \(S, B, K\).*\(2, 3, 4\) and \(2, 1, 4\)"),
        (lambda x: dino_loss(x[:1], x[:1], ignore_diagonal=True), "no pair left for 1 student"),
        (lambda x: ibot_loss(x[0], x[1], x[0, 0], 2), r"weights \(M,\), got .*\(4,\)"),
        (lambda x: koleo_loss(x[0, :1]), "more than topk=1 images.*got 1"),
        (lambda x: koleo_loss(x[0], topk=2), "needs distributed=True"),
        (lambda x: gram_loss(x, x[:1]), "equal shape"),
        (lambda x: gram_loss(x[0], x[0]), "img_level=True"),
        (lambda x: gram_loss(x, x, remove_neg=True, remove_only_teacher_neg=True), "not both"),
        (lambda x: resize_tokens(x, (2, 2), (1, 1)), r"\(2, 3, 4\) are not \(n, H\*W, D\)"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 3, 4))

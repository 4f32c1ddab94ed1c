"""Losses in chunks of prototypes against the losses on whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov3_mm.models.losses import dino_loss, ibot_loss, sinkhorn_knopp
from dinov3_mm.models.losses.prototypes import chunked_cross_entropy, sinkhorn_assignments

TEMP, STUDENT_TEMP = 0.05, 0.1


def _unit(*shape: int, seed: int) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(values, dim=-1)


def _prototypes(num: int, seed: int) -> Tensor:
    return 0.3 * torch.randn(num, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk_size", [1, 7, 50, 1000])
@pytest.mark.parametrize("num_iters", [1, 3])
def test_assignments_are_those_of_sinkhorn(chunk_size, num_iters):
    features, prototypes = _unit(12, 16, seed=0), _prototypes(50, 1)
    whole = sinkhorn_knopp(features @ prototypes.t(), TEMP, num_iters=num_iters)
    chunked = sinkhorn_assignments(
        features, prototypes, TEMP, num_iters=num_iters, chunk_size=chunk_size
    )
    torch.testing.assert_close(chunked.chunk(slice(0, 50)), whole, rtol=1e-5, atol=1e-7)


def test_extreme_logits_stay_finite():
    features, prototypes = _unit(6, 16, seed=0), 1e4 * _prototypes(20, 1)
    chunked = sinkhorn_assignments(features, prototypes, 0.01, chunk_size=8)
    assert torch.isfinite(chunked.chunk(slice(0, 20))).all()


def test_no_samples_on_this_rank():
    empty = sinkhorn_assignments(torch.zeros(0, 16), _prototypes(20, 1), TEMP)
    assert empty.chunk(slice(0, 20)).shape == (0, 20)


@pytest.mark.parametrize("ignore_diagonal", [False, True])
@pytest.mark.parametrize("num_student", [2, 5])
def test_dino_loss_and_gradients(ignore_diagonal, num_student):
    batch, num_teacher = 4, 2
    teacher, teacher_w = _unit(num_teacher * batch, 16, seed=2), _prototypes(50, 3)
    student, student_w = _unit(num_student, batch, 16, seed=4), _prototypes(50, 5)

    def plain(features, prototypes):
        probs = sinkhorn_knopp(teacher @ teacher_w.t(), TEMP).view(num_teacher, batch, -1)
        return dino_loss(
            features @ prototypes.t(),
            probs,
            student_temp=STUDENT_TEMP,
            ignore_diagonal=ignore_diagonal,
        )

    def chunked(features, prototypes):
        pairs = torch.ones(num_student, num_teacher)
        if ignore_diagonal:
            pairs.fill_diagonal_(0)
        weights = torch.full((batch,), 1.0 / (batch * pairs.sum().item()))
        targets = sinkhorn_assignments(teacher, teacher_w, TEMP, chunk_size=16)
        return chunked_cross_entropy(
            features, prototypes, targets, pairs, weights, STUDENT_TEMP, chunk_size=16
        )

    _assert_same(plain, chunked, student, student_w)


def test_ibot_loss_and_gradients():
    teacher, teacher_w = _unit(30, 16, seed=6), _prototypes(64, 7)
    student, student_w = _unit(30, 16, seed=8), _prototypes(64, 9)
    row_weights = torch.rand(30, generator=torch.Generator().manual_seed(10))

    def plain(features, prototypes):
        probs = sinkhorn_knopp(teacher @ teacher_w.t(), TEMP)
        return ibot_loss(
            features @ prototypes.t(), probs, row_weights, 4, student_temp=STUDENT_TEMP
        )

    def chunked(features, prototypes):
        targets = sinkhorn_assignments(teacher, teacher_w, TEMP, chunk_size=10)
        return chunked_cross_entropy(
            features[None],
            prototypes,
            targets,
            torch.ones(1, 1),
            row_weights / 4,
            STUDENT_TEMP,
            chunk_size=10,
        )

    _assert_same(plain, chunked, student, student_w)


def _assert_same(plain, chunked, features: Tensor, prototypes: Tensor) -> None:
    results = []
    for loss_function in (plain, chunked):
        inputs = [features.clone().requires_grad_(), prototypes.clone().requires_grad_()]
        loss = loss_function(*inputs)
        # Not 1, so that a lost factor of the incoming gradient shows.
        results.append((loss.detach(), *torch.autograd.grad(3 * loss, inputs)))
    for expected, actual in zip(*results):
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_autocast_rounds_like_the_plain_head():
    teacher, teacher_w = _unit(30, 16, seed=6), _prototypes(64, 7)
    student, student_w = _unit(1, 30, 16, seed=8), _prototypes(64, 9)
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(student, student_w)
    targets = sinkhorn_assignments(teacher, teacher_w, TEMP)
    probs = targets.chunk(slice(0, 64))
    expected = ibot_loss(logits[0], probs, torch.ones(30), 1, student_temp=STUDENT_TEMP)
    with torch.autocast("cpu", torch.bfloat16):
        actual = chunked_cross_entropy(
            student, student_w, targets, torch.ones(1, 1), torch.ones(30), STUDENT_TEMP
        )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_iterations_are_checked():
    with pytest.raises(ValueError, match="num_iters >= 1"):
        sinkhorn_assignments(_unit(2, 16, seed=0), _prototypes(4, 1), TEMP, num_iters=0)

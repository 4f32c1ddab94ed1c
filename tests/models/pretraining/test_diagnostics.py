"""Diagnostics against closed forms."""

import math

import pytest
import torch

from dinov3_mm.models.pretraining.diagnostics import (
    assignment_entropy,
    diagnose,
    feature_rank,
    feature_spread,
    patch_cls_cosine,
    prototype_usage,
)


def test_assignment_entropy():
    assert assignment_entropy(torch.eye(5)).item() == 0
    assert assignment_entropy(torch.full((3, 8), 1 / 8)).item() == pytest.approx(math.log(8))
    half = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    assert assignment_entropy(half).item() == pytest.approx(math.log(2) / 2)


def test_prototype_usage():
    assert prototype_usage(torch.arange(6), 100).item() == 1
    assert prototype_usage(torch.zeros(6, dtype=torch.int64), 100).item() == pytest.approx(1 / 6)
    assert prototype_usage(torch.tensor([0, 0, 1, 1, 2, 2]), 4).item() == 0.75


def test_feature_rank():
    assert feature_rank(torch.ones(10, 1) * torch.randn(1, 6)).item() == pytest.approx(1, abs=1e-4)
    orthonormal = torch.linalg.qr(torch.randn(10, 6)).Q
    assert feature_rank(3 * orthonormal).item() == pytest.approx(6, abs=1e-4)
    two = torch.diag(torch.tensor([3.0, 1.0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert feature_rank(two).item() == pytest.approx(math.exp(entropy), abs=1e-5)


def test_feature_spread():
    assert feature_spread(torch.randn(1, 8).expand(5, 8)).item() == pytest.approx(0, abs=1e-7)
    opposite = torch.tensor([[2.0, 0.0], [-0.1, 0.0]])  # axis 0: +-1, axis 1: constant
    assert feature_spread(opposite).item() == pytest.approx(0.5)
    even = feature_spread(torch.randn(20_000, 16)).item()
    assert even == pytest.approx(1 / 4, rel=0.01)


def test_patch_cls_cosine():
    cls = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    patches = torch.tensor([[[5.0, 0.0], [0.0, 1.0]], [[0.0, -1.0], [0.0, 1.0]]])
    assert patch_cls_cosine(cls, patches).item() == pytest.approx((1 + 0 - 1 + 1) / 4)


def test_collapsed_and_healthy_views_differ():
    names = ("teacher_entropy", "prototype_usage", "feature_rank", "cls_spread")
    healthy = diagnose(torch.randn(16, 32), torch.randn(16, 4, 32), torch.eye(16))
    constant = torch.ones(16, 32)
    uniform = torch.full((16, 16), 1 / 16)
    collapsed = diagnose(constant, constant[:, None].expand(-1, 4, -1), uniform)
    assert collapsed["diag/patch_cls_cosine"] > 0.999 > healthy["diag/patch_cls_cosine"].abs()
    assert collapsed["diag/teacher_entropy"] == pytest.approx(
        collapsed["diag/teacher_entropy_max"].item()
    )
    assert healthy["diag/teacher_entropy"] < collapsed["diag/teacher_entropy"]
    for name in names[1:]:
        assert healthy[f"diag/{name}"] > 2 * collapsed[f"diag/{name}"]

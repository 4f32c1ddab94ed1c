"""Sinkhorn-Knopp against an iteration in float64 logarithms, and its invariants."""

import pytest
import torch

from dinov3_mm.models.losses import sinkhorn_knopp
from tests.golden import assert_parity


def log_domain(logits, temp, num_iters=3):
    q = logits.double() / temp
    for _ in range(num_iters):
        q = q - q.logsumexp(0, keepdim=True)
        q = q - q.logsumexp(1, keepdim=True)
    return q.exp().float()


@pytest.mark.parametrize("scale, shift", [(1, 0), (0.05, 0), (4, 60), (4, -60)])
@pytest.mark.parametrize("shape", [(40, 7), (7, 40)])
def test_against_log_domain(scale, shift, shape):
    logits = scale * torch.randn(shape) + shift
    probs = sinkhorn_knopp(logits, 0.07)
    assert_parity(probs, log_domain(logits, 0.07), 1e-4 if shift else 1e-5)
    assert_parity(probs.sum(1), torch.ones(shape[0]))


def test_many_iterations_balance_the_prototypes():
    probs = sinkhorn_knopp(torch.randn(60, 12), 0.5, num_iters=100)
    assert_parity(probs.sum(0), torch.full((12,), 5.0))


def test_equal_samples_are_spread_evenly():
    probs = sinkhorn_knopp(torch.randn(1, 12).expand(6, 12), 0.04)
    assert_parity(probs, torch.full((6, 12), 1 / 12))


def test_extreme_logits():
    """In float32 exp() of these is 0 or infinite; the sums must not be."""
    probs = sinkhorn_knopp(3000 * torch.randn(30, 20), 0.1)
    assert_parity(probs.sum(1), torch.ones(30))


def test_nan_is_not_hidden():
    logits = torch.randn(4, 5)
    logits[1, 2] = float("nan")
    assert sinkhorn_knopp(logits, 0.1).isnan().any()


def test_bfloat16_logits_give_float32_without_gradient():
    logits = torch.randn(4, 6, requires_grad=True).bfloat16()
    probs = sinkhorn_knopp(logits, 0.1)
    assert probs.dtype == torch.float32 and not probs.requires_grad
    assert_parity(probs, log_domain(logits.detach().float(), 0.1))

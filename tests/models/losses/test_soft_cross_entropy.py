"""The fused cross-entropy against autograd in float64."""

import importlib

import pytest
import torch

from dinov3_mm.models.losses import soft_cross_entropy
from tests.golden import assert_parity

TEMP = 0.1


def expected_loss(logits, targets, weights):
    log_probs = torch.log_softmax(logits.double() / TEMP, dim=-1)
    return -(weights.double() * (targets.double() * log_probs).sum(-1)).sum()


def problem(entries: int, shared: bool, dtype: torch.dtype):
    logits = torch.randn(entries, 7, 50).to(dtype).requires_grad_()
    targets = 3 * torch.rand(1 if shared else entries, 7, 50)  # rows need not sum to 1
    return logits, targets, torch.rand(7)


@pytest.mark.parametrize("chunk", [1, 130, 1 << 20])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient(monkeypatch, chunk, shared, dtype):
    module = importlib.import_module(soft_cross_entropy.__module__)
    monkeypatch.setattr(module, "CPU_CHUNK", chunk)
    logits, targets, weights = problem(3, shared, dtype)
    loss = soft_cross_entropy(logits, targets, weights, TEMP)
    (2 * loss).backward()
    reference = logits.detach().double().requires_grad_()
    expected = expected_loss(reference, targets, weights)
    (2 * expected).backward()
    assert loss.dtype == torch.float32 and logits.grad.dtype == dtype
    assert_parity(loss, expected.float())
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8  # the gradient is rounded to bfloat16
    assert_parity(logits.grad.float(), reference.grad.float(), tolerance)


def test_huge_logits_stay_finite():
    logits = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    loss = soft_cross_entropy(logits, torch.tensor([[[0.0, 0.0, 1.0]]]), torch.ones(1), TEMP)
    loss.backward()
    assert loss.item() == pytest.approx(1e5)
    assert_parity(logits.grad, torch.tensor([[[10.0, 0.0, -10.0]]]))


def test_no_rows_give_zero_with_a_graph():
    logits = torch.zeros(1, 0, 5, requires_grad=True)
    loss = soft_cross_entropy(logits, torch.zeros(1, 0, 5), torch.zeros(0), TEMP)
    loss.backward()
    assert loss.item() == 0 and logits.grad.shape == (1, 0, 5)


def test_not_finite_gradient_reaches_the_logits():
    """A loss that is back-propagated from NaN marks the whole step."""
    logits, targets, weights = problem(2, True, torch.float32)
    soft_cross_entropy(logits, targets, weights, TEMP).backward(torch.tensor(float("nan")))
    assert logits.grad.isnan().all()

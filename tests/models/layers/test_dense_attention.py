"""16-bit attention with stored probabilities against torch's attention in double precision."""

import pytest
import torch
from torch.nn import functional as F

from dinov3_mm.models.layers.attention import MAX_TOKENS, dense_attention, prefers_dense_attention


def inputs(tokens=41, sharpness=1.0, dtype=torch.bfloat16):
    q, k, v, grad = (torch.randn(3, 2, tokens, 16) for _ in range(4))
    return [t.to(dtype).requires_grad_() for t in (q * sharpness, k, v)], grad.to(dtype)


def results(attend, qkv, grad):
    output = attend(*qkv)
    return output, *torch.autograd.grad(output, qkv, grad)


def relative_errors(actual, exact):
    return [((a.double() - e).norm() / e.norm()).item() for a, e in zip(actual, exact)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("sharpness", [1.0, 8.0])
def test_error_is_that_of_the_fused_attention(sharpness, autocast):
    qkv, grad = inputs(sharpness=sharpness)
    double = [t.detach().double().requires_grad_() for t in qkv]
    exact = results(F.scaled_dot_product_attention, double, grad.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        dense = relative_errors(results(dense_attention, qkv, grad), exact)
        fused = relative_errors(results(F.scaled_dot_product_attention, qkv, grad), exact)
    assert max(dense) < 8e-3
    for ours, torchs in zip(dense, fused):
        assert ours < 1.6 * torchs


def test_float32_gradients_are_exact():
    qkv, grad = inputs(dtype=torch.float32)
    exact = results(F.scaled_dot_product_attention, qkv, grad)
    for actual, expected in zip(results(dense_attention, qkv, grad), exact):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_is_chosen_for_short_16_bit_training_on_the_cpu_only():
    (query, *_), _ = inputs()
    assert prefers_dense_attention(query)
    assert not prefers_dense_attention(query.detach())
    assert not prefers_dense_attention(query.float())
    assert not prefers_dense_attention(inputs(tokens=MAX_TOKENS + 1)[0][0])
    with torch.no_grad():
        assert not prefers_dense_attention(query)

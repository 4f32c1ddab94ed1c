"""Compiled losses are the losses; what is compiled reads no number into its code."""

from functools import partial

import pytest
import torch

from dinov3_mm.models.losses import compile_losses, dino_loss, ibot_loss, sinkhorn_knopp


@pytest.fixture
def compiled():
    """Call a function as it is, then with its pieces compiled."""
    torch._dynamo.reset()

    def both(function):
        plain = function()
        compile_losses()
        try:
            return plain, function()
        finally:
            compile_losses(False)

    yield both
    compile_losses(False)


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype == torch.float32
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()


def count_compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_the_same_assignments_for_any_number_of_samples(compiled):
    """Steps differ in masked patches and temperature: they must not be compiled one by one."""
    counts = []
    for step, samples in enumerate((33, 20, 57)):
        logits = torch.randn(samples, 24).bfloat16()
        for temp in (0.04 + 0.01 * step, torch.tensor(0.07)):
            plain, fused = compiled(partial(sinkhorn_knopp, logits, temp))
            assert_equal(fused, plain)
        counts.append(count_compilations())
    assert counts[0] > 0 and counts[-1] == counts[0]
    assert compiled(partial(sinkhorn_knopp, logits[:0], 0.1))[1].shape == (0, 24)
    logits[2, 3] = torch.nan
    assert compiled(partial(sinkhorn_knopp, logits, 0.1))[1].isnan().any()


def test_the_same_losses_and_gradients(compiled):
    crops = torch.randn(3, 5, 24, requires_grad=True)
    patches = torch.randn(19, 24, requires_grad=True)
    cls_targets, patch_targets = torch.rand(2, 5, 24), torch.rand(19, 24)
    weights = torch.rand(19)

    def losses_and_gradients():
        losses = [
            dino_loss(crops, cls_targets),
            dino_loss(crops, cls_targets, ignore_diagonal=True),
            ibot_loss(patches, patch_targets, weights, 10),
        ]
        return [*losses, *torch.autograd.grad(sum(losses), (crops, patches))]

    plain, fused = compiled(losses_and_gradients)
    for expected, actual in zip(plain, fused, strict=True):
        assert_equal(actual, expected)

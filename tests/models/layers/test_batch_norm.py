"""Batch norms of students: against torch's and timm's own; converted networks."""

import copy

import pytest
import timm
import torch
from torch import nn

from dinov3_mm.models.layers.batch_norm import (
    FrozenBatchNorm2d,
    SyncedBatchNorm2d,
    convert_batch_norm,
)
from tests.golden import assert_parity


def images(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def network() -> nn.Module:
    """A timm ResNet whose norms are followed by activations and hold uncommon values."""
    torch.manual_seed(0)
    module = timm.create_model("resnet10t", num_classes=0)
    with torch.no_grad():
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.normal_()
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
    return module


def fused_network() -> nn.Module:
    """A timm EfficientNet: its norms hold their activation."""
    torch.manual_seed(0)
    return timm.create_model("efficientnet_lite0", num_classes=0)


@pytest.mark.parametrize("build", [network, fused_network])
def test_synced_is_torchs_in_training_and_eval(build):
    # In double precision: rounding grows through the layers, and both sides round.
    expected = build().double().train()
    actual = convert_batch_norm(copy.deepcopy(expected), "sync").train()
    assert actual.state_dict().keys() == expected.state_dict().keys()
    outputs = [module.forward_features(images().double()) for module in (actual, expected)]
    assert_parity(*outputs, 1e-10)
    for name, buffer in expected.named_buffers():
        assert_parity(actual.get_buffer(name), buffer, 1e-10)
    outputs[0].square().mean().backward()
    outputs[1].square().mean().backward()
    for name, param in expected.named_parameters():
        assert_parity(actual.get_parameter(name).grad, param.grad, 1e-10)
    with torch.no_grad():
        new = images(1).double()
        assert_parity(actual.eval()(new), expected.eval()(new), 1e-10)


def test_frozen_uses_running_statistics_always():
    expected = network().eval()
    actual = convert_batch_norm(copy.deepcopy(expected), "frozen").train()
    buffers = {name: buffer.clone() for name, buffer in actual.named_buffers()}
    output = actual(images())
    assert_parity(output, expected(images()))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in actual.named_buffers())
    output.sum().backward()
    assert all(param.grad is not None for param in actual.parameters())


def test_group_norms_do_not_see_other_images():
    module = convert_batch_norm(fused_network(), "group").train()
    assert not any(isinstance(child, nn.BatchNorm2d) for child in module.modules())
    torch.manual_seed(0)
    with torch.no_grad():
        alone = module.eval().forward_features(images()[:1])
        together = module.forward_features(images())[:1]
    assert_parity(alone, together)


def test_a_batch_that_is_not_finite_leaves_the_statistics():
    norm = SyncedBatchNorm2d(3).train()
    norm(torch.full((2, 3, 4, 4), torch.nan))
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert torch.equal(norm.running_var, torch.ones(3))


def test_bf16_inputs_have_float_statistics():
    norm = SyncedBatchNorm2d(3).train()
    x = images().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        output = norm(x)
    assert output.dtype == torch.bfloat16
    assert norm.running_mean.dtype == torch.float32
    assert_parity(norm.running_mean, 0.1 * x.float().mean((0, 2, 3)))


def test_unknown_mode():
    with pytest.raises(ValueError, match=r"one of \('sync', 'frozen', 'group'\), got 'batch'"):
        convert_batch_norm(nn.BatchNorm2d(3), "batch")
    assert isinstance(convert_batch_norm(nn.BatchNorm2d(3), "frozen"), FrozenBatchNorm2d)

"""Float8 linear layers against the reference vectors, and how backbones switch them on."""

import pytest
import torch

from dinov3_mm.models.backbones import DINOv3ViT
from dinov3_mm.models.layers.fp8 import enable_fp8, fp8_linear
from tests.golden import assert_rounded_alike, load_golden

ARCH = dict(embed_dims=64, num_layers=2, num_heads=2, layer_scale_init_value=1.0)


def test_forward_and_backward_are_those_of_the_reference():
    _, tensors = load_golden("ssl_fp8_linear")
    inputs = [tensors[name].clone().requires_grad_() for name in ("a", "weight", "bias")]
    out = fp8_linear(*inputs)
    assert_rounded_alike(out, tensors["out"])
    grads = torch.autograd.grad(out, inputs, tensors["grad_out"])
    for grad, name in zip(grads, ("a", "weight", "bias"), strict=True):
        expected = tensors[f"grad_{name}"]
        # One unit in the last place of bfloat16: sums are taken in another order.
        assert (grad - expected).abs().max() <= 2**-7 * expected.abs().max(), name
    assert_rounded_alike(grads[0], tensors["grad_a"])


def test_leading_dimensions_and_no_bias():
    x, weight = torch.randn(2, 3, 64), torch.randn(128, 64)
    out = fp8_linear(x, weight, None)
    assert out.shape == (2, 3, 128)
    assert out.dtype == torch.bfloat16
    exact = x @ weight.t()
    assert (out.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_rows_of_zeros():
    out = fp8_linear(torch.zeros(2, 64), torch.zeros(64, 64), torch.ones(64))
    assert torch.equal(out, torch.ones(2, 64, dtype=torch.bfloat16))


@torch.no_grad()
def test_a_backbone_computes_nearly_the_same_and_keeps_its_keys():
    torch.manual_seed(0)
    model = DINOv3ViT(arch=ARCH, patch_size=8).eval()
    model.init_weights()
    keys, images = list(model.state_dict()), torch.randn(2, 3, 32, 32)
    plain = model.forward_tokens(images).patches
    paths = enable_fp8(model)
    assert len(paths) == 2 * 4
    assert list(model.state_dict()) == keys
    with torch.autocast("cpu", torch.bfloat16):
        eighth = model.forward_tokens(images).patches
    difference = (eighth - plain).norm() / plain.norm()
    assert 0 < difference < 0.1


@torch.no_grad()
def test_the_bias_mask_of_k_stays_in_force():
    model = DINOv3ViT(arch=ARCH, patch_size=8)
    model.init_weights()
    qkv = model.blocks[0].attn.qkv
    qkv.bias.fill_(100.0)
    enable_fp8(model)
    q, k, v = qkv(torch.zeros(1, 64)).chunk(3, dim=-1)
    assert (q == 100).all()
    assert (k == 0).all()
    assert (v == 100).all()


@pytest.mark.parametrize(
    ("pattern", "arch", "message"),
    [
        ("stages", ARCH, "no linear layer of DINOv3ViT matches 'stages'"),
        ("blocks", {**ARCH, "embed_dims": 96, "num_heads": 3}, "multiples of 64"),
    ],
)
def test_what_cannot_be_is_refused(pattern, arch, message):
    model = DINOv3ViT(arch=arch, patch_size=8)
    with pytest.raises(ValueError, match=message):
        enable_fp8(model, pattern)

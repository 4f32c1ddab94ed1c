"""Norms, feed-forwards, patch embedding."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dinov3_mm.models.layers import PatchEmbed, build_ffn, build_norm, ffn_hidden_dims
from tests.golden import assert_parity


@pytest.mark.parametrize("name, eps", [("layernorm", 1e-6), ("layernormbf16", 1e-5)])
def test_layer_norm(name, eps):
    norm = build_norm(name, 16)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(5, 16) * 1e-3  # small enough that eps decides
    assert_parity(norm(x), F.layer_norm(x, (16,), norm.weight, norm.bias, eps))


def test_rms_norm():
    norm = build_norm("rmsnorm", 16)
    nn.init.normal_(norm.weight)
    x = torch.randn(5, 16) * 1e-3
    assert_parity(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-5))
    assert [name for name, _ in norm.named_parameters()] == ["weight"]


@pytest.mark.parametrize("name", ["layernorm", "rmsnorm"])
def test_norms_keep_the_compute_dtype(name):
    norm, x = build_norm(name, 16), torch.randn(5, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16
    assert_parity(y, norm(x.float()), 1e-2)


def test_unknown_norm():
    with pytest.raises(ValueError, match="'layernorm', 'layernormbf16', 'rmsnorm'"):
        build_norm("batchnorm", 8)


@pytest.mark.parametrize(
    "name, dims, ratio, expected",
    [
        ("mlp", 384, 4, 1536),
        ("mlp", 1152, 3.777777778, 4352),
        ("swiglufused", 1536, 4, 4096),
        ("swiglu", 384, 6, 1536),
        ("swiglu", 1024, 6, 4096),
        ("swiglu", 1280, 6, 5120),
        ("swiglu64", 4096, 3, 8192),
        ("swiglu", 384, 4, 1024),
        ("swiglu", 64, 3.3, 144),
        ("swiglu32", 64, 3.3, 160),
        ("swiglu64", 64, 3.3, 192),
        ("swiglu128", 64, 3.3, 256),
    ],
)
def test_hidden_width(name, dims, ratio, expected):
    assert ffn_hidden_dims(name, dims, ratio) == expected


def test_unknown_ffn():
    with pytest.raises(ValueError, match="'swiglu32'"):
        build_ffn("geglu", 8, 4)


def test_mlp():
    ffn, x = build_ffn("mlp", 8, 4), torch.randn(5, 8)
    assert_parity(ffn(x), nn.Sequential(ffn.fc1, nn.GELU(), ffn.fc2)(x))


@pytest.mark.parametrize("bias", [False, True])
def test_fused_swiglu_is_the_swiglu_of_its_halves(bias):
    fused, plain = (build_ffn(name, 8, 6, bias=bias) for name in ("swiglufused", "swiglu"))
    plain.w1.weight.data, plain.w2.weight.data = fused.w12.weight.data.chunk(2)
    plain.w3 = fused.w3
    if bias:
        plain.w1.bias.data, plain.w2.bias.data = fused.w12.bias.data.chunk(2)
    x = torch.randn(5, 8)
    assert_parity(fused(x), plain(x))
    assert [name for name, _ in fused.named_parameters()] == (
        ["w12.weight", "w12.bias", "w3.weight", "w3.bias"] if bias else ["w12.weight", "w3.weight"]
    )


@pytest.mark.parametrize("bias", [False, True])
def test_swiglu(bias):
    ffn, x = build_ffn("swiglu", 8, 6, bias=bias), torch.randn(5, 8)
    assert_parity(ffn(x), ffn.w3(nn.SiLU()(ffn.w1(x)) * ffn.w2(x)))
    assert [name for name, _ in ffn.named_parameters() if "bias" in name] == (
        ["w1.bias", "w2.bias", "w3.bias"] if bias else []
    )


@pytest.mark.parametrize("size", [(8, 12), (11, 9), (4, 4)])
def test_patch_embedding_is_the_convolution(size):
    embed = PatchEmbed(2, 6, 4)
    image = torch.randn(3, 2, *size)
    expected = F.conv2d(image, embed.proj.weight, embed.proj.bias, stride=4)
    assert embed.grid_size(image) == tuple(expected.shape[2:])
    assert_parity(embed([image]), expected.flatten(2).transpose(1, 2).flatten(0, 1))


def test_patch_embedding_packs_entries():
    embed = PatchEmbed(2, 6, 4)
    images = [torch.randn(3, 2, 8, 12), torch.randn(1, 2, 4, 8)]
    expected = torch.cat([embed([image]) for image in images])
    assert_parity(embed(images), expected)


def test_patch_embedding_range():
    embed = PatchEmbed(3, 16, 4)
    embed.init_weights()
    bound = 48**-0.5
    assert embed.proj.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    for parameter in embed.parameters():
        assert parameter.abs().max() <= bound
        assert parameter.min() < 0 < parameter.max()

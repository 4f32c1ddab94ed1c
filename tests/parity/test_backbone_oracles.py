"""DINOv3ViT against the implementations in transformers and timm, with equal periods."""

import pytest
import torch

from dinov3_mm.models.backbones import DINOv3ViT
from tests.golden import assert_parity
from tests.parity.backbone_oracles import redraw, to_timm, to_transformers

TOY = {"embed_dims": 64, "num_layers": 3, "num_heads": 2}


def _model(**changes) -> DINOv3ViT:
    return redraw(DINOv3ViT(arch={**TOY, **changes}))


TRANSFORMERS_OPTIONS = {
    "released": {},
    "plus": {"ffn_layer": "swiglu", "ffn_ratio": 6.0},
    "7b": {"ffn_layer": "swiglu64", "ffn_ratio": 3.0, "qkv_bias": False},
    "k_bias": {"mask_k_bias": False},
    "no_biases": {"ffn_bias": False, "proj_bias": False},
    "no_registers": {"num_registers": 0},
    "patch_8_gray": {"patch_size": 8, "in_channels": 1},
    "eps_1e-6": {"norm_layer": "layernorm"},
    "base_10": {"rope_base": 10.0},
    "head_dims_12": {"embed_dims": 48, "num_heads": 4},
}


@torch.no_grad()
@pytest.mark.parametrize("options", TRANSFORMERS_OPTIONS.values(), ids=TRANSFORMERS_OPTIONS)
@pytest.mark.parametrize("masked", [False, True])
def test_transformers(options, masked):
    model = _model(**options)
    channels, p = model.arch_settings["in_channels"], model.patch_size
    peer = to_transformers(model, num_channels=channels)
    image = torch.randn(2, channels, 3 * p, 5 * p)
    mask = torch.rand(2, 15) < 0.4 if masked else None
    expected = peer(image, bool_masked_pos=mask, output_hidden_states=True)
    output = model.forward_tokens(image, mask)
    normed = torch.cat((output.cls[:, None], output.registers, output.patches), dim=1)
    assert_parity(normed, expected.last_hidden_state)
    assert_parity(output.prenorm, expected.hidden_states[-1])


@torch.no_grad()
def test_transformers_hidden_states():
    model = _model()
    image = torch.randn(2, 3, 32, 80)
    expected = to_transformers(model)(image, output_hidden_states=True).hidden_states
    outputs = model.get_intermediate_layers(
        image, n=[0, 1, 2], norm=False, return_class_token=True, return_extra_tokens=True
    )
    for (patches, cls, registers), hidden in zip(outputs, expected[1:], strict=True):
        assert_parity(torch.cat((cls[:, None], registers, patches), dim=1), hidden)


def test_transformers_gradients():
    model = _model()
    peer = to_transformers(model)
    image = torch.randn(2, 3, 32, 48)
    output = model.forward_tokens(image)
    weight = torch.randn(2, 64)
    (output.cls * weight).sum().backward()
    (peer(image).last_hidden_state[:, 0] * weight).sum().backward()
    for index, block in enumerate(model.blocks):
        layer = peer.model.layer[index]
        q, k, v = (getattr(layer.attention, f"{x}_proj") for x in "qkv")
        grads = torch.cat([linear.weight.grad for linear in (q, k, v)])
        assert_parity(block.attn.qkv.weight.grad, grads)
        assert_parity(block.attn.qkv.bias.grad[:64], q.bias.grad)
        assert torch.equal(block.attn.qkv.bias.grad[64:128], torch.zeros(64))
        assert_parity(block.ls1.gamma.grad, layer.layer_scale1.lambda1.grad)
        assert_parity(block.mlp.fc1.weight.grad, layer.mlp.up_proj.weight.grad)
    assert_parity(model.cls_token.grad, peer.embeddings.cls_token.grad)
    assert_parity(model.patch_embed.proj.weight.grad, peer.embeddings.patch_embeddings.weight.grad)


_PLUS = {"ffn_layer": "swiglu", "ffn_ratio": 6.0}
_NO_BIAS = {"qkv_bias": False}
TIMM_MODELS = {
    "vit_tiny_patch16_dinov3_qkvb": {},
    "vit_small_patch16_dinov3": _NO_BIAS,
    "vit_small_patch16_dinov3_qkvb": {},
    "vit_small_plus_patch16_dinov3": {**_PLUS, **_NO_BIAS},
    "vit_small_plus_patch16_dinov3_qkvb": _PLUS,
    "vit_base_patch16_dinov3": _NO_BIAS,
    "vit_base_patch16_dinov3_qkvb": {},
    "vit_large_patch16_dinov3": _NO_BIAS,
    "vit_large_patch16_dinov3_qkvb": {},
    "vit_huge_plus_patch16_dinov3": {**_PLUS, **_NO_BIAS},
    "vit_huge_plus_patch16_dinov3_qkvb": _PLUS,
    "vit_7b_patch16_dinov3": {"ffn_layer": "swiglu64", "ffn_ratio": 3.0, **_NO_BIAS},
}


@torch.no_grad()
@pytest.mark.parametrize("name", TIMM_MODELS)
def test_timm(name):
    model = _model(**TIMM_MODELS[name])
    peer = to_timm(model, name)
    image = torch.randn(2, 3, 80, 48)
    output = model.forward_tokens(image)
    normed = torch.cat((output.cls[:, None], output.registers, output.patches), dim=1)
    assert_parity(normed, peer.forward_features(image))


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True])
def test_timm_feature_maps(norm):
    model = _model()
    peer = to_timm(model, "vit_small_patch16_dinov3_qkvb")
    image = torch.randn(2, 3, 48, 80)
    expected = peer.forward_intermediates(image, indices=[0, 2], norm=norm, intermediates_only=True)
    model.out_indices, model.final_norm = (0, 2), norm
    for ours, theirs in zip(model(image), expected, strict=True):
        assert_parity(ours, theirs)


@torch.no_grad()
def test_bf16_model_is_as_close_to_fp32_as_the_peer():
    model = _model()
    peer = to_transformers(model)
    image = torch.randn(4, 3, 64, 96)
    exact = model.forward_tokens(image).cls
    ours = model.to(torch.bfloat16).forward_tokens(image.bfloat16()).cls
    theirs = peer.to(torch.bfloat16)(image.bfloat16()).last_hidden_state[:, 0]
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()

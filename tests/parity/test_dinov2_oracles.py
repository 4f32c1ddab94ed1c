"""DINOv2ViT against transformers and timm, at the trained grid and at others."""

import pytest
import torch

from tests.dinov2_toys import IMAGE_SIZES, all_tokens, noise
from tests.golden import assert_parity
from tests.parity.dinov2_oracles import (
    GATED,
    SMALL,
    hf_model,
    saved_and_built,
    timm_model,
    timm_saved_and_built,
)

VARIANTS = {
    "plain": {},
    "registers": {"registers": 4},
    "gated": GATED,
    "gated_registers": {"registers": 4, **GATED},
    "no_qkv_bias": {"qkv_bias": False},
    "eps_1e-5": {"layer_norm_eps": 1e-5},
    "gray_ratio_3": {"num_channels": 1, "mlp_ratio": 3},
}


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_transformers(variant, tmp_path):
    model = hf_model(**VARIANTS[variant])
    backbone = saved_and_built(model, tmp_path)
    for size in IMAGE_SIZES:
        images = noise(*size)[:, : model.config.num_channels]
        expected = model(images, output_hidden_states=True)
        assert_parity(all_tokens(backbone, images), expected.last_hidden_state)
        assert_parity(backbone.forward_tokens(images).prenorm, expected.hidden_states[-1])


@torch.no_grad()
@pytest.mark.parametrize("variant", ["plain", "gated_registers"])
def test_transformers_hidden_states(variant, tmp_path):
    model = hf_model(**VARIANTS[variant])
    backbone = saved_and_built(model, tmp_path)
    hidden = model(noise(12, 40), output_hidden_states=True).hidden_states
    outputs = backbone.get_intermediate_layers(
        noise(12, 40), n=3, norm=False, return_class_token=True, return_extra_tokens=True
    )
    for (patches, cls, registers), expected in zip(outputs, hidden[1:], strict=True):
        assert_parity(torch.cat((cls[:, None], registers, patches), dim=1), expected)


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("size", [(16, 16), (12, 40)])
def test_transformers_masks(registers, size, tmp_path):
    model = hf_model(registers)
    backbone = saved_and_built(model, tmp_path)
    mask = torch.rand(2, size[0] * size[1] // 16) < 0.4
    expected = model(noise(*size), bool_masked_pos=mask).last_hidden_state
    assert_parity(all_tokens(backbone, noise(*size), mask), expected)


@pytest.mark.parametrize("registers", [0, 4])
def test_transformers_gradients(registers, tmp_path):
    model = hf_model(registers)
    backbone = saved_and_built(model, tmp_path)
    weight = torch.randn(2, 1 + registers + 30, 32)
    (all_tokens(backbone, noise(12, 40)) * weight).sum().backward()
    (model(noise(12, 40)).last_hidden_state * weight).sum().backward()
    embeddings = model.embeddings
    pairs = [
        (backbone.pos_embed, embeddings.position_embeddings),
        (backbone.cls_token, embeddings.cls_token),
        (backbone.patch_embed.proj.weight, embeddings.patch_embeddings.projection.weight),
        (backbone.norm.weight, model.layernorm.weight),
    ]
    if registers:
        pairs.append((backbone.register_tokens, embeddings.register_tokens))
    for ours, theirs in zip(backbone.blocks, model.encoder.layer, strict=True):
        pairs.append((ours.ls1.gamma, theirs.layer_scale1.lambda1))
        pairs.append((ours.mlp.fc1.weight, theirs.mlp.fc1.weight))
    for ours, theirs in pairs:
        assert_parity(ours.grad, theirs.grad)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
def test_transformers_small(registers, tmp_path):
    model = hf_model(registers, **SMALL, patch_size=14, image_size=518)
    backbone = saved_and_built(model, tmp_path)
    assert backbone.arch_settings["img_size"] == 518
    for size in ((518, 518), (224, 224), (322, 140), (546, 56)):
        expected = model(noise(*size, 1)).last_hidden_state
        assert_parity(all_tokens(backbone, noise(*size, 1)), expected)


@torch.no_grad()
@pytest.mark.parametrize("registers", ["", "reg4_"])
@pytest.mark.parametrize("size", ["small", "giant"])
def test_timm(size, registers, tmp_path):
    model = timm_model(f"vit_{size}_patch14_{registers}dinov2")
    backbone = timm_saved_and_built(model, tmp_path / "timm.pth")
    for image_size in IMAGE_SIZES:
        expected = model.forward_features(noise(*image_size))
        assert_parity(all_tokens(backbone, noise(*image_size)), expected)


@torch.no_grad()
def test_bf16_is_as_close_to_fp32_as_the_peer(tmp_path):
    model = hf_model(4)
    backbone = saved_and_built(model, tmp_path)
    images = noise(24, 40, 8)
    exact = backbone.forward_tokens(images).cls
    ours = backbone.to(torch.bfloat16).forward_tokens(images.bfloat16()).cls
    theirs = model.to(torch.bfloat16)(images.bfloat16()).last_hidden_state[:, 0]
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()

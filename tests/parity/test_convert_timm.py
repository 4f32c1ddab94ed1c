"""Files of ``timm`` models give the features of ``timm``, and the way back."""

import pytest
import torch
from safetensors.torch import save_file

from dinov3_mm.checkpoints import build_backbone, load_backbone_weights, load_weights, to_timm
from dinov3_mm.models.backbones import DINOv3ViT
from tests.checkpoints.toys import redraw, toy_backbone, toy_images
from tests.golden import assert_parity

timm = pytest.importorskip("timm")

# timm name, then the arch of the backbone that its weights belong to.
MODELS = {
    "vit_small_patch16_dinov3_qkvb": {"ffn_ratio": 4.0},
    "vit_small_patch16_dinov3": {"ffn_ratio": 4.0},
    "vit_small_plus_patch16_dinov3_qkvb": {"ffn_ratio": 6.0, "ffn_layer": "swiglu"},
    "vit_small_plus_patch16_dinov3": {"ffn_ratio": 6.0, "ffn_layer": "swiglu"},
}


def timm_model(name, width=32, **arguments):
    sizes = {
        "embed_dim": width,
        "depth": 2,
        "num_heads": 2,
        "patch_size": 8,
        "img_size": 40,
        "num_classes": 0,
    }
    return redraw(timm.create_model(name, **{**sizes, **arguments}))


@torch.no_grad()
def assert_same_features(backbone, model):
    images = toy_images(40)
    expected = model.forward_features(images)
    tokens = backbone.forward_tokens(images)
    actual = torch.cat((tokens.cls[:, None], tokens.registers, tokens.patches), dim=1)
    assert_parity(actual, expected)


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "wrapped.pth"])
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_file_gives_equal_features(name, suffix, tmp_path):
    model = timm_model(name)
    path = tmp_path / f"timm.{suffix}"
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if "wrapped" in suffix else state, path)
    arch = dict(embed_dims=32, num_layers=2, num_heads=2, **MODELS[name])
    backbone = DINOv3ViT(arch=arch, patch_size=8).eval()
    report = load_backbone_weights(backbone, path, periods="exact")
    assert_same_features(backbone, model)
    assert "mask token made up" in str(report)
    assert torch.equal(backbone.mask_token, torch.zeros(1, 32))


def test_64_channels_per_head_need_no_arch(tmp_path):
    model = timm_model("vit_small_patch16_dinov3_qkvb", width=128, num_classes=5)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    backbone = build_backbone(tmp_path / "model.pth", periods="exact")
    assert backbone.num_heads == 2
    assert_same_features(backbone, model)
    report = str(load_weights(tmp_path / "model.pth").report)
    assert "64 channels per head assumed" in report and "classifier head dropped" in report


def test_an_unknown_number_of_heads_is_an_error(tmp_path):
    torch.save(timm_model("vit_small_patch16_dinov3").state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="channels per head of 32-wide"):
        build_backbone(tmp_path / "model.pth")


def test_a_plain_file_fits_a_backbone_without_qkv_bias(tmp_path):
    model = timm_model("vit_small_patch16_dinov3")
    torch.save(model.state_dict(), tmp_path / "model.pth")
    arch = {"embed_dims": 32, "num_layers": 2, "num_heads": 2, "qkv_bias": False}
    backbone = DINOv3ViT(arch=arch, patch_size=8).eval()
    load_backbone_weights(backbone, tmp_path / "model.pth", periods="exact")
    assert_same_features(backbone, model)


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglu"])
def test_our_weights_load_into_timm(ffn_layer):
    backbone = toy_backbone(ffn_layer=ffn_layer, ffn_ratio=6.0, num_registers=4)
    state = to_timm(backbone.state_dict())
    if ffn_layer == "mlp":
        model = timm_model("vit_small_patch16_dinov3_qkvb", mlp_ratio=6.0)
    else:
        model = timm_model("vit_small_plus_patch16_dinov3_qkvb", mlp_ratio=4.0)
    model.load_state_dict(state, strict=True)
    assert_same_features(backbone, model)


def test_plain_timm_models_take_zero_biases_only():
    backbone = toy_backbone()
    with pytest.raises(ValueError, match="not zero"):
        to_timm(backbone.state_dict(), qkv_bias=False)
    for block in backbone.blocks:
        block.attn.qkv.bias_mask.zero_()
    state = to_timm(backbone.state_dict(), qkv_bias=False)
    assert not any("bias" in name and "attn.q" in name for name in state)
    with pytest.raises(ValueError, match="K bias"):
        to_timm(toy_backbone(mask_k_bias=False).state_dict())

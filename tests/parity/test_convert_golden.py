"""Reference pairs of foreign and official files, in both directions, through the public calls."""

import json

import pytest
import torch
from safetensors.torch import save_file

from dinov3_mm.checkpoints import (
    build_backbone,
    load_backbone_weights,
    load_weights,
    to_hf,
    to_timm,
)
from dinov3_mm.models.backbones import DINOv3ViT
from tests.golden import assert_parity, assert_rounded_alike, load_golden

HF = ("hf_vit_mlp", "hf_vit_gated_noqkvbias")
TIMM = ("timm_vit_mlp_qkvb", "timm_vit_swiglu_noqkvb")


def read_pair(name):
    description, tensors = load_golden(f"backbones_convert_{name}")
    parts = {
        side: {
            key.removeprefix(f"{side}."): tensor
            for key, tensor in tensors.items()
            if key.startswith(f"{side}.")
        }
        for side in ("src", "dst")
    }
    return description, parts["src"], parts["dst"], tensors


def official_backbone(description):
    """The backbone that the official constructor arguments of a golden file describe."""
    given = description["official_constructor"]
    return DINOv3ViT(
        arch={
            "embed_dims": given["embed_dim"],
            "num_layers": given["depth"],
            "num_heads": given["num_heads"],
            "ffn_ratio": given["ffn_ratio"],
            "ffn_layer": given["ffn_layer"],
            "qkv_bias": given["qkv_bias"],
            "num_registers": given["n_storage_tokens"],
            "norm_layer": given["norm_layer"],
        },
        patch_size=given["patch_size"],
    )


def write_source(folder, name, description, source):
    """The foreign file as a user has it: a Hugging Face folder, or a bare timm file."""
    save_file(source, folder / "model.safetensors")
    if name in HF:
        (folder / "config.json").write_text(json.dumps(description["hf_config"]))
        return folder
    return folder / "model.safetensors"


def assert_outputs(backbone, tensors, tolerance=1e-5):
    with torch.no_grad():
        tokens = backbone.eval().forward_tokens(tensors["in.x"])
    for prefix in ("out.", "out.foreign_"):
        for name, actual in (("cls", tokens.cls), ("patch", tokens.patches)):
            if prefix + name in tensors:
                assert_parity(actual, tensors[prefix + name], tolerance)
    assert_parity(tokens.registers, tensors["out.storage"], tolerance)


@pytest.mark.parametrize("name", HF + TIMM)
def test_foreign_file_becomes_the_official_one_bit_for_bit(name, tmp_path):
    description, source, official, tensors = read_pair(name)
    backbone = official_backbone(description)
    with torch.no_grad():
        backbone.eval()(tensors["in.x"])  # fills the cache of RoPE tables with other periods
    path = write_source(tmp_path, name, description, source)
    load_backbone_weights(backbone, path, periods="exact")
    state = backbone.state_dict()
    assert set(state) == set(official)
    for key, expected in official.items():
        assert torch.equal(state[key], expected.to(state[key].dtype)), key
    assert_outputs(backbone, tensors)


@pytest.mark.parametrize("name", HF)
def test_a_folder_alone_tells_the_architecture(name, tmp_path):
    description, source, _, tensors = read_pair(name)
    path = write_source(tmp_path, name, description, source)
    backbone = build_backbone(path, periods="exact")
    given = official_backbone(description).arch_settings
    inferred = {**backbone.arch_settings, "mask_k_bias": given["mask_k_bias"]}
    assert inferred == given
    assert_outputs(backbone, tensors)


@pytest.mark.parametrize("name", HF + TIMM)
def test_official_file_becomes_the_foreign_one_bit_for_bit(name):
    _, source, official, _ = read_pair(name)
    if name in HF:
        converted = to_hf(official)
    else:
        converted = to_timm(official, qkv_bias=name == "timm_vit_mlp_qkvb")
    assert set(converted) == set(source)
    for key, expected in source.items():
        assert torch.equal(converted[key], expected), key


def test_file_periods_are_the_bf16_rounded_ones_of_the_official_files(tmp_path):
    description, source, official, tensors = read_pair("hf_vit_mlp")
    path = write_source(tmp_path, "hf_vit_mlp", description, source)
    checkpoint = load_weights(path)
    expected = official["rope_embed.periods"].bfloat16().float()
    assert_rounded_alike(checkpoint.state_dict["rope_embed.periods"], expected)
    assert "periods made up (rounded to bf16)" in str(checkpoint.report)
    with pytest.raises(AssertionError, match="differs"):
        assert_outputs(build_backbone(path), tensors, tolerance=1e-5)


@pytest.mark.parametrize("name", ["vit_mlp", "vit_swiglu8_officiallike", "vit_7blike"])
def test_official_files_survive_a_round_trip_through_hugging_face(name, tmp_path):
    tensors = load_golden(f"backbones_{name}")[1]
    official = {k.removeprefix("sd."): t for k, t in tensors.items() if k.startswith("sd.")}
    save_file(to_hf(official), tmp_path / "model.safetensors")
    heads = official["cls_token"].shape[-1] // (4 * official["rope_embed.periods"].numel())
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": heads}))
    back = load_weights(tmp_path).state_dict
    lost = ("rope_embed.periods", "local_cls_norm.", "attn.qkv.bias", "attn.qkv.bias_mask")
    for key, expected in official.items():
        if not any(part in key for part in lost):
            assert torch.equal(back[key], expected), key
        elif key.endswith("qkv.bias"):
            assert torch.equal(back[key] * back[f"{key}_mask"], expected * official[f"{key}_mask"])

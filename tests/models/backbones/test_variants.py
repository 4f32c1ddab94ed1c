"""Names, dicts and explicit arguments of an architecture."""

import json

import pytest
import torch

from dinov3_mm.models.backbones import VIT_ARCHITECTURES, DINOv3ViT

TOY = {"embed_dims": 32, "num_layers": 2, "num_heads": 2}


@pytest.mark.parametrize("name", VIT_ARCHITECTURES)
def test_settings_rebuild_the_architecture(name):
    with torch.device("meta"):
        model = DINOv3ViT(arch=name)
        settings = json.loads(json.dumps(model.arch_settings))
        again = DINOv3ViT(arch=settings)
    assert again.arch_settings == model.arch_settings
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in again.state_dict().items()} == shapes


def test_settings_rebuild_unusual_architectures():
    model = DINOv3ViT(
        arch=TOY,
        patch_size=8,
        in_channels=1,
        num_registers=0,
        rope_min_period=2.0,
        rope_max_period=50.0,
        rope_dtype="bf16",
        layer_scale_init_value=0,
        norm_layer="rmsnorm",
    )
    again = DINOv3ViT(arch=model.arch_settings)
    again.load_state_dict(model.state_dict())
    assert again.arch_settings == model.arch_settings
    assert again.rope_embed.dtype == torch.bfloat16


def test_explicit_arguments_win_over_the_arch():
    arch = {**TOY, "num_registers": 2, "ffn_layer": "swiglu", "patch_size": 8}
    assert DINOv3ViT(arch=arch).num_registers == 2
    model = DINOv3ViT(arch=arch, num_registers=0, patch_size=16, qkv_bias=False)
    assert (model.num_registers, model.patch_size) == (0, 16)
    assert model.arch_settings["ffn_layer"] == "swiglu"
    assert model.blocks[0].attn.qkv.bias is None


def test_one_form_of_periods_withdraws_the_other():
    periods = {"rope_min_period": 2.0, "rope_max_period": 50.0}
    assert DINOv3ViT(arch=TOY, **periods).arch_settings["rope_base"] is None
    model = DINOv3ViT(arch={**TOY, **periods}, rope_base=10.0)
    assert model.arch_settings["rope_min_period"] is None
    assert torch.equal(
        model.rope_embed.periods, DINOv3ViT(arch=TOY, rope_base=10.0).rope_embed.periods
    )
    with pytest.raises(ValueError, match="either rope_base"):
        DINOv3ViT(arch=TOY, rope_base=10.0, **periods)


def test_resolving_leaves_the_table_alone():
    before = json.dumps(VIT_ARCHITECTURES)
    with torch.device("meta"):
        DINOv3ViT(arch="small", num_registers=0).arch_settings["embed_dims"] = 1
    assert json.dumps(VIT_ARCHITECTURES) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"arch": "smal"}, "did you mean 'small'"),
        ({"arch": {**TOY, "num_register": 3}}, "did you mean 'num_registers'"),
        ({"arch": {"embed_dims": 32}}, "lacks num_layers, num_heads"),
        ({"arch": {**TOY, "num_heads": 3}}, "not a multiple of"),
        ({"arch": {**TOY, "num_heads": 16}}, "multiple of 4"),
        ({"arch": TOY, "ffn_layer": "glu"}, "ffn_layer is 'glu'"),
        ({"arch": TOY, "norm_layer": "bn"}, "norm_layer is 'bn'"),
        ({"arch": TOY, "attn_backend": "fa3"}, "attn_backend is 'fa3'"),
        ({"arch": TOY, "drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"arch": TOY, "out_type": "tokens"}, "out_type is 'tokens'"),
        ({"arch": TOY, "out_indices": 2}, "out_indices is 2"),
        ({"arch": TOY, "out_indices": (1, 0)}, "ascending"),
        ({"arch": TOY, "out_indices": (1, -1)}, "distinct"),
        ({"arch": TOY, "out_indices": ()}, "out_indices"),
        ({"arch": TOY, "frozen_stages": 3}, "frozen_stages is 3"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        DINOv3ViT(**arguments)

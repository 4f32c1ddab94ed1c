"""Architectures read from tensors, for every released ViT and for odd ones."""

import json
from pathlib import Path

import pytest
import torch

from dinov3_mm.checkpoints.formats.architecture import infer_vit_arch
from dinov3_mm.models.backbones import VIT_ARCHITECTURES, ZOO, DINOv3ViT
from tests.checkpoints.toys import toy_backbone

MANIFEST = json.loads((Path(__file__).parents[1] / "data" / "manifest_backbones.json").read_text())[
    "variants"
]
VITS = sorted(name for name, variant in MANIFEST.items() if variant["kind"] == "vit")


def released_tensors(name):
    """Tensors of a released file without storage, but with its periods."""
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape, _ in MANIFEST[name]["keys"]}
    steps = state["rope_embed.periods"].numel()
    state["rope_embed.periods"] = 100.0 ** (torch.arange(steps) / steps).bfloat16()
    return state


@pytest.mark.parametrize("name", VITS)
def test_every_released_vit_is_recognised(name):
    state = released_tensors(name)
    arch = infer_vit_arch(state)
    assert arch == VIT_ARCHITECTURES[ZOO[name].arch]
    with torch.device("meta"):
        built = DINOv3ViT(arch=arch).state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in built.items()} == {
        key: tuple(shape) for key, shape, _ in MANIFEST[name]["keys"]
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_registers": 0, "layer_scale_init_value": 0.0},
        {"qkv_bias": False, "proj_bias": False, "ffn_bias": False},
        {"mask_k_bias": False, "in_channels": 1, "patch_size": 14},
        {"norm_layer": "rmsnorm", "untie_cls_and_patch_norms": True},
        {"ffn_layer": "swiglu64", "ffn_ratio": 3.3, "untie_global_and_local_cls_norm": True},
        {"ffn_ratio": 3.777777778},
        {"rope_base": 37.0},
        {"rope_min_period": 0.5, "rope_max_period": 90.0},
    ],
)
def test_an_inferred_architecture_rebuilds_the_model(changes):
    original = toy_backbone(**changes)
    arch = infer_vit_arch(original.state_dict())
    rebuilt = DINOv3ViT(arch=arch)
    expected = {name: tensor.shape for name, tensor in original.state_dict().items()}
    assert {name: tensor.shape for name, tensor in rebuilt.state_dict().items()} == expected
    rebuilt.init_weights()
    assert torch.allclose(rebuilt.rope_embed.periods, original.rope_embed.periods, rtol=1e-5)


def test_every_hidden_width_of_an_mlp_has_a_ratio():
    state = toy_backbone().state_dict()
    for width in (31, 48, 97, 288):
        for hidden in range(1, 16 * width, 11):
            state["blocks.0.mlp.fc1.weight"] = torch.empty(hidden, 32)
            state["cls_token"] = torch.empty(1, 1, 4 * width)
            arch = infer_vit_arch({**state, "rope_embed.periods": torch.ones(width)})
            assert int(4 * width * arch["ffn_ratio"]) == hidden


def test_missing_sizes_are_named():
    state = toy_backbone().state_dict()
    del state["patch_embed.proj.weight"]
    with pytest.raises(ValueError, match="no patch_size, in_channels"):
        infer_vit_arch(state)


def test_an_impossible_swiglu_width_is_an_error():
    state = toy_backbone(ffn_layer="swiglu").state_dict()
    state["blocks.0.mlp.w1.weight"] = torch.empty(45, 32)
    with pytest.raises(ValueError, match="no multiple of 8"):
        infer_vit_arch(state)

"""Folders written by ``transformers`` give the features of ``transformers``, and the way back."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinov3_mm.checkpoints import build_backbone, load_weights, to_hf
from tests.checkpoints.toys import redraw, toy_backbone, toy_images
from tests.golden import assert_parity

transformers = pytest.importorskip("transformers")

VARIANTS = {
    "mlp": {},
    "gated": {"use_gated_mlp": True, "hidden_act": "silu", "intermediate_size": 48},
    "no_bias": {"query_bias": False, "value_bias": False, "mlp_bias": False, "proj_bias": False},
    "key_bias": {"key_bias": True},
    "query_bias_only": {"value_bias": False},
    "eps_1e-6_base_50": {"layer_norm_eps": 1e-6, "rope_theta": 50.0},
    "no_registers": {"num_register_tokens": 0},
}


def hf_model(**changes):
    config = transformers.DINOv3ViTConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_register_tokens": 2,
            "patch_size": 8,
            **changes,
        }
    )
    return redraw(transformers.DINOv3ViTModel(config))


@torch.no_grad()
def assert_same_features(backbone, model):
    images = toy_images(40)
    expected = model(images, output_hidden_states=True)
    tokens = backbone.forward_tokens(images)
    actual = torch.cat((tokens.cls[:, None], tokens.registers, tokens.patches), dim=1)
    assert_parity(actual, expected.last_hidden_state)
    assert_parity(tokens.prenorm, expected.hidden_states[-1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_folder_gives_equal_features(variant, tmp_path):
    model = hf_model(**VARIANTS[variant])
    model.save_pretrained(tmp_path)
    backbone = build_backbone(tmp_path, periods="exact")
    assert_same_features(backbone, model)
    # Too small a difference for the features of ordinary images to show.
    eps = {"layernormbf16": 1e-5, "layernorm": 1e-6}[backbone.arch_settings["norm_layer"]]
    assert eps == model.config.layer_norm_eps
    assert backbone.arch_settings["rope_base"] == model.config.rope_theta


def test_shards_and_in_memory_names_are_read(tmp_path):
    model = hf_model()
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert_same_features(build_backbone(tmp_path / "sharded", periods="exact"), model)
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    assert_same_features(build_backbone(index, periods="exact"), model)

    model.config.save_pretrained(tmp_path / "memory")
    wrapped = {f"dinov3_vit.{name}": tensor for name, tensor in model.state_dict().items()}
    wrapped["classifier.weight"] = torch.zeros(2, 32)
    save_file(wrapped, tmp_path / "memory" / "model.safetensors")
    assert_same_features(build_backbone(tmp_path / "memory", periods="exact"), model)
    assert "ignored: classifier" in str(load_weights(tmp_path / "memory").report)


def test_default_periods_differ_and_the_report_says_so(tmp_path):
    model = hf_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(AssertionError, match="differs"):
        assert_same_features(build_backbone(tmp_path), model)
    assert "periods made up (rounded to bf16)" in str(load_weights(tmp_path).report)


@pytest.mark.parametrize("ffn_layer", ["mlp", "swiglu"])
@pytest.mark.parametrize("mask_k_bias", [True, False])
def test_our_weights_load_into_transformers(ffn_layer, mask_k_bias, tmp_path):
    backbone = toy_backbone(ffn_layer=ffn_layer, ffn_ratio=3.0, mask_k_bias=mask_k_bias)
    gated = ffn_layer == "swiglu"
    model = hf_model(
        intermediate_size=64 if gated else 96,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
        key_bias=not mask_k_bias,
    )
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    converted = to_hf(backbone.state_dict())
    assert {k: t.shape for k, t in converted.items()} == {k: t.shape for k, t in stored.items()}
    save_file(converted, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = transformers.DINOv3ViTModel.from_pretrained(tmp_path).eval()
    assert_same_features(backbone, loaded)


def test_what_transformers_cannot_express_is_refused():
    with pytest.raises(ValueError, match="separate norm for CLS"):
        to_hf(toy_backbone(untie_cls_and_patch_norms=True).state_dict())
    with pytest.raises(ValueError, match="RMSNorm"):
        to_hf(toy_backbone(norm_layer="rmsnorm").state_dict())


def test_an_eps_that_no_dinov3_has_is_refused(tmp_path):
    hf_model(layer_norm_eps=1e-3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layer_norm_eps is 0.001"):
        build_backbone(tmp_path)

"""ConvNeXt weights through every pair of layouts: bit for bit, and features of the libraries."""

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

from dinov3_mm.checkpoints import build_backbone, export_backbone, load_weights, to_hf, to_timm
from dinov3_mm.models.backbones import DINOv3ConvNeXt
from tests.checkpoints.toys import assert_same_tensors, redraw, tensors_of
from tests.golden import assert_parity
from tests.parity.test_convert_golden import read_pair

TOY = {"depths": [1, 2, 1, 1], "dims": [8, 12, 16, 24]}


def _stated(arch):
    return {"depths": arch["depths"], "hidden_sizes": arch["dims"]}


def _hf_model(arch):
    config = transformers.DINOv3ConvNextConfig(num_channels=arch["in_channels"], **_stated(arch))
    return transformers.DINOv3ConvNextModel(config)


def _timm_model(arch, **kwargs):
    sizes = {"depths": arch["depths"], "dims": arch["dims"], "in_chans": arch["in_channels"]}
    return timm.create_model("convnext_tiny.dinov3_lvd1689m", num_classes=0, **sizes, **kwargs)


def _write_hf(backbone, folder):
    """A folder as ``transformers`` writes it, from a model with our weights."""
    model = _hf_model(backbone.arch_settings)
    model.save_pretrained(folder)
    save_file(to_hf(backbone.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    model = transformers.DINOv3ConvNextModel.from_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def _write_timm(backbone, folder, **kwargs):
    model = _timm_model(backbone.arch_settings, **kwargs)
    model.load_state_dict(to_timm(backbone.state_dict(), **kwargs), strict=True)
    save_file(model.state_dict(), folder / "timm.safetensors")
    return folder / "timm.safetensors"


def _write_official(backbone, folder):
    torch.save(dict(backbone.state_dict()), folder / "weights.pth")
    return folder / "weights.pth"


def _write_ours(backbone, folder):
    return export_backbone(backbone, folder / "ours.safetensors")


WRITERS = {
    "official": _write_official,
    "hf": _write_hf,
    "timm": _write_timm,
    "timm_conv_mlp": lambda backbone, folder: _write_timm(backbone, folder, conv_mlp=True),
    "ours": _write_ours,
}


@pytest.mark.parametrize("second", WRITERS)
@pytest.mark.parametrize("first", WRITERS)
def test_every_pair_is_lossless(first, second, tmp_path):
    source = redraw(DINOv3ConvNeXt(arch=TOY, in_channels=2))
    expected = tensors_of(source)
    backbone = source
    for step, name in enumerate((first, second)):
        folder = tmp_path / str(step)
        folder.mkdir()
        backbone = build_backbone(WRITERS[name](backbone, folder))
        assert_same_tensors(backbone.state_dict(), expected)
        assert backbone.arch_settings == source.arch_settings


def _assert_features(backbone, foreign, size=(64, 75)):
    images = torch.randn(2, backbone.arch_settings["in_channels"], *size)
    with torch.no_grad():
        tokens, expected = backbone.forward_tokens(images), foreign(images)
    if hasattr(expected, "last_hidden_state"):
        assert_parity(tokens.cls, expected.last_hidden_state[:, 0])
        assert_parity(tokens.patches, expected.last_hidden_state[:, 1:])
    else:
        assert_parity(tokens.cls, expected)
        assert_parity(tokens.prenorm, foreign.forward_features(images).flatten(2).mT.detach())


@pytest.mark.parametrize("arch", [TOY, "tiny"], ids=["toy", "tiny"])
def test_files_of_the_libraries_give_their_features(arch, tmp_path):
    settings = DINOv3ConvNeXt(arch=arch).arch_settings
    hf = redraw(_hf_model(settings), 1)
    hf.save_pretrained(tmp_path)
    _assert_features(build_backbone(tmp_path), hf)
    save_file(
        {f"model.{k}": v for k, v in hf.state_dict().items()}, tmp_path / "wrapped.safetensors"
    )
    _assert_features(build_backbone(tmp_path / "wrapped.safetensors"), hf)
    model = redraw(_timm_model(settings), 2)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "timm.pth")
    _assert_features(build_backbone(tmp_path / "timm.pth"), model)


@pytest.mark.parametrize("arch", [TOY, "tiny"], ids=["toy", "tiny"])
def test_our_weights_give_our_features_in_the_libraries(arch, tmp_path):
    backbone = redraw(DINOv3ConvNeXt(arch=arch))
    hf = _hf_model(backbone.arch_settings).eval()
    memory = {
        k if k.startswith("layer_norm") or k in hf.state_dict() else f"model.{k}": v
        for k, v in to_hf(backbone.state_dict()).items()
    }
    hf.load_state_dict(memory, strict=True)
    _assert_features(backbone, hf)
    model = _timm_model(backbone.arch_settings).eval()
    model.load_state_dict(to_timm(backbone.state_dict()), strict=True)
    _assert_features(backbone, model)


def test_a_model_without_gamma_gets_factors_of_one(tmp_path):
    backbone = redraw(DINOv3ConvNeXt(arch=TOY, layer_scale_init_value=0))
    model = _timm_model(backbone.arch_settings).eval()
    model.load_state_dict(to_timm(backbone.state_dict()), strict=True)
    _assert_features(backbone, model)
    save_file(to_hf(backbone.state_dict()), tmp_path / "model.safetensors")
    _assert_features(build_backbone(tmp_path), model)


def test_a_classifier_of_timm_is_dropped(tmp_path):
    model = timm.create_model("convnext_tiny", num_classes=5, depths=(1,) * 4, dims=TOY["dims"])
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    assert "classifier head dropped" in str(load_weights(tmp_path / "timm.pth").report)


@pytest.mark.parametrize("name, convert", [("hf_convnext", to_hf), ("timm_convnext", to_timm)])
def test_reference_pairs(name, convert, tmp_path):
    _, source, official, tensors = read_pair(name)
    save_file(source, tmp_path / "foreign.safetensors")
    backbone = build_backbone(tmp_path / "foreign.safetensors")
    assert_same_tensors(backbone.state_dict(), official)
    assert_same_tensors(convert(official), source)
    with torch.no_grad():
        output = backbone.forward_tokens(tensors["in.x"])
    assert_parity(output.cls, tensors["out.cls"])
    assert_parity(output.patches, tensors["out.patch"])
    tokens = torch.cat((output.cls[:, None], output.patches), dim=1)
    foreign = {
        "out.foreign_last_hidden_state": tokens,
        "out.foreign_forward_features_NCHW": output.prenorm.mT.unflatten(2, (2, -1)),
        "out.foreign_pooled_normed": output.cls,
    }
    for key in [key for key in foreign if key in tensors]:
        assert_parity(foreign[key].reshape(tensors[key].shape), tensors[key])

"""``torch.hub.load`` gives the official calls with weights of any known format."""

import copy
import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hubconf
from dinov3_mm.checkpoints import build_backbone, to_timm
from dinov3_mm.checkpoints import locate as released
from dinov3_mm.models.backbones import VIT_ARCHITECTURES, ZOO
from tests.checkpoints.toys import assert_same_tensors, tensors_of, toy_backbone, toy_images

REPOSITORY = str(Path(__file__).parents[2])
OFFICIAL = [
    "dinov3_vits16",
    "dinov3_vits16plus",
    "dinov3_vitb16",
    "dinov3_vitl16",
    "dinov3_vitl16plus",
    "dinov3_vith16plus",
    "dinov3_vit7b16",
    "dinov3_convnext_tiny",
    "dinov3_convnext_small",
    "dinov3_convnext_base",
    "dinov3_convnext_large",
    "dinov3_vit7b16_lc",
    "dinov3_vit7b16_dd",
    "dinov3_vit7b16_de",
    "dinov3_vit7b16_ms",
    "dinov3_vitl16_chmv2",
]


@pytest.fixture(autouse=True)
def toy_zoo(monkeypatch, tmp_path):
    """ViT-L at toy size; torch hub's cache in a temporary folder."""
    full = toy_backbone(patch_size=16).arch_settings
    satellite = {**full, "untie_global_and_local_cls_norm": True}
    monkeypatch.setitem(VIT_ARCHITECTURES, "large", full)
    monkeypatch.setitem(VIT_ARCHITECTURES, "large_sat", satellite)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def load(name, **arguments):
    return torch.hub.load(REPOSITORY, name, source="local", **arguments)


def put_released(monkeypatch, folder, row_name, backbone):
    """Place a toy under the name of a released file, with the digits of its own hash."""
    row = ZOO[row_name]
    path = folder / "hub" / "checkpoints" / row.file
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(backbone.state_dict(), path)
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(released._DIGITS, row.file, digits)
    return path


def test_the_official_names_are_offered():
    names = [name for name, value in vars(hubconf).items() if callable(value) and name[0] != "_"]
    assert [name for name in names if name.startswith("dinov3")] == OFFICIAL
    assert "dinov2_vits14_reg" in names and not any("vitt16" in name for name in names)
    assert "SAT-493M" in hubconf.dinov3_vitl16.__doc__


@pytest.mark.parametrize("satellite", [False, True])
def test_a_file_is_loaded_behind_the_official_calls(satellite, tmp_path):
    source = toy_backbone(1, patch_size=16, untie_global_and_local_cls_norm=satellite)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = load("dinov3_vitl16", weights=str(tmp_path / "weights.pth"))
    assert not model.training
    assert_same_tensors(model.state_dict(), tensors_of(source))
    images = toy_images(48)
    with torch.no_grad():
        tokens = source.forward_tokens(images)
        assert torch.equal(model(images), tokens.cls)
        output = model(images, is_training=True)
        assert torch.equal(output["x_norm_patchtokens"], tokens.patches)
        assert torch.equal(output["x_storage_tokens"], tokens.registers)
        assert torch.equal(model.forward_features(images)["x_prenorm"], tokens.prenorm)
        masks = torch.zeros(2, 9, dtype=torch.bool)
        masks[:, 4] = True
        several = model([images, images[:, :, :32]], [masks, None], is_training=True)
        assert several[0]["masks"] is masks and several[1]["x_norm_patchtokens"].shape[1] == 6
        assert not torch.equal(several[0]["x_norm_clstoken"], tokens.cls)
        last, cls, registers = model.get_intermediate_layers(
            images, n=1, reshape=True, return_class_token=True, return_extra_tokens=True
        )[0]
    assert torch.equal(last.flatten(2).transpose(1, 2), tokens.patches)
    assert torch.equal(cls, tokens.cls) and torch.equal(registers, tokens.registers)
    with pytest.raises(TypeError, match="is_training=True"):
        model([images])


def test_the_official_attributes():
    model = load("dinov3_vitl16", pretrained=False)
    assert (model.embed_dim, model.num_features, model.n_blocks, model.num_heads) == (32, 32, 2, 2)
    assert (model.patch_size, model.n_storage_tokens) == (16, 2)
    assert model.rope_embed.rescale_coords == 2 and not model.training
    model = load("dinov3_convnext_tiny", pretrained=False)
    assert (model.embed_dim, model.n_blocks, model.n_storage_tokens) == (768, 4, 0)
    with torch.no_grad():
        assert model(toy_images(64)).shape == (2, 768)


def test_a_model_survives_copy_and_pickle():
    model = load("dinov3_vitl16", pretrained=False)
    images = toy_images(32)
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(images), model(images))


@pytest.mark.parametrize("weights", [None, "LVD1689M", "LVD-1689M", "lvd1689m"])
def test_the_data_name_finds_the_released_file_in_the_cache(weights, tmp_path, monkeypatch):
    source = toy_backbone(1, patch_size=16)
    put_released(monkeypatch, tmp_path, "dinov3_vitl16_lvd1689m", source)
    other = toy_backbone(2, patch_size=16, untie_global_and_local_cls_norm=True)
    put_released(monkeypatch, tmp_path, "dinov3_vitl16_sat493m", other)
    assert_same_tensors(load("dinov3_vitl16", weights=weights).state_dict(), tensors_of(source))
    satellite = load("dinov3_vitl16", weights="SAT493M")
    assert_same_tensors(satellite.state_dict(), tensors_of(other))


def test_a_cached_file_of_another_hash_is_refused(tmp_path, monkeypatch):
    path = put_released(monkeypatch, tmp_path, "dinov3_vitl16_lvd1689m", toy_backbone())
    torch.save(toy_backbone(2, patch_size=16).state_dict(), path)
    with pytest.raises(ValueError, match="not the released file of that name"):
        load("dinov3_vitl16")


def test_missing_gated_weights_say_where_to_get_and_put_them(tmp_path):
    message = (
        rf"8aa4cbdd\.pth are not at {tmp_path}.*gated \(DINOv3 License\).*facebook/dinov3-vitl16"
        r".*put it there, or pass its path"
    )
    with pytest.raises(FileNotFoundError, match=message):
        load("dinov3_vitl16")


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no weights of dinov3_vits16 .*known: 'LVD1689M'"):
        load("dinov3_vits16", weights="SAT493M")
    with pytest.raises(ValueError, match="pretrained=False takes no weights"):
        load("dinov3_vits16", pretrained=False, weights="LVD1689M")
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        load("dinov3_vits16", weights=str(tmp_path / "absent.pth"))
    with pytest.raises(TypeError, match="did you mean 'drop_path_rate'"):
        load("dinov3_vitl16", pretrained=False, drop_path_rates=0.1)


def test_weights_of_every_format_are_taken(tmp_path):
    source = toy_backbone(1, patch_size=16)
    save_file(to_timm(source.state_dict()), tmp_path / "timm.safetensors")
    model = load("dinov3_vitl16", weights=tmp_path / "timm.safetensors")
    expected = build_backbone("dinov3_vitl16", tmp_path / "timm.safetensors")
    assert_same_tensors(model.state_dict(), tensors_of(expected))

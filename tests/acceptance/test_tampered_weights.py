"""Tampered weights are refused with the reason, by every way in, and the backbone is untouched."""

import hashlib
import json
import os

import pytest
import torch
from mmengine.registry import MODELS
from safetensors.torch import save_file

from dinov3_mm.apis.hub import official_model
from dinov3_mm.checkpoints import (
    build_backbone,
    load_backbone_weights,
    to_hf,
    to_timm,
)
from dinov3_mm.checkpoints import (
    locate as released,
)
from dinov3_mm.models.backbones import VIT_ARCHITECTURES, ZOO, DINOv3ViT
from tests.checkpoints.toys import TOY_ARCH, assert_same_tensors, redraw, tensors_of, toy_backbone
from tools.convert_checkpoint import main as convert

NAME = "dinov3_vits16"
FORMATS = ("pth", "safetensors", "hf")


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(autouse=True)
def toy_zoo(monkeypatch):
    """The architecture 'small' at toy size, so that the official name can be built."""
    arch = toy_backbone(patch_size=16).arch_settings
    monkeypatch.setitem(VIT_ARCHITECTURES, "small", arch)
    return arch


@pytest.fixture
def tensors(toy_zoo):
    return tensors_of(toy_backbone(1, patch_size=16))


def write(folder, form, tensors):
    """Official tensors as a file or folder of a format."""
    if form == "pth":
        torch.save(tensors, folder / "weights.pth")
        return folder / "weights.pth"
    if form == "safetensors":
        save_file(tensors, folder / "weights.safetensors")
        return folder / "weights.safetensors"
    (folder / "hf").mkdir()
    save_file(tensors, folder / "hf" / "model.safetensors")
    config = {"num_attention_heads": 2, "rope_theta": 100.0, "layer_norm_eps": 1e-5}
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    return folder / "hf"


def weight_file(path):
    return path / "model.safetensors" if path.is_dir() else path


def refuse(path, reason, tmp_path, *, convertible=False):
    """Every way in must refuse ``path`` with ``reason`` and change nothing.

    Weights that are sound in themselves, of another architecture, may be converted.
    """
    with pytest.raises(ValueError, match=reason):
        build_backbone(NAME, path)
    with pytest.raises(ValueError, match=reason):
        official_model(NAME, weights=str(path))

    backbone = toy_backbone(2, patch_size=16)
    before = tensors_of(backbone)
    with pytest.raises(ValueError, match=reason):
        load_backbone_weights(backbone, path)
    assert_same_tensors(backbone.state_dict(), before)

    init_cfg = {"type": "DINOv3Pretrained", "checkpoint": str(path)}
    config = {"type": "DINOv3ViT", "arch": "small"}
    torch.manual_seed(5)
    fresh = MODELS.build(config)
    fresh.init_weights()
    torch.manual_seed(5)
    backbone = MODELS.build({**config, "init_cfg": init_cfg})
    with pytest.raises(ValueError, match=reason):
        backbone.init_weights()
    assert_same_tensors(backbone.state_dict(), tensors_of(fresh))

    if not convertible:
        for form, name in (("mm", "out.safetensors"), ("timm", "out"), ("official", "out.pth")):
            files = set(tmp_path.rglob("*"))
            with pytest.raises(ValueError, match=reason):
                convert([str(path), str(tmp_path / name), "--to", form])
            assert set(tmp_path.rglob("*")) == files


def in_format(form, tensors):
    return to_hf(tensors) if form == "hf" else tensors


@pytest.mark.parametrize("form", FORMATS)
def test_sound_files_pass(form, tensors, tmp_path):
    path = write(tmp_path, form, in_format(form, tensors))
    expected = build_backbone(NAME, path).state_dict()
    assert torch.equal(expected["norm.bias"], tensors["norm.bias"])
    convert([str(path), str(tmp_path / "out.safetensors"), "--to", "mm"])
    assert_same_tensors(build_backbone(tmp_path / "out.safetensors").state_dict(), expected)


@pytest.mark.parametrize("form", FORMATS)
def test_missing_key(form, tensors, tmp_path):
    content = in_format(form, tensors)
    del content["layer.1.norm2.weight" if form == "hf" else "blocks.1.norm2.weight"]
    refuse(write(tmp_path, form, content), r"missing \(1\): blocks\.1\.norm2\.weight", tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_extra_key(form, tensors, tmp_path):
    content = {**in_format(form, tensors), "pos_embed": torch.zeros(4)}
    refuse(write(tmp_path, form, content), r"unexpected \(1\): pos_embed", tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_wrong_shape(form, tensors, tmp_path):
    content = in_format(form, tensors)
    name = "layer.0.attention.o_proj.weight" if form == "hf" else "blocks.0.attn.proj.weight"
    content[name] = torch.zeros(32, 16)
    reason = r"blocks\.0\.attn\.proj\.weight \(32, 16\) instead of \(32, 32\)"
    refuse(write(tmp_path, form, content), reason, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", FORMATS)
def test_not_finite(form, value, tensors, tmp_path):
    content = in_format(form, tensors)
    content["norm.weight"][3] = value
    refuse(write(tmp_path, form, content), "NaN or infinite values in 1 of .*norm.weight", tmp_path)


@pytest.mark.parametrize("kept", [0.3, 0.99])
@pytest.mark.parametrize("form", FORMATS)
def test_truncated_file(form, kept, tensors, tmp_path):
    path = write(tmp_path, form, in_format(form, tensors))
    content = weight_file(path).read_bytes()
    weight_file(path).write_bytes(content[: int(kept * len(content))])
    refuse(path, "damaged", tmp_path)


@pytest.mark.parametrize("form", FORMATS)
def test_file_that_would_run_code(form, tensors, tmp_path):
    crater = tmp_path / "crater"
    path = write(tmp_path, form, in_format(form, tensors))
    torch.save({**tensors, "extra": Bomb(crater)}, weight_file(path))
    # A folder is read as safetensors, whatever its file holds.
    refuse(path, "damaged" if form == "hf" else "could run code", tmp_path)
    assert not crater.exists()
    torch.load(weight_file(path), weights_only=False)
    assert crater.exists(), "the bomb is a dud, so this test proves nothing"


@pytest.mark.parametrize("form", FORMATS)
def test_weights_of_another_architecture(form, tmp_path):
    other = redraw(toy_backbone(patch_size=16, ffn_layer="swiglu", num_registers=4))
    path = write(tmp_path, form, in_format(form, tensors_of(other)))
    reason = r"(?s)missing \(.*architecture: .*num_registers 4 in the file but 2 asked for"
    refuse(path, reason, tmp_path, convertible=True)


def test_timm_file_of_another_architecture(tmp_path):
    other = redraw(DINOv3ViT({**TOY_ARCH, "embed_dims": 64}, patch_size=16))
    save_file(to_timm(tensors_of(other)), tmp_path / "timm.safetensors")
    path = tmp_path / "timm.safetensors"
    refuse(path, "embed_dims 64 in the file but 32 asked for", tmp_path, convertible=True)


def test_released_name_with_other_content(tensors, tmp_path, monkeypatch):
    row = next(row for row in ZOO.values() if row.official_name == NAME)
    path = tmp_path / row.file
    torch.save(tensors, path)
    refuse(path, r"not the released file .*instead of 08c60483", tmp_path)
    digits = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    monkeypatch.setitem(released._DIGITS, row.file, digits)
    assert_same_tensors(build_backbone(NAME, path).state_dict(), tensors)

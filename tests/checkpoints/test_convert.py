"""The conversion tool: what it writes, what it says, what it refuses."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov3_mm import make_transform
from dinov3_mm.checkpoints import (
    build_backbone,
    export_backbone,
    read_metadata,
    read_statistics,
)
from dinov3_mm.checkpoints.convert import convert_checkpoint
from dinov3_mm.checkpoints.io import atomic_folder
from dinov3_mm.models.backbones import VIT_ARCHITECTURES
from tests.checkpoints.toys import tensors_of, toy_backbone
from tests.golden import max_difference
from tools.convert_checkpoint import main as convert

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


@pytest.fixture
def path(tmp_path):
    torch.save(toy_backbone(1, patch_size=16, num_registers=4).state_dict(), tmp_path / "toy.pth")
    return tmp_path / "toy.pth"


def test_the_report_names_every_tensor(path, tmp_path, capsys):
    convert([str(path), str(tmp_path / "timm"), "--to", "timm", "--statistics", "SAT-493M"])
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-7:])
    assert lines["mapped"] == "34 of 38 tensors"
    assert lines["dropped"] == (
        "1 rope_embed.periods (computed by the library); 2 blocks.*.attn.qkv.bias_mask (folded "
        "into the biases); 1 mask_token (serves in training only)"
    )
    assert lines["made"] == "up   nothing"
    assert lines["load"].startswith('it   timm.create_model("local-dir:')


def test_official_files_hold_rounded_periods_in_bf16_and_exact_ones_in_fp32(path, tmp_path):
    convert_checkpoint(path, tmp_path / "hf", to="hf")
    kept = []
    for periods, dtype in (("file", torch.bfloat16), ("exact", torch.float32)):
        out = tmp_path / f"{periods}.pth"
        convert_checkpoint(tmp_path / "hf", out, to="official", periods=periods)
        state = torch.load(out, weights_only=True)
        assert state["rope_embed.periods"].dtype == dtype
        assert list(state) == list(tensors_of(toy_backbone()))
        kept.append(state["rope_embed.periods"].float())
    assert torch.equal(kept[1].bfloat16().float(), kept[0]) and not torch.equal(*kept)
    # Every tensor is stored by itself, not with the fused one that it was cut from.
    assert out.stat().st_size < 1.5 * path.stat().st_size


def test_reset_bias_masks_and_dtype_reach_the_file(tmp_path):
    state = tensors_of(toy_backbone(1, patch_size=16))
    for name, tensor in state.items():
        if name.endswith("bias_mask"):
            tensor.zero_()
    torch.save(state, tmp_path / "zeros.pth")
    options = ["--to", "mm", "--reset-bias-mask", "--dtype", "bf16"]
    convert([str(tmp_path / "zeros.pth"), str(tmp_path / "out.safetensors"), *options])
    backbone = build_backbone(tmp_path / "out.safetensors")
    assert backbone.blocks[0].attn.qkv.bias_mask.view(3, -1).mean(1).tolist() == [1, 0, 1]
    expected = state["blocks.0.attn.proj.weight"].bfloat16().float()
    assert torch.equal(backbone.blocks[0].attn.proj.weight, expected)
    converted_from = read_metadata(tmp_path / "out.safetensors")["provenance"]["converted_from"]
    assert "bias masks reset to 1/0/1" in converted_from


def test_a_name_completes_satellite_weights(tmp_path, monkeypatch):
    satellite = toy_backbone(1, patch_size=16, untie_global_and_local_cls_norm=True)
    monkeypatch.setitem(VIT_ARCHITECTURES, "large_sat", satellite.arch_settings)
    torch.save(satellite.state_dict(), tmp_path / "sat493m.pth")
    report = convert_checkpoint(tmp_path / "sat493m.pth", tmp_path / "hf", to="hf")
    assert any("local_cls_norm.* (serves in training only)" in entry for entry in report.dropped)
    name = "dinov3_vitl16_sat493m"
    report = convert_checkpoint(
        tmp_path / "hf", tmp_path / "back_sat493m.pth", to="official", name=name
    )
    assert "local_cls_norm (copy of norm)" in report.made_up
    state = torch.load(tmp_path / "back_sat493m.pth", weights_only=True)
    assert set(state) == set(satellite.state_dict())


@pytest.mark.parametrize("target", ["hf", "timm", "mm"])
def test_statistics_are_read_back(target, path, tmp_path):
    out = tmp_path / ("out.safetensors" if target == "mm" else "out")
    convert_checkpoint(path, out, to=target, statistics="SAT-493M")
    assert read_statistics(out).name == "SAT-493M"


def test_transformers_preprocesses_with_them(path, tmp_path):
    transformers = pytest.importorskip("transformers")
    convert_checkpoint(path, tmp_path / "hf", to="hf", statistics="SAT-493M")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    theirs = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0]
    ours = make_transform("dinov3_vitl16_sat493m", 224)(pixels)
    assert max_difference(ours, theirs) < 1e-5


def test_the_written_configuration_is_complete(path, tmp_path):
    transformers = pytest.importorskip("transformers")
    convert_checkpoint(path, tmp_path / "hf", to="hf")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    known = transformers.DINOv3ViTConfig().to_dict()
    general = {"architectures", "model_type", "dtype"}
    assert set(written) - general <= set(known)
    defaults = transformers.PretrainedConfig().to_dict()
    own = set(known) - set(defaults) - {"_name_or_path"}
    backbone_class = {"apply_layernorm", "reshape_hidden_states", "stage_names"}
    assert own - set(written) <= backbone_class | {"out_features", "out_indices"}


@pytest.mark.parametrize(
    ("arguments", "target", "message"),
    [
        ({"untie_cls_and_patch_norms": True}, "hf", "no separate norm for CLS"),
        ({"mask_k_bias": False}, "timm", "effective K bias"),
        ({"norm_layer": "layernorm"}, "timm", "no norm_layer='layernorm'"),
        ({"rope_min_period": 1.0, "rope_max_period": 50.0}, "hf", "no place for RoPE periods|base"),
        ({"rope_normalize_coords": "max"}, "hf", "normalised per axis"),
    ],
)
def test_what_a_format_cannot_express_is_refused(arguments, target, message, tmp_path):
    backbone = toy_backbone(1, patch_size=16, num_registers=4, **arguments)
    export_backbone(backbone, tmp_path / "toy.safetensors")
    files = set(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "toy.safetensors", tmp_path / "out", to=target)
    assert set(tmp_path.iterdir()) == files


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("out.bin", {"to": "official"}, ValueError, "one .pth file"),
        ("out.pth", {"to": "hf"}, ValueError, "looks like a file"),
        ("out", {"to": "onnx"}, ValueError, "unknown format 'onnx'; expected one of official"),
        ("toy.pth", {"to": "official"}, FileExistsError, "exists already"),
        ("out", {"to": "hf", "name": "dinov3_vitx16"}, ValueError, "unknown backbone"),
        ("out", {"to": "hf", "dtype": "fp8"}, ValueError, "expected one of fp32"),
        ("out", {"to": "hf", "statistics": "IN1k"}, ValueError, "IN1k"),
        ("out", {"to": "hf", "periods": "bf16"}, ValueError, "expected one of"),
    ],
)
def test_wrong_options_are_named(name, options, error, message, path, tmp_path):
    with pytest.raises(error, match=message):
        convert_checkpoint(path, tmp_path / name, **options)


def test_the_command_fails_with_one_line(tmp_path, monkeypatch):
    arguments = [str(tmp_path / "absent.pth"), str(tmp_path / "out"), "--to", "hf"]
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    # A text as exit code is printed to stderr, and the status is 1.
    assert ended.value.code.startswith("convert_checkpoint: no weights at")
    assert not list(tmp_path.iterdir())


def test_a_folder_appears_complete_or_not_at_all(tmp_path):
    with atomic_folder(tmp_path / "made" / "folder") as partial:
        (partial / "a").write_text("a")
        assert not (tmp_path / "made" / "folder").exists()
    assert (tmp_path / "made" / "folder" / "a").read_text() == "a"
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "made" / "other") as partial:
        (partial / "a").write_text("a")
        raise RuntimeError
    assert [entry.name for entry in (tmp_path / "made").iterdir()] == ["folder"]
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "made"):
        pass

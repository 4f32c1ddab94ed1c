"""What we export comes back bit for bit, says what it is, and is never half written."""

import json

import pytest
import torch
from safetensors import safe_open
from torch import nn

from dinov3_mm.checkpoints import (
    build_backbone,
    export_backbone,
    load_weights,
    read_metadata,
    read_statistics,
)
from tests.checkpoints.toys import assert_same_tensors, tensors_of, toy_backbone, toy_images

WEB = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_dtype": "bf16", "norm_layer": "layernorm", "rope_normalize_coords": "max"},
        {"ffn_layer": "swiglu", "qkv_bias": False, "untie_global_and_local_cls_norm": True},
        {"rope_min_period": 0.5, "rope_max_period": 90.0, "untie_cls_and_patch_norms": True},
    ],
)
def test_a_backbone_is_rebuilt_with_equal_outputs(changes, tmp_path):
    backbone = toy_backbone(1, **changes)
    path = export_backbone(backbone, tmp_path / "exports" / "teacher.safetensors")
    rebuilt = build_backbone(path, out_type="raw", out_indices=(0, 1))
    assert rebuilt.arch_settings == backbone.arch_settings
    assert not rebuilt.training
    assert_same_tensors(rebuilt.state_dict(), tensors_of(backbone))
    images = toy_images()
    with torch.no_grad():
        expected = backbone.forward_tokens(images)
        actual = torch.cat((expected.cls[:, None], expected.registers, expected.patches), dim=1)
        assert torch.equal(rebuilt(images)[-1], actual)


def test_the_header_states_what_is_inside(tmp_path):
    backbone = toy_backbone(1)
    provenance = {"iteration": 40, "dataset": "synthetic"}
    metadata = {"statistics": WEB, "provenance": provenance}
    path = export_backbone(backbone, tmp_path / "teacher.safetensors", metadata)
    stated = read_metadata(path)
    assert stated == {
        "format_version": 1,
        "backbone": "DINOv3ViT",
        "arch": backbone.arch_settings,
        "patch_size": 8,
        "num_registers": 2,
        "statistics": {key: list(values) for key, values in WEB.items()},
        "provenance": provenance,
    }
    assert json.loads((tmp_path / "teacher.json").read_text()) == stated
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["dinov3_mm"]) == stated
        assert set(file.keys()) == set(backbone.state_dict())
    assert read_statistics(path).name == "LVD-1689M"
    assert "exported .safetensors" in str(load_weights(path).report)


def test_heads_travel_beside_the_backbone(tmp_path):
    backbone, head = toy_backbone(1), nn.Linear(4, 3)
    path = tmp_path / "teacher.safetensors"
    export_backbone(backbone, path, heads={"dino_head": head})
    checkpoint = load_weights(path, heads=True)
    assert_same_tensors(checkpoint.state_dict, tensors_of(backbone))
    assert_same_tensors(checkpoint.heads["dino_head"], tensors_of(head))
    assert build_backbone(path).arch_settings == backbone.arch_settings


def test_a_failed_export_keeps_the_old_file(tmp_path, monkeypatch):
    path = export_backbone(toy_backbone(1), tmp_path / "teacher.safetensors")
    before = path.read_bytes()

    def full_disk(tensors, partial, metadata):
        partial.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("dinov3_mm.checkpoints.export.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        export_backbone(toy_backbone(2), path)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "teacher.json",
        "teacher.safetensors",
    ]


def test_wrong_arguments_are_named(tmp_path):
    backbone = toy_backbone(1)
    with pytest.raises(ValueError, match=r"name the file \*\.safetensors"):
        export_backbone(backbone, tmp_path / "teacher.pth")
    path = tmp_path / "teacher.safetensors"
    with pytest.raises(ValueError, match=r"unknown metadata \['mean'\]"):
        export_backbone(backbone, path, {"mean": (0.5, 0.5, 0.5)})
    with pytest.raises(ValueError, match="3 image channels"):
        export_backbone(backbone, path, {"statistics": {"mean": [0.5], "std": [0.2]}})
    with pytest.raises(ValueError, match="unknown heads"):
        export_backbone(backbone, path, heads={"decode_head": nn.Linear(1, 1)})
    assert not path.exists()


def test_other_files_have_no_metadata(tmp_path):
    with pytest.raises(FileNotFoundError, match="no exported backbone"):
        read_metadata(tmp_path / "absent.safetensors")
    torch.save(toy_backbone(1).state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="no export of dinov3_mm"):
        read_metadata(tmp_path / "weights.pth")


def test_a_later_format_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("dinov3_mm.checkpoints.export.FORMAT_VERSION", 2)
    path = export_backbone(toy_backbone(1), tmp_path / "teacher.safetensors")
    with pytest.raises(ValueError, match=r"format version 2; .* reads up to 1"):
        build_backbone(path)

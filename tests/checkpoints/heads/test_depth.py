"""Depth heads: names and shapes of the release at full size, files in and out, wrong files."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from safetensors.torch import load_file

from dinov3_mm.checkpoints.heads import export_head, load_head
from tests.checkpoints.toys import redraw
from tests.golden import load_golden
from tests.hosts.lane import require_hosts

require_hosts()

from dinov3_mm.models.depth import DINOv3LinearDepthHead  # noqa: E402

ROOT = Path(__file__).parents[3]
# Names and shapes of the official files, by config.
OFFICIAL = json.loads((ROOT / "tests/data/manifest_depth_heads.json").read_text())
SIZES = {
    "dpt_vit7b16_synthmix": 230_720_548,
    "dpt_vitl16_nyu": 91_203_620,
    "chmv2_vitl16sat": 33_747_200,
    "linear_vit7b16_nyu": 1_065_217,
}


def linear_state(prefix: str = "") -> dict:
    _, golden = load_golden("heads_linear_depth")
    part = "sd.bn."
    return {
        prefix + name.removeprefix(part): tensor
        for name, tensor in golden.items()
        if name.startswith(part)
    }


@pytest.mark.parametrize("name", SIZES)
def test_names_and_shapes_of_the_official_heads(name):
    cfg = Config.fromfile(ROOT / f"configs/depth/{name}.py")
    head = {**cfg.model.decode_head, "init_cfg": None}
    with torch.device("meta"):
        state = MODELS.build(head).state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == OFFICIAL[name]
    assert sum(tensor.numel() for tensor in state.values()) == SIZES[name]


@pytest.mark.parametrize("prefix", ["", "decoder."])
def test_file_of_the_official_trainer(prefix, tmp_path):
    state = linear_state(prefix)
    if prefix:
        state["encoder.backbone.norm.weight"] = torch.ones(32)
    torch.save({"model": state, "iteration": 3}, tmp_path / "model_final.pth")
    head = DINOv3LinearDepthHead([32, 32], num_bins=16)
    load_head(head, tmp_path / "model_final.pth", kind="linear_depth")
    assert torch.equal(head.conv_depth.weight, linear_state()["conv_depth.weight"])


def test_export_and_back(tmp_path):
    cfg = Config.fromfile(ROOT / "configs/depth/chmv2_vitl16sat.py").model.decode_head
    small = dict(in_channels=[8] * 4, channels=8, post_process_channels=[4] * 4, num_bins=4)
    head, other = (MODELS.build({**cfg, **small, "init_cfg": None}) for _ in range(2))
    path = export_head(
        redraw(head.requires_grad_(False), 1), tmp_path / "h.safetensors", kind="dpt_depth"
    )
    assert load_file(path).keys() == OFFICIAL["chmv2_vitl16sat"].keys()
    load_head(other, path, kind="dpt_depth")
    assert all(
        torch.equal(a, b) for a, b in zip(head.state_dict().values(), other.state_dict().values())
    )


def test_head_of_another_width_is_refused(tmp_path):
    torch.save(linear_state(), tmp_path / "head.pth")
    head = DINOv3LinearDepthHead([32, 48], num_bins=16)
    with pytest.raises(ValueError, match=r"conv_depth\.weight \(16, 64, 1, 1\) instead of"):
        load_head(head, tmp_path / "head.pth", kind="linear_depth")


def test_released_head_in_a_config_is_loaded_on_initialisation(tmp_path):
    torch.save(linear_state(), tmp_path / "head.pth")
    init_cfg = dict(
        type="DINOv3HeadPretrained", kind="linear_depth", checkpoint=str(tmp_path / "head.pth")
    )
    head = MODELS.build(
        dict(type="DINOv3LinearDepthHead", in_channels=[32, 32], num_bins=16, init_cfg=init_cfg)
    )
    head.init_weights()
    assert torch.equal(head.conv_depth.bias, linear_state()["conv_depth.bias"])

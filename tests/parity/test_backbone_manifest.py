"""Keys, shapes and sizes of every released backbone, on the meta device."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dinov3_mm.models.backbones import CONVNEXT_ARCHITECTURES, VIT_ARCHITECTURES, ZOO, DINOv3ViT
from tests.parity import convnext_cases
from tests.parity.backbone_cases import build_from_recorded

MANIFEST = json.loads((Path(__file__).parents[1] / "data" / "manifest_backbones.json").read_text())[
    "variants"
]
VITS = {name: row for name, row in MANIFEST.items() if row["kind"] == "vit"}
CONVNEXTS = {name: row for name, row in MANIFEST.items() if row["kind"] == "convnext"}


def _build(arch: str, backbone: str = "DINOv3ViT") -> nn.Module:
    with torch.device("meta"):
        return MODELS.build(dict(type=backbone, arch=arch))


@pytest.mark.parametrize("kind, rows", [("DINOv3ViT", VITS), ("DINOv3ConvNeXt", CONVNEXTS)])
def test_zoo_lists_every_released_backbone(kind, rows):
    listed = [name for name, row in ZOO.items() if row.backbone == kind and row.file]
    assert listed == list(rows)


@pytest.mark.parametrize("name", MANIFEST)
def test_keys_shapes_and_counts(name):
    expected = MANIFEST[name]
    model = _build(ZOO[name].arch, ZOO[name].backbone)
    keys = [[k, list(v.shape), str(v.dtype).split(".")[1]] for k, v in model.state_dict().items()]
    assert keys == expected["keys"]
    assert sum(p.numel() for p in model.parameters()) == expected["n_params"]
    assert sum(b.numel() for b in model.buffers()) == expected["n_buffer_elems"]
    assert ZOO[name].num_params == expected["n_params"]


@pytest.mark.parametrize("name", MANIFEST)
def test_zoo_metadata(name):
    row, expected = ZOO[name], MANIFEST[name]
    assert row.official_name == expected["official_name"]
    assert row.file == expected["file"]
    assert row.data.replace("-", "") == expected["weights"]
    assert row.hf_id == expected["hf_hub_id"]
    assert row.timm_name == expected["timm_name"]
    assert row.released == expected["released"]
    assert list(row.mean) == expected["normalize"]["mean"]
    assert list(row.std) == expected["normalize"]["std"]
    assert f"-{row.sha256_prefix}.pth" in expected["file"]


@pytest.mark.parametrize("name", ZOO)
def test_operations_are_what_torch_counts(name):
    row = ZOO[name]
    with torch.device("meta"):
        model = MODELS.build(dict(type=row.backbone, arch=row.arch)).eval()
    with FlopCounterMode(display=False) as counter:
        model.forward_tokens(torch.empty(1, 3, 224, 224, device="meta"))
    assert row.num_params == sum(p.numel() for p in model.parameters())
    assert row.gmacs == round(counter.get_total_flops() / 2e9, 2)


@pytest.mark.parametrize("name", VITS)
def test_table_agrees_with_the_official_constructor(name):
    with torch.device("meta"):
        recorded = build_from_recorded(VITS[name]["kwargs"])
    assert recorded.arch_settings == VIT_ARCHITECTURES[ZOO[name].arch]


@pytest.mark.parametrize("name", CONVNEXTS)
def test_convnext_table_agrees_with_the_official_constructor(name):
    with torch.device("meta"):
        recorded = convnext_cases.build_from_recorded(CONVNEXTS[name]["kwargs"])
    assert recorded.arch_settings == CONVNEXT_ARCHITECTURES[ZOO[name].arch]
    for shared in CONVNEXTS[name]["shared_keys"]:
        state = recorded.state_dict(keep_vars=True)
        assert state[shared[0]] is state[shared[1]]


# Parameters with 4 registers and LayerScale, and with neither.
@pytest.mark.parametrize(
    "arch, full, plain",
    [
        ("vit_small", 21_601_152, 21_590_400),
        ("vit_base", 85_669_632, 85_648_128),
        ("vit_large", 303_154_176, 303_100_928),
        ("vit_so400m", 415_411_200, 415_344_384),
        ("vit_huge2", 630_754_560, 630_667_520),
        ("vit_giant2", 1_134_577_152, 1_134_448_128),
        ("vit_7b", 6_716_362_752, 6_716_018_688),
    ],
)
def test_training_configuration_names(arch, full, plain):
    with torch.device("meta"):
        without = DINOv3ViT(arch=arch, num_registers=0, layer_scale_init_value=0)
    assert sum(p.numel() for p in _build(arch).parameters()) == full
    assert sum(p.numel() for p in without.parameters()) == plain

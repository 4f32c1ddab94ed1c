"""The released detector's head: names, shapes, aliases, and files that do not fit."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from safetensors.torch import load_file

import dinov3_mm.hosts  # noqa: F401
from dinov3_mm.checkpoints.head_names import detector_to_ours, detector_to_released
from dinov3_mm.checkpoints.heads import export_head, load_head
from tests.checkpoints.toys import assert_same_tensors, redraw, tensors_of
from tests.hosts.lane import require_hosts
from tests.models.detection import toys

require_hosts()

KIND = "detector"
ROOT = Path(__file__).parents[3]
MANIFEST = json.loads((ROOT / "tests/data/manifest_detector.json").read_text())
ALIASES = "transformer.decoder."


@pytest.fixture
def head():
    return redraw(toys.detector().bbox_head)


def released(head, aliases=False):
    state = detector_to_released(tensors_of(head))
    if aliases:
        names = [n for n in state if n.startswith(("bbox_embed.", "class_embed."))]
        state |= {ALIASES + name: state[name].clone() for name in names}
        state["backbone.0._backbone.backbone.norm.weight"] = torch.ones(32)
    return state


def saved(state, tmp_path):
    torch.save({"model": state}, tmp_path / "head.pth")
    return tmp_path / "head.pth"


def test_sizes_of_the_release():
    """Every tensor of the released file has its place, and there is no other."""
    import dinov3_mm.models.detection  # noqa: F401

    config = Config.fromfile(ROOT / "configs/detection/plain-detr_vit7b16_coco.py")
    config = dict(config.model.bbox_head, init_cfg=None)
    with DefaultScope.overwrite_default_scope("mmdet"), torch.device("meta"):
        head = MODELS.build(config)
    shapes = {n: list(t.shape) for n, t in detector_to_released(head.state_dict()).items()}
    assert shapes == MANIFEST["shapes"]
    assert set(detector_to_ours(MANIFEST["shapes"])) == set(head.state_dict())
    assert sum(p.numel() for p in head.parameters()) == 129_070_745


def test_manifest_names_the_aliases():
    aliases = set(MANIFEST["aliases"])
    assert aliases == {
        ALIASES + n for n in MANIFEST["shapes"] if n.startswith(("bbox_embed", "class_embed"))
    }


@pytest.mark.parametrize("aliases", [False, True])
def test_released_file_loads_whole(aliases, head, tmp_path):
    path = saved(released(head, aliases), tmp_path)
    other = toys.detector().bbox_head
    load_head(other, path, kind=KIND)
    assert_same_tensors(other.state_dict(), head.state_dict())


def test_aliases_stand_in_for_tensors_that_are_missing(head, tmp_path):
    state = {
        n: t
        for n, t in released(head, aliases=True).items()
        if not n.startswith(("bbox_embed.", "class_embed."))
    }
    other = toys.detector().bbox_head
    load_head(other, saved(state, tmp_path), kind=KIND)
    assert_same_tensors(other.state_dict(), head.state_dict())


def test_aliases_that_differ_are_refused(head, tmp_path):
    state = released(head, aliases=True)
    state[ALIASES + "class_embed.0.bias"] += 1
    with pytest.raises(
        ValueError, match=r"1 tensors differ from their copies .*class_embed\.0\.bias"
    ):
        load_head(toys.detector().bbox_head, saved(state, tmp_path), kind=KIND)


def test_export_has_the_released_layout(head, tmp_path):
    state = load_file(export_head(head, tmp_path / "head.safetensors", kind=KIND))
    assert_same_tensors(state, released(head))
    assert not any("ffn" in name or "norms" in name for name in state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 7}, r"class_embed.0.weight \(5, 32\) instead of \(7, 32\)"),
        ({"num_queries": 30}, r"query_embed.weight \(30, 32\) instead of \(40, 32\)"),
        ({"num_decoder_layers": 3}, r"missing \("),
    ],
)
def test_heads_of_other_sizes_are_refused(change, message, head, tmp_path):
    other = toys.detector(change).bbox_head
    before = tensors_of(other)
    with pytest.raises(ValueError, match=message):
        load_head(other, saved(released(head), tmp_path), kind=KIND)
    assert_same_tensors(other.state_dict(), before)


def test_a_config_loads_it(head, tmp_path):
    path = saved(released(head), tmp_path)
    init_cfg = {"type": "DINOv3HeadPretrained", "kind": KIND, "checkpoint": str(path)}
    model = toys.detector({"init_cfg": init_cfg})
    assert_same_tensors(model.bbox_head.state_dict(), head.state_dict())

"""The released linear classifier: names, shapes, outputs, and files that do not fit."""

import pytest
import torch
from mmengine.registry import MODELS
from safetensors.torch import load_file

from dinov3_mm.checkpoints.head_names import (
    linear_classifier_to_ours,
    linear_classifier_to_released,
)
from dinov3_mm.checkpoints.heads import export_head, load_head
from tests.golden import assert_parity, load_golden
from tests.hosts.lane import require_hosts

require_hosts()

from dinov3_mm.models.classification import DINOv3LinearClsHead  # noqa: E402

KIND = "linear_classifier"
RELEASED = {"weight": (1000, 8192), "bias": (1000,)}


@pytest.fixture
def golden():
    return load_golden("heads_linear_classifier")[1]


@pytest.fixture
def head():
    return DINOv3LinearClsHead(num_classes=7, in_channels=64)


def released_state(golden, prefix=""):
    return {prefix + name: golden[f"sd.linear_head.{name}"] for name in ("weight", "bias")}


def saved(state, tmp_path):
    torch.save(state, tmp_path / "head.pth")
    return tmp_path / "head.pth"


@pytest.mark.parametrize("prefix", ["", "linear_head."])
def test_released_file_gives_the_released_logits(prefix, golden, head, tmp_path):
    state = released_state(golden, prefix)
    if prefix:
        state["backbone.norm.weight"] = torch.ones(32)
    load_head(head, saved(state, tmp_path), kind=KIND)
    with torch.no_grad():
        assert_parity(
            head((torch.cat((golden["out.cls"], golden["out.patch_mean"]), 1),)),
            golden["out.logits"],
        )


def test_sizes_of_the_release():
    with torch.device("meta"):
        head = DINOv3LinearClsHead(num_classes=1000, in_channels=8192)
    shapes = {name: tuple(t.shape) for name, t in head.state_dict().items()}
    assert linear_classifier_to_released(shapes) == RELEASED
    assert linear_classifier_to_ours(RELEASED) == shapes
    assert sum(parameter.numel() for parameter in head.parameters()) == 8_193_000


def test_export_has_the_released_layout(golden, head, tmp_path):
    load_head(head, saved(released_state(golden), tmp_path), kind=KIND)
    state = load_file(export_head(head, tmp_path / "head.safetensors", kind=KIND))
    assert state.keys() == RELEASED.keys()
    assert all(torch.equal(state[name], t) for name, t in released_state(golden).items())


@pytest.mark.parametrize(
    ("classes", "width", "message"),
    [
        (5, 64, r"fc\.weight \(7, 64\) instead of \(5, 64\)"),
        (7, 32, r"fc\.weight \(7, 64\) instead of \(7, 32\)"),
    ],
)
def test_heads_of_other_sizes_are_refused(classes, width, message, golden, tmp_path):
    head = DINOv3LinearClsHead(num_classes=classes, in_channels=width)
    before = head.fc.weight.clone()
    with pytest.raises(ValueError, match=message):
        load_head(head, saved(released_state(golden), tmp_path), kind=KIND)
    assert torch.equal(head.fc.weight, before)


def test_another_file_is_refused(head, tmp_path):
    with pytest.raises(ValueError, match=r"missing \(2\).*\n.*unexpected \(1\): cls_token"):
        load_head(head, saved({"cls_token": torch.zeros(1)}, tmp_path), kind=KIND)


def test_a_config_loads_it(golden, tmp_path):
    path = saved(released_state(golden), tmp_path)
    init_cfg = {"type": "DINOv3HeadPretrained", "kind": KIND, "checkpoint": str(path)}
    head = MODELS.build(
        dict(type="DINOv3LinearClsHead", num_classes=7, in_channels=64, init_cfg=init_cfg)
    )
    head.init_weights()
    assert torch.equal(head.fc.weight, golden["sd.linear_head.weight"])

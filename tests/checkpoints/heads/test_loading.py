"""Head files: sound ones load exactly, others are refused with the reason and change nothing."""

import hashlib
import os

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.registry import WEIGHT_INITIALIZERS
from safetensors.torch import save_file
from torch import nn

from dinov3_mm.checkpoints import head_names as segmentation
from dinov3_mm.checkpoints import heads as loading
from dinov3_mm.checkpoints.head_names import KINDS, HeadNames
from dinov3_mm.checkpoints.heads import export_head, load_head
from tests.checkpoints.toys import assert_same_tensors, redraw, tensors_of

KIND = "linear_segmentation"
PREFIX = "segmentation_model.1."
FORMATS = ("pth", "entry.pth", "safetensors")


class Head(BaseModule):
    """The parts of a linear segmentation head, without its host."""

    def __init__(self, width=6, num_classes=3, init_cfg=None):
        super().__init__(init_cfg)
        self.bn = nn.BatchNorm2d(width)
        self.conv_seg = nn.Conv2d(width, num_classes, 1)


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def official(width=6, num_classes=3):
    """Tensors of a file, redrawn."""
    module = nn.ModuleDict(
        {"batchnorm_layer": nn.BatchNorm2d(width), "conv": nn.Conv2d(width, num_classes, 1)}
    )
    redraw(module, seed=3)
    generator = torch.Generator().manual_seed(4)
    module["batchnorm_layer"].running_mean.uniform_(-1, 1, generator=generator)
    module["batchnorm_layer"].running_var.uniform_(0.5, 2, generator=generator)
    return {PREFIX + name: tensor.clone() for name, tensor in module.state_dict().items()}


def write(folder, form, tensors):
    path = folder / f"head.{form}"
    if form == "safetensors":
        save_file(tensors, path)
    else:
        torch.save({"model": tensors, "optimizer": {}} if form == "entry.pth" else tensors, path)
    return path


def refuse(path, reason, error=ValueError, kind=KIND):
    """Both ways in must refuse ``path`` with ``reason`` and leave the head as it was."""
    head = redraw(Head(), seed=9)
    before = tensors_of(head)
    with pytest.raises(error, match=reason):
        load_head(head, path, kind=kind)
    init_cfg = {"type": "DINOv3HeadPretrained", "kind": kind, "checkpoint": str(path)}
    with pytest.raises(error, match=reason):
        WEIGHT_INITIALIZERS.build(init_cfg)(head)
    assert_same_tensors(head.state_dict(), before)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("prefix", [PREFIX, ""])
def test_sound_files_load(form, prefix, tmp_path):
    tensors = official()
    stored = {prefix + name.removeprefix(PREFIX): value for name, value in tensors.items()}
    head = Head()
    load_head(head, write(tmp_path, form, stored), kind=KIND)
    assert torch.equal(head.bn.running_var, tensors[PREFIX + "batchnorm_layer.running_var"])
    assert torch.equal(head.conv_seg.weight, tensors[PREFIX + "conv.weight"])


def test_a_backbone_in_the_file_is_left_aside(tmp_path):
    tensors = {**official(), "segmentation_model.0.feature_model.norm.bias": torch.zeros(6)}
    load_head(Head(), write(tmp_path, "pth", tensors), kind=KIND)


def test_dtype_of_the_module_wins(tmp_path):
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in official().items()}
    head = Head()
    load_head(head, write(tmp_path, "pth", half), kind=KIND)
    assert head.conv_seg.weight.dtype == torch.float32
    assert torch.equal(head.conv_seg.weight, half[PREFIX + "conv.weight"].float())


def test_the_log_says_what_was_loaded(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(loading, "print_log", lambda line, **_: lines.append(line))
    path = write(tmp_path, "pth", official())
    load_head(Head(), path, kind=KIND)
    assert lines == [f"loaded 7/7 head tensors of kind '{KIND}' from {path}"]


def test_round_trip(tmp_path):
    head = Head()
    load_head(head, write(tmp_path, "pth", official()), kind=KIND)
    path = export_head(head, tmp_path / "exported.safetensors", kind=KIND)
    again = Head()
    load_head(again, path, kind=KIND)
    assert_same_tensors(again.state_dict(), tensors_of(head))
    assert_same_tensors(
        segmentation.linear_segmentation_to_released(again.state_dict()), official()
    )


@pytest.mark.parametrize("form", FORMATS)
def test_missing_key(form, tmp_path):
    tensors = official()
    del tensors[PREFIX + "batchnorm_layer.running_mean"]
    refuse(write(tmp_path, form, tensors), r"missing \(1\): bn\.running_mean")


@pytest.mark.parametrize("form", FORMATS)
def test_unexpected_key(form, tmp_path):
    tensors = {**official(), PREFIX + "conv2.bias": torch.zeros(3)}
    refuse(write(tmp_path, form, tensors), r"unexpected \(1\): conv2\.bias")


@pytest.mark.parametrize("form", FORMATS)
def test_wrong_shape(form, tmp_path):
    """A head for another backbone with other classes: all of it is named."""
    shapes = r"conv_seg\.weight \(5, 8, 1, 1\) instead of \(3, 6, 1, 1\)"
    reason = rf"(?s)num_classes.*wrong shape \(6\): .*{shapes}"
    refuse(write(tmp_path, form, official(8, 5)), reason)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("form", FORMATS)
def test_not_finite(form, value, tmp_path):
    tensors = official()
    tensors[PREFIX + "conv.bias"][1] = value
    refuse(write(tmp_path, form, tensors), r"NaN or infinite values in 1 of 7 .*conv_seg\.bias")


@pytest.mark.parametrize("kept", [0.3, 0.97])
@pytest.mark.parametrize("form", FORMATS)
def test_truncated_file(form, kept, tmp_path):
    path = write(tmp_path, form, official())
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    refuse(path, "damaged")


def test_file_that_would_run_code(tmp_path):
    crater = tmp_path / "crater"
    path = tmp_path / "head.pth"
    torch.save({**official(), "extra": Bomb(crater)}, path)
    refuse(path, "could run code")
    assert not crater.exists()
    torch.load(path, weights_only=False)
    assert crater.exists(), "the bomb is a dud, so this test proves nothing"


def test_released_name_with_other_content(tmp_path, monkeypatch):
    path = tmp_path / "seg_head-0123abcd.pth"
    torch.save(official(), path)
    names = HeadNames(segmentation.linear_segmentation_to_ours, released=(path.name,))
    monkeypatch.setitem(KINDS, KIND, names)
    refuse(path, "not the released file .* instead of 0123abcd")
    right = path.with_name(f"seg_head-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth")
    path.rename(right)
    names = HeadNames(segmentation.linear_segmentation_to_ours, released=(right.name,))
    monkeypatch.setitem(KINDS, KIND, names)
    load_head(Head(), right, kind=KIND)


def test_bare_names_are_found_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    write(tmp_path / "checkpoints", "pth", official())
    load_head(Head(), "head.pth", kind=KIND)
    refuse("no_head.pth", "no head at no_head.pth", FileNotFoundError)


def test_unknown_kind():
    with pytest.raises(ValueError, match="did you mean 'linear_segmentation'"):
        load_head(Head(), "head.pth", kind="linear_segmentaton")
    with pytest.raises(ValueError, match="did you mean 'linear_segmentation'"):
        WEIGHT_INITIALIZERS.build({"type": "DINOv3HeadPretrained", "kind": "linearsegmentation"})
    assert KIND in KINDS


def test_no_checkpoint():
    initializer = WEIGHT_INITIALIZERS.build({"type": "DINOv3HeadPretrained", "kind": KIND})
    with pytest.raises(ValueError, match="--head FILE"):
        initializer(Head())


def test_meta_device(tmp_path):
    with torch.device("meta"):
        head = Head()
    with pytest.raises(ValueError, match="meta device"):
        load_head(head, write(tmp_path, "pth", official()), kind=KIND)


def test_children_do_not_overwrite_the_head(tmp_path):
    """MMEngine initialises children after their parent's init_cfg."""

    class Stubborn(nn.Conv2d):
        def init_weights(self):
            nn.init.zeros_(self.weight)

    path = write(tmp_path, "pth", official())
    init_cfg = {"type": "DINOv3HeadPretrained", "kind": KIND, "checkpoint": str(path)}
    head = Head(init_cfg=init_cfg)
    head.conv_seg = Stubborn(6, 3, 1)
    model = nn.ModuleList([head])
    assert isinstance(head, BaseModule)
    model[0].init_weights()
    assert torch.equal(head.conv_seg.weight, official()[PREFIX + "conv.weight"])

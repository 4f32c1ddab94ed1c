"""The linear head against recorded outputs of the official one, and what users get wrong."""

import pytest
import torch
from mmengine.registry import MODELS

from tests.golden import assert_parity, load_golden
from tests.hosts.lane import require_hosts

require_hosts()
from dinov3_mm.checkpoints import load_head  # noqa: E402
from dinov3_mm.models.segmentation import DINOv3LinearSegHead  # noqa: E402


def golden_head(name, folder):
    """The head of a golden, its weights loaded from a file in the official layout."""
    description, tensors = load_golden(name)
    kwargs = description["kwargs"]
    head = DINOv3LinearSegHead(
        kwargs["in_channels"],
        kwargs["n_output_channels"],
        use_batchnorm=kwargs["use_batchnorm"],
        use_cls_token=kwargs["use_cls_token"],
        dropout_ratio=kwargs["dropout"],
    )
    state = {
        "segmentation_model.1." + name.removeprefix("sd."): tensor
        for name, tensor in tensors.items()
        if name.startswith("sd.")
    }
    torch.save({"model": state}, folder / "model_final.pth")
    load_head(head, folder / "model_final.pth", kind="linear_segmentation")
    return head.eval(), tensors


@torch.no_grad()
def test_three_levels(tmp_path):
    head, tensors = golden_head("heads_linear_seg", tmp_path)
    features = [tensors[f"in.f.{i}"] for i in range(3)]
    logits = head(features)
    print(f"logits: {assert_parity(logits, tensors['out.forward']):.1e}")
    predicted = head.predict(features, [{"img_shape": torch.Size((50, 70))}], {})
    print(f"predict: {assert_parity(predicted[..., ::7, ::7], tensors['out.predict']):.1e}")


@torch.no_grad()
def test_cls_beside_the_patches(tmp_path):
    head, tensors = golden_head("heads_linear_seg_cls", tmp_path)
    features = [(tensors[f"in.f.{i}.0"], tensors[f"in.f.{i}.1"]) for i in range(2)]
    print(f"logits: {assert_parity(head(features), tensors['out.forward']):.1e}")
    swapped = [(tensors[f"in.f.{i}.0"], tensors[f"in.f.{1 - i}.1"]) for i in range(2)]
    assert (head(swapped) - tensors["out.forward"]).abs().max() > 0.1


def test_dropout_of_whole_channels_comes_before_the_normalisation():
    head = DINOv3LinearSegHead(64, 64, dropout_ratio=0.5).train()
    torch.nn.init.dirac_(head.conv_seg.weight)
    torch.nn.init.zeros_(head.conv_seg.bias)
    torch.manual_seed(0)
    features = 1 + torch.rand(8, 64, 4, 4)
    out = head([features]).detach()
    # Dropped channels are zero before the normalisation: constant and below the others behind it.
    constant = out.flatten(2).std(-1) < 1e-6
    assert 0.35 < constant.float().mean() < 0.65
    assert out.transpose(0, 1).flatten(1).mean(1).abs().max() < 1e-5
    assert (out.mean((2, 3))[constant] < 0).all()


def test_the_classifier_starts_small():
    torch.manual_seed(0)
    head = MODELS.build({"type": "DINOv3LinearSegHead", "in_channels": 256, "num_classes": 150})
    head.init_weights()
    assert head.conv_seg.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert head.conv_seg.bias.abs().max() == 0


def test_keys_and_shapes_of_the_official_head():
    """Recorded keys of the head of a ViT-7B for 150 classes."""
    width, classes = 4096, 150
    with torch.device("meta"):
        head = DINOv3LinearSegHead(width, classes)
    from dinov3_mm.checkpoints.head_names import linear_segmentation_to_released

    released = linear_segmentation_to_released(head.state_dict())
    prefix = "segmentation_model.1."
    norm = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (width,))
    expected = {f"{prefix}batchnorm_layer.{name}": shape for name, shape in norm.items()}
    expected[f"{prefix}batchnorm_layer.num_batches_tracked"] = ()
    expected[f"{prefix}conv.weight"] = (classes, width, 1, 1)
    expected[f"{prefix}conv.bias"] = (classes,)
    assert {name: tuple(tensor.shape) for name, tensor in released.items()} == expected
    assert sum(tensor.numel() for tensor in released.values()) == 630935


def test_refusals():
    with pytest.raises(ValueError, match="names 2 layers and in_index 3"):
        DINOv3LinearSegHead([8, 8], 5, in_index=3)
    head = DINOv3LinearSegHead(8, 5)
    with pytest.raises(ValueError, match="width 8, the backbone and neck give 16"):
        head([torch.zeros(1, 16, 2, 2)])
    with pytest.raises(ValueError, match="out_type='featmap'"):
        head([(torch.zeros(1, 8, 2, 2), torch.zeros(1, 8))])
    with pytest.raises(ValueError, match=r"out_type='featmap\+cls'"):
        DINOv3LinearSegHead(8, 5, use_cls_token=True)([torch.zeros(1, 8, 2, 2)])

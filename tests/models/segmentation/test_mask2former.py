"""Mask2Former on mmdet's modules: released vectors and manifest, windows, labels, errors.

``heads_mask2former`` holds parts of the reference vectors; its JSON file says which. With
``DINOV3_MM_GOLDEN`` naming the folder of the complete vectors they are compared as well.
"""

import json
import os
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from dinov3_mm.checkpoints.head_names import head_names
from dinov3_mm.checkpoints.heads import export_head, load_head
from tests.checkpoints.toys import redraw
from tests.golden import assert_parity, load_golden
from tests.hosts.lane import require_hosts

require_hosts()

from mmseg.structures import SegDataSample  # noqa: E402

from dinov3_mm.models.segmentation.linear import DINOv3PaddedEncoderDecoder  # noqa: E402
from dinov3_mm.models.segmentation.mask2former import DINOv3Mask2FormerHead, semantic_map  # noqa: E402

ROOT = Path(__file__).parents[3]
COMPLETE = os.environ.get("DINOV3_MM_GOLDEN")
needs_complete = pytest.mark.skipif(
    COMPLETE is None, reason="needs the complete vectors; DINOV3_MM_GOLDEN names their folder"
)
SMALL = {
    "feat_channels": 64,
    "num_heads": 4,
    "num_queries": 9,
    "encoder_ffn_channels": 48,
    "decoder_ffn_channels": 48,
}
TINY = {
    "feat_channels": 32,
    "num_heads": 2,
    "num_queries": 5,
    "num_encoder_layers": 1,
    "num_decoder_layers": 3,
    "encoder_ffn_channels": 16,
    "decoder_ffn_channels": 16,
    "num_points": 32,
}


def part(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def complete(name):
    return load_file(Path(COMPLETE) / f"heads_{name}.safetensors")


@torch.no_grad()
def test_recorded_decoder_layer():
    tensors = part(load_golden("heads_mask2former")[1], "decoder.")
    head = DINOv3Mask2FormerHead([32] * 4, 6, **SMALL, num_decoder_layers=1).eval()
    ours = head_names("mask2former").to_ours(part(tensors, "sd."))
    missing, unexpected = head.load_state_dict(ours, strict=False)
    assert not unexpected and all(name.startswith("pixel_decoder.") for name in missing)
    # The first layer reads level 0; the others serve for their sizes only.
    levels = [tensors["in.multi_scale.0"], torch.zeros(1, 64, 4, 6), torch.zeros(1, 64, 8, 12)]
    head.pixel_decoder.forward = lambda x: (tensors["in.mask_features"], levels)
    logits, masks = head([torch.zeros(1, 32, 1, 1)] * 4)
    for index in (0, 1):
        assert_parity(logits[index], tensors[f"out.logits.{index}"])
        assert_parity(masks[index], tensors[f"out.masks.{index}"])


@needs_complete
@torch.no_grad()
def test_complete_recorded_vectors():
    tensors = complete("m2f")
    layers = {"num_encoder_layers": 2, "num_decoder_layers": 4}
    head = DINOv3Mask2FormerHead([32] * 4, 6, **SMALL, **layers).eval()
    head.load_state_dict(head_names("mask2former").to_ours(part(tensors, "sd.")))
    features = [tensors[f"in.f.{i}"] for i in (1, 2, 3, 4)]
    mask_features, levels = head.pixel_decoder(features)
    assert_parity(mask_features, tensors["out.mask_features"])
    for index, level in enumerate(levels):
        assert_parity(level, tensors[f"out.multi_scale.{index}"])
    logits, masks = head(features)
    for index in range(4):
        assert_parity(logits[index], tensors[f"out.aux_logits.{index}"])
    assert_parity(logits[-1], tensors["out.pred_logits"])
    assert_parity(masks[-1], tensors["out.pred_masks"])
    meta = {"img_shape": (64, 96), "pad_shape": (8, 8)}
    assert_parity(head.predict(features, [meta], {}), tensors["out.semantic"])


class ToyBackbone(nn.Module):
    """Passes images on: the toys of the recorded windows predict from pixels."""

    def forward(self, images):
        return images


class ToyHead(nn.Module):
    """The recorded toys: a convolution for logits, or for masks of fixed classes."""

    num_classes = out_channels = 4
    align_corners = False

    def __init__(self, tensors):
        super().__init__()
        self.tensors = tensors

    def predict(self, images, metas, test_cfg):
        size = tuple(metas[0]["img_shape"])
        name = "toy.q" if "toy.l" in self.tensors else "toy.c"
        maps = F.conv2d(
            images, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"], 4, padding=2
        )
        maps = F.interpolate(maps, size=size, mode="bilinear")
        if name == "toy.c":
            return maps
        logits = (self.tensors["toy.l"] + images.mean())[None]
        return semantic_map(logits, maps, torch.bfloat16).float()


def segmentor(tensors, monkeypatch, divisor=1):
    """The segmentor around a toy, in windows of 32 every 21."""
    for name, module in (("ToyBackbone", ToyBackbone()), ("ToyHead", ToyHead(tensors))):
        monkeypatch.setitem(MODELS._module_dict, name, lambda module=module, **_: module)
    return DINOv3PaddedEncoderDecoder(
        size_divisor=divisor,
        backbone={"type": "ToyBackbone"},
        decode_head={"type": "ToyHead"},
        test_cfg=Config({"mode": "slide", "crop_size": (32, 32), "stride": (21, 21)}),
    )


def meta(image):
    return [{"img_shape": tuple(image.shape[-2:]), "ori_shape": tuple(image.shape[-2:])}]


@needs_complete
@torch.no_grad()
def test_complete_recorded_windows(monkeypatch):
    tensors = complete("slide")
    toys = part(tensors, "sd.")
    linear = {name: tensor for name, tensor in toys.items() if name.startswith("toy.c")}
    for name, toy, image in (
        ("lin_slide", linear, "x"),
        ("lin_small", linear, "x_small"),
        ("lin_mixed", linear, "x_mixed"),
        ("m2f_slide", toys, "x"),
    ):
        image = tensors[f"in.{image}"]
        output = segmentor(toy, monkeypatch).inference(image, meta(image))
        assert_parity(output, tensors[f"out.{name}"])


def test_names_and_shapes_of_the_released_head():
    shapes = json.loads((ROOT / "tests/data/manifest_mask2former.json").read_text())
    with torch.device("meta"):
        head = DINOv3Mask2FormerHead([4096] * 4)
        official = {name: torch.empty(shape) for name, shape in shapes.items()}
    names = head_names("mask2former")
    ours = {name: tuple(t.shape) for name, t in names.to_ours(official).items()}
    assert ours == {name: tuple(t.shape) for name, t in head.state_dict().items()}
    adapter = head_names("mask2former_adapter").to_ours(official)
    count = sum(t.numel() for t in [*adapter.values(), *head.state_dict().values()])
    assert count == 927_454_817
    prefix = "segmentation_model.1."
    there_and_back = names.to_released(names.to_ours(official))
    assert set(there_and_back) == {name for name in shapes if name.startswith(prefix)}


@pytest.mark.parametrize(
    ("official", "ours"),
    [
        ("pixel_decoder.input_convs.2.0.bias", "pixel_decoder.input_convs.2.conv.bias"),
        ("pixel_decoder.input_convs.0.1.weight", "pixel_decoder.input_convs.0.gn.weight"),
        ("pixel_decoder.encoder.level_encoding", "pixel_decoder.level_encoding.weight"),
        (
            "pixel_decoder.encoder.encoder.layers.5.norm2.bias",
            "pixel_decoder.encoder.layers.5.norms.1.bias",
        ),
        (
            "pixel_decoder.encoder.encoder.layers.0.norm1.weight",
            "pixel_decoder.encoder.layers.0.norms.0.weight",
        ),
        (
            "pixel_decoder.encoder.encoder.layers.3.linear2.weight",
            "pixel_decoder.encoder.layers.3.ffn.layers.1.weight",
        ),
        ("pixel_decoder.lateral_convs.0.norm.bias", "pixel_decoder.lateral_convs.0.gn.bias"),
        ("pixel_decoder.output_convs.0.weight", "pixel_decoder.output_convs.0.conv.weight"),
        ("pixel_decoder.mask_feature.bias", "pixel_decoder.mask_feature.bias"),
    ],
)
def test_names_of_the_pixel_decoder(official, ours):
    tensor = {official: torch.zeros(1)}
    assert list(head_names("mask2former").to_ours(tensor)) == [ours]
    assert list(head_names("mask2former").to_released({ours: tensor[official]})) == [
        f"segmentation_model.1.{official}"
    ]


def test_head_file_comes_back_and_others_are_refused(tmp_path):
    head = redraw(DINOv3Mask2FormerHead([32] * 4, 6, **TINY), seed=1)
    path = export_head(head, tmp_path / "head.safetensors", kind="mask2former")
    init = {"type": "DINOv3HeadPretrained", "kind": "mask2former", "checkpoint": str(path)}
    again = DINOv3Mask2FormerHead([32] * 4, 6, **TINY, init_cfg=init)
    again.init_weights()
    for name, value in head.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(ValueError, match=r"num_classes\n.*cls_embed"):
        load_head(DINOv3Mask2FormerHead([32] * 4, 7, **TINY), path, kind="mask2former")
    with pytest.raises(ValueError, match="input_convs"):
        load_head(DINOv3Mask2FormerHead([48] * 4, 6, **TINY), path, kind="mask2former")


def features(channels=32):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(2, channels, 64 // s, 64 // s, generator=generator) for s in (4, 8, 16, 32)]


def sample(labels):
    result = SegDataSample(metainfo={"img_shape": (64, 64), "img_path": "one.png"})
    result.gt_sem_seg = PixelData(data=labels[None])
    return result


@pytest.mark.parametrize("second", [255, 3])
def test_images_without_labels_train(second):
    head = DINOv3Mask2FormerHead([32] * 4, 6, **TINY)
    head.init_weights()
    labels = [torch.full((64, 64), 255), torch.full((64, 64), second)]
    losses = head.loss(features(), [sample(label) for label in labels], {})
    total = sum(losses.values())
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(head.cls_embed.weight.grad).all()
    assert (losses["loss_mask"] > 0) == (second != 255)


def test_losses_under_autocast_are_float32():
    head = DINOv3Mask2FormerHead([32] * 4, 6, **TINY)
    head.init_weights()
    labels = torch.randint(0, 6, (64, 64))
    with torch.autocast("cpu", torch.bfloat16):
        losses = head.loss(features(), [sample(labels)] * 2, {})
    assert all(loss.dtype == torch.float32 for loss in losses.values())


@pytest.mark.parametrize("label", [6, -1])
def test_labels_without_a_class_are_refused(label):
    head = DINOv3Mask2FormerHead([32] * 4, 6, **TINY)
    wrong = torch.zeros(64, 64, dtype=torch.long)
    wrong[3, 4] = label
    with pytest.raises(ValueError, match=f"one.png has label {label}; expected 0 to 5 or 255"):
        head.loss(features(), [sample(wrong)] * 2, {})


def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"\[48, 48, 48, 48\] channels.*in_channels"):
        DINOv3Mask2FormerHead([32] * 4, 6, **TINY)(features(48))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"in_channels": [32] * 3}, "strides 4, 8, 16 and 32"),
        ({"num_classes": 0}, "at least 1"),
        ({"feat_channels": 48}, "multiple of the heads and of 32"),
        ({"semantic_dtype": "fp16"}, "one of"),
    ],
)
def test_wrong_arguments(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        DINOv3Mask2FormerHead(**{"in_channels": [32] * 4, "num_classes": 6, **TINY, **arguments})


def test_probabilities_in_bfloat16_hardly_change_a_map():
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(1, 100, 151, generator=generator)
    masks = 4 * torch.randn(1, 100, 32, 32, generator=generator)
    exact, rounded = (semantic_map(logits, masks, d) for d in (torch.float32, torch.bfloat16))
    assert (rounded.float() - exact).abs().max() < 2**-7 * exact.max()
    agreeing = (rounded.float().argmax(1) == exact.argmax(1)).float().mean()
    assert agreeing > 0.9


@pytest.mark.parametrize("size", ["683x512", "512x683", "500x500", "2100x1400"])
def test_scales_of_test_time_augmentation(size):
    """Sides as in the recorded ``tta_sizes_896``."""
    from mmcv.image import rescale_size

    cfg = Config.fromfile(ROOT / "configs/segmentation/mask2former_vit7b16_ade20k.py")
    scales = [step.scale for step in cfg.tta_pipeline[1].transforms[0]]
    first, second = map(int, size.split("x"))
    found = [list(rescale_size((first, second), scale)) for scale in scales]
    assert found == TTA_SIZES[size]


TTA_SIZES = {
    "683x512": [[1110, 832], [1153, 864], [1195, 896], [1254, 940], [1314, 985]],
    "512x683": [[832, 1110], [864, 1153], [896, 1195], [940, 1254], [985, 1314]],
    "500x500": [[832, 832], [864, 864], [896, 896], [940, 940], [985, 985]],
    "2100x1400": [[1248, 832], [1296, 864], [1344, 896], [1410, 940], [1478, 985]],
}


@torch.no_grad()
@pytest.mark.parametrize(("size", "window"), [((40, 27), (32, 32)), ((9, 70), (16, 32))])
def test_windows_of_any_size_are_padded_one_by_one(monkeypatch, size, window):
    generator = torch.Generator().manual_seed(0)
    toys = {
        "toy.c.weight": torch.randn(4, 3, 5, 5, generator=generator),
        "toy.c.bias": torch.randn(4, generator=generator),
    }
    sizes = []
    model = segmentor(toys, monkeypatch, divisor=16)
    model.backbone.register_forward_pre_hook(lambda m, args: sizes.append(args[0].shape[-2:]))
    image = torch.randn(1, 3, *size, generator=generator)
    output = model.inference(image, [{**meta(image)[0], "pad_shape": (64, 64)}])
    assert output.shape == (1, 4, *size)
    assert {tuple(given) for given in sizes} == {window}

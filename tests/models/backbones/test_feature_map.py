"""Networks of timm and of anyone as backbones: tokens, strides, initialisation, mistakes."""

import sys

import pytest
import timm
import torch
from mmengine.registry import MODELS
from torch import nn

from dinov3_mm.checkpoints import build_backbone, export_backbone
from dinov3_mm.models.backbones import FeatureMapBackbone, TimmBackbone
from tests.golden import assert_parity

# Name, further arguments, width, stride; a CNN, a map with channels last, two kinds of ViT.
CASES = [
    ("resnet10t", {}, 512, 32),
    ("swin_tiny_patch4_window7_224", dict(strict_img_size=False, depths=(1, 1, 1, 1)), 768, 32),
    ("vit_tiny_patch16_224", dict(dynamic_img_size=True, depth=1), 192, 16),
    ("vit_base_patch16_siglip_224", dict(dynamic_img_size=True, depth=1), 768, 16),
]


def images(side: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "model_args", "width", "stride"), CASES)
@torch.no_grad()
def test_tokens_are_timms_features(name, model_args, width, stride):
    backbone = TimmBackbone(name, batch_norm="sync", model_args=model_args).eval()
    assert (backbone.embed_dims, backbone.token_stride) == (width, stride)
    tokens = backbone.forward_tokens(images())
    number = (64 // stride) ** 2
    assert tokens.cls.shape == (2, width) and tokens.patches.shape == (2, number, width)
    assert tokens.registers.shape == (2, 0, width)
    module = timm.create_model(name, num_classes=0, **model_args).eval()
    module.load_state_dict(backbone.foreign_module.state_dict(), strict=True)
    features = module.forward_features(images())
    if features.ndim == 3:
        has_cls = getattr(module, "cls_token", None) is not None
        patches = features[:, int(has_cls) :]
        cls = features[:, 0] if has_cls else patches.mean(1)
    else:
        channels_last = features if "swin" in name else features.movedim(1, -1)
        patches = channels_last.flatten(1, 2)
        cls = patches.mean(1)
    assert_parity(tokens.patches, patches)
    assert_parity(tokens.cls, cls)
    (featmap,) = backbone(images())
    assert_parity(featmap.flatten(2).mT, patches)


def test_a_list_of_crops_and_the_statistics_of_the_first():
    backbone = TimmBackbone("resnet10t", batch_norm="sync").train()
    backbone.init_weights()
    outputs = backbone.forward_tokens([images(), images(32)], [None, None])
    assert [output.patches.shape[1] for output in outputs] == [4, 1]
    first = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    fresh = TimmBackbone("resnet10t", batch_norm="sync").train()
    fresh.load_state_dict(dict(backbone.named_parameters()), strict=False)
    fresh.forward_tokens([images()])
    for name, buffer in fresh.named_buffers():
        assert_parity(buffer.float(), first[name].float())


def test_init_weights_follows_the_seed():
    backbone = TimmBackbone("resnet10t", batch_norm="group")
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        backbone.init_weights()
        states.append(backbone.module.conv1[0].weight.clone())
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_any_module_or_config():
    convolution = nn.Conv2d(4, 6, 16, 16)
    backbone = FeatureMapBackbone(convolution, in_channels=4)
    assert (backbone.embed_dims, backbone.token_stride, backbone.patch_size) == (6, 16, 16)
    tokens = backbone.forward_tokens(torch.randn(1, 4, 32, 48))
    assert tokens.patches.shape == (1, 6, 6)
    built = FeatureMapBackbone(
        dict(type="DINOv3ConvNeXt", arch=dict(depths=[1, 1, 1, 1], dims=[4, 8, 12, 16]))
    )
    assert (built.embed_dims, built.token_stride) == (16, 32)


def test_it_builds_without_storage():
    with torch.device("meta"):
        backbone = MODELS.build(dict(type="TimmBackbone", name="resnet10t", batch_norm="sync"))
    assert backbone.token_stride == 32


def test_mistakes(monkeypatch):
    with pytest.raises(ValueError, match=r"no model 'resnet10x'; did you mean"):
        TimmBackbone("resnet10x")
    with pytest.raises(ValueError, match=r"gives a tensor of shape \(1, 5\); expected a feature"):
        FeatureMapBackbone(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"TimmBackbone needs timm: pip install"):
        TimmBackbone("resnet10t")


@pytest.mark.parametrize(
    "cfg",
    [
        dict(type="TimmBackbone", name="resnet10t", batch_norm="sync"),
        dict(
            type="FeatureMapBackbone",
            module=dict(type="DINOv3ConvNeXt", arch=dict(depths=[1, 1, 1, 1], dims=[4, 8, 12, 16])),
        ),
    ],
    ids=lambda cfg: cfg["type"],
)
@torch.no_grad()
def test_exports_are_built_again(tmp_path, cfg):
    torch.manual_seed(0)
    backbone = MODELS.build(cfg)
    backbone.init_weights()
    for parameter in backbone.parameters():
        parameter.uniform_(-0.5, 1.5)
    path = export_backbone(backbone, tmp_path / "export.safetensors")
    again = build_backbone(path)
    expected, actual = backbone.eval().forward_tokens(images()), again.forward_tokens(images())
    assert torch.equal(actual.cls, expected.cls) and torch.equal(actual.patches, expected.patches)
    with pytest.raises(TypeError, match="cannot be changed"):
        build_backbone(path, in_channels=4)

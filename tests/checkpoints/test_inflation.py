"""First layers for other channel counts: the promise of each rule, and where it is asked for."""

import pytest
import torch
from safetensors.torch import save_file

from dinov3_mm.checkpoints import (
    DINOv3Pretrained,
    build_backbone,
    export_backbone,
    load_backbone_weights,
    read_metadata,
    read_statistics,
    to_hf,
)
from dinov3_mm.checkpoints.install import RULES, inflate_kernels
from dinov3_mm.models.backbones import DINOv2ViT, DINOv3ConvNeXt
from tests.checkpoints.toys import assert_same_tensors, redraw, tensors_of, toy_backbone
from tests.golden import assert_parity

CHANNELS = (1, 2, 3, 4, 5, 6, 8, 13)
RGB = {"statistics": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}}


@pytest.fixture
def weights(tmp_path):
    """A three-channel toy and its exported file."""
    backbone = toy_backbone()
    return backbone, export_backbone(backbone, tmp_path / "rgb_lvd1689m.safetensors", RGB)


def inflated(path, channels, rule):
    backbone = toy_backbone(seed=1, in_channels=channels)
    return backbone, load_backbone_weights(backbone, path, inflate=rule)


def normalised(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def features(backbone, images):
    with torch.no_grad():
        tokens = backbone.forward_tokens(images)
    return torch.cat([tokens.cls[:, None], tokens.patches], dim=1)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("rule", ["mean", "repeat"])
def test_grey_images_keep_their_features(weights, channels, rule):
    rgb, path = weights
    grey = normalised(2, 1, 32, 32)
    expected = features(rgb, grey.expand(-1, 3, -1, -1))
    backbone, _ = inflated(path, channels, rule)
    assert_parity(features(backbone, grey.expand(-1, channels, -1, -1)), expected)
    # Colour does matter, so the property is one of grey images.
    assert (features(rgb, normalised(2, 3, 32, 32)) - expected).abs().max() > 0.1


@pytest.mark.parametrize("channels", [4, 5, 8])
def test_zero_ignores_the_channels_beyond_rgb(weights, channels):
    rgb, path = weights
    images = normalised(2, channels, 32, 32)
    backbone, _ = inflated(path, channels, "zero")
    assert_parity(features(backbone, images), features(rgb, images[:, :3]))
    other, _ = inflated(path, channels, "append_mean")
    assert (features(other, images) - features(rgb, images[:, :3])).abs().max() > 0.1
    blank = torch.cat([images[:, :3], torch.zeros_like(images[:, 3:])], dim=1)
    assert_parity(features(other, blank), features(rgb, images[:, :3]))


def test_appended_channels_see_the_mean_of_the_kernels():
    kernels = torch.tensor([1.0, 2.0, 6.0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert inflate_kernels(kernels, 5, "append_mean")[1, :, 0, 0].tolist() == [1, 2, 6, 3, 3]
    assert inflate_kernels(kernels, 5, "zero")[1, :, 0, 0].tolist() == [1, 2, 6, 0, 0]
    assert inflate_kernels(kernels, 4, "mean")[1, :, 0, 0].tolist() == [2.25] * 4
    assert inflate_kernels(kernels, 6, "repeat")[1, :, 0, 0].tolist() == [0.5, 1, 3] * 2
    assert inflate_kernels(kernels, 4, "repeat")[1, :, 0, 0].tolist() == [0.5, 2, 6, 0.5]
    assert inflate_kernels(kernels, 2, "repeat")[1, :, 0, 0].tolist() == [7, 2]
    for rule in ("mean", "repeat"):
        assert inflate_kernels(kernels, 1, rule)[1, :, 0, 0].tolist() == [9]
    half = inflate_kernels(kernels.bfloat16(), 4, "mean")
    assert half.dtype == torch.bfloat16 and half.is_contiguous()


@pytest.mark.parametrize("rule", RULES)
def test_equal_channels_change_nothing(weights, rule):
    rgb, path = weights
    backbone = toy_backbone(seed=1)
    report = load_backbone_weights(backbone, path, inflate=rule)
    assert_same_tensors(backbone.state_dict(), rgb.state_dict())
    assert "inflated" not in str(report)


def test_the_report_says_what_was_done(weights):
    _, report = inflated(weights[1], 8, "repeat")
    assert "patch_embed.proj.weight inflated from 3 to 8 channels (repeat)" in str(report)
    assert report.num_loaded == report.num_tensors


def test_without_a_rule_the_refusal_names_the_option(weights):
    backbone = toy_backbone(seed=1, in_channels=4)
    before = tensors_of(backbone)
    with pytest.raises(ValueError, match=r"for 3 image channels, the backbone for 4 .* inflate='m"):
        load_backbone_weights(backbone, weights[1])
    assert_same_tensors(backbone.state_dict(), before)
    # Another difference is not one of channels.
    with pytest.raises(ValueError) as caught:
        load_backbone_weights(toy_backbone(patch_size=4), weights[1])
    assert "inflate" not in str(caught.value)


@pytest.mark.parametrize("rule", ["zero", "append_mean"])
def test_rules_that_keep_kernels_do_not_drop_any(weights, rule):
    backbone = toy_backbone(seed=1, in_channels=1)
    before = tensors_of(backbone)
    with pytest.raises(ValueError, match=r"only 1 channels; use 'mean' or 'repeat'"):
        load_backbone_weights(backbone, weights[1], inflate=rule)
    assert_same_tensors(backbone.state_dict(), before)


def test_unknown_rules(weights):
    for call in (
        lambda: load_backbone_weights(toy_backbone(), "absent.pth", inflate="means"),
        lambda: DINOv3Pretrained("absent.pth", inflate="means"),
        lambda: inflate_kernels(torch.zeros(2, 3, 4, 4), 4, "means"),
    ):
        with pytest.raises(ValueError, match=r"inflate is 'means'; .* did you mean 'mean'"):
            call()


def test_every_way_in(weights, tmp_path):
    rgb, path = weights
    expected, _ = inflated(path, 4, "mean")
    built = build_backbone(path, in_channels=4, inflate="mean")
    assert_same_tensors(built.state_dict(), expected.state_dict())
    initialised = toy_backbone(
        seed=2,
        in_channels=4,
        init_cfg=dict(type="DINOv3Pretrained", checkpoint=str(path), inflate="mean"),
    )
    initialised.init_weights()
    assert_same_tensors(initialised.state_dict(), expected.state_dict())
    hf = tmp_path / "hf.safetensors"
    save_file(to_hf(rgb.state_dict()), hf)
    exact, _ = inflated(hf, 4, "mean")
    weight = exact.patch_embed.proj.weight
    assert torch.equal(weight, expected.patch_embed.proj.weight)
    with pytest.raises(ValueError, match="adapts weights; give weights"):
        build_backbone("dinov3_vits16", in_channels=4, inflate="mean")


@pytest.mark.parametrize(
    ("backbone", "arch"),
    [
        (DINOv3ConvNeXt, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
        (DINOv2ViT, {"embed_dims": 32, "num_layers": 2, "num_heads": 2}),
    ],
)
def test_other_families(backbone, arch, tmp_path):
    rgb = redraw(backbone(arch=arch))
    path = export_backbone(rgb, tmp_path / "rgb.safetensors")
    grey = normalised(2, 1, 56, 56)
    expected = features(rgb, grey.expand(-1, 3, -1, -1))
    built = build_backbone(path, in_channels=5, inflate="repeat")
    assert_parity(features(built, grey.expand(-1, 5, -1, -1)), expected)
    with pytest.raises(ValueError, match="give inflate='mean'"):
        build_backbone(path, in_channels=5)


def test_exports_do_not_claim_statistics_of_other_channels(weights, tmp_path):
    backbone, _ = inflated(weights[1], 4, "mean")
    with pytest.raises(ValueError, match="do not fit 4 image channels"):
        export_backbone(backbone, tmp_path / "a.safetensors", RGB)
    silent = export_backbone(backbone, tmp_path / "four_lvd1689m.safetensors")
    assert read_metadata(silent)["statistics"] is None
    with pytest.raises(ValueError, match="does not state its input normalisation"):
        read_statistics(silent)
    assert "statistics unknown" in str(load_backbone_weights(backbone, silent))
    own = {"statistics": {"mean": [0.1, 0.2, 0.3, 0.4], "std": [0.2] * 4}}
    stated = export_backbone(backbone, tmp_path / "b.safetensors", own)
    assert read_statistics(stated).mean == (0.1, 0.2, 0.3, 0.4)
    rebuilt = build_backbone(stated)
    assert_same_tensors(rebuilt.state_dict(), backbone.state_dict())

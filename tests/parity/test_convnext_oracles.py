"""DINOv3ConvNeXt against the implementations in transformers and timm."""

import pytest
import timm
import torch
from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel

from dinov3_mm.models.backbones import DINOv3ConvNeXt
from tests.golden import assert_parity
from tests.parity.backbone_oracles import redraw

TOY = {"depths": [2, 1, 3, 2], "dims": [12, 20, 28, 36]}
SIZES = [(64, 96), (75, 101), (32, 32), (33, 191)]


def _model(**changes) -> DINOv3ConvNeXt:
    torch.manual_seed(0)
    return redraw(DINOv3ConvNeXt(arch={**TOY, **changes}))


def _part(model: torch.nn.Module, name: str, weights: dict[str, torch.Tensor]) -> None:
    model.get_submodule(name).load_state_dict(weights)


def to_transformers(model: DINOv3ConvNeXt) -> DINOv3ConvNextModel:
    """``DINOv3ConvNextModel`` with the weights of ``model``, module by module."""
    settings = model.arch_settings
    config = DINOv3ConvNextConfig(
        hidden_sizes=settings["dims"],
        depths=settings["depths"],
        num_channels=settings["in_channels"],
    )
    peer = redraw(DINOv3ConvNextModel(config))
    root = "model.stages" if hasattr(peer, "model") else "stages"
    names = {
        "dwconv": "depthwise_conv",
        "norm": "layer_norm",
        "pwconv1": "pointwise_conv1",
        "pwconv2": "pointwise_conv2",
    }
    for stage, blocks in enumerate(model.stages):
        for layer in range(2):
            weights = model.downsample_layers[stage][layer].state_dict()
            _part(peer, f"{root}.{stage}.downsample_layers.{layer}", weights)
        for index, block in enumerate(blocks):
            place = f"{root}.{stage}.layers.{index}"
            for ours, theirs in names.items():
                _part(peer, f"{place}.{theirs}", getattr(block, ours).state_dict())
            peer.get_submodule(place).gamma.data.copy_(block.gamma)
    _part(peer, "layer_norm", model.norm.state_dict())
    return peer


def to_timm(model: DINOv3ConvNeXt, **kwargs) -> torch.nn.Module:
    """timm's DINOv3 ConvNeXt with the weights of ``model``, module by module."""
    settings = model.arch_settings
    peer = timm.create_model(
        "convnext_tiny.dinov3_lvd1689m",
        pretrained=False,
        depths=settings["depths"],
        dims=settings["dims"],
        in_chans=settings["in_channels"],
        num_classes=0,
        **kwargs,
    )
    redraw(peer)
    names = {"dwconv": "conv_dw", "norm": "norm", "pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2"}
    for stage, blocks in enumerate(model.stages):
        for layer in range(2):
            weights = model.downsample_layers[stage][layer].state_dict()
            place = f"stages.{stage}.downsample.{layer}" if stage else f"stem.{layer}"
            _part(peer, place, weights)
        for index, block in enumerate(blocks):
            place = f"stages.{stage}.blocks.{index}"
            for ours, theirs in names.items():
                weights = getattr(block, ours).state_dict()
                shapes = peer.get_submodule(f"{place}.{theirs}").state_dict()
                weights = {key: value.view_as(shapes[key]) for key, value in weights.items()}
                _part(peer, f"{place}.{theirs}", weights)
            peer.get_submodule(place).gamma.data.copy_(block.gamma)
    _part(peer, "head.norm", model.norm.state_dict())
    return peer


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("channels", [3, 5])
def test_transformers(size, channels):
    model = _model(in_channels=channels)
    image = torch.randn(2, channels, *size)
    expected = to_transformers(model)(image, output_hidden_states=True)
    output = model.forward_tokens(image)
    assert_parity(torch.cat((output.cls[:, None], output.patches), 1), expected.last_hidden_state)
    assert_parity(output.cls, expected.pooler_output)
    model.out_indices, model.final_norm = (0, 1, 2, 3), False
    for ours, theirs in zip(model(image), expected.hidden_states[1:], strict=True):
        assert_parity(ours, theirs)


def test_transformers_gradients():
    model = _model()
    peer = to_transformers(model)
    image, weight = torch.randn(2, 3, 64, 96), torch.randn(2, 7, 36)
    output = model.forward_tokens(image)
    tokens = torch.cat((output.cls[:, None], output.patches), dim=1)
    (tokens * weight).sum().backward()
    (peer(image).last_hidden_state * weight).sum().backward()
    ours = {tuple(p.shape): [] for p in model.parameters()}
    theirs = {shape: [] for shape in ours}
    for groups, module in ((ours, model), (theirs, peer)):
        for parameter in module.parameters():
            groups[tuple(parameter.shape)].append(parameter.grad)
    for shape, grads in ours.items():
        # Sums over parameters of one shape do not depend on how the two name and order them.
        scale = max(1.0, max(g.abs().max().item() for g in grads))
        actual, expected = (torch.stack(g).double().square().sum(0) for g in (grads, theirs[shape]))
        assert_parity(actual / scale**2, expected / scale**2)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("conv_mlp", [False, True])
def test_timm(size, conv_mlp):
    model = _model()
    peer = to_timm(model, conv_mlp=conv_mlp)
    image = torch.randn(2, 3, *size)
    output = model.forward_tokens(image)
    featmap = peer.forward_features(image)
    assert_parity(output.prenorm, featmap.flatten(2).mT)
    assert_parity(output.cls, peer(image))


@torch.no_grad()
def test_timm_full_size():
    model = redraw(DINOv3ConvNeXt("tiny"))
    image = torch.randn(1, 3, 96, 128)
    assert_parity(model.forward_tokens(image).cls, to_timm(model)(image))


@torch.no_grad()
def test_bf16_model_is_as_close_to_fp32_as_the_peer():
    model = _model()
    peer = to_transformers(model)
    image = torch.randn(4, 3, 64, 96)
    exact = model.forward_tokens(image).patches
    ours = model.to(torch.bfloat16).forward_tokens(image.bfloat16()).patches
    theirs = peer.to(torch.bfloat16)(image.bfloat16()).last_hidden_state[:, 1:]
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().mean() < 1.2 * (theirs - exact).abs().mean()

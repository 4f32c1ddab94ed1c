"""Layer-wise decay in a host's model: rates of the layers, what is decayed, what is frozen."""

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper
from torch import nn

import dinov3_mm  # noqa: F401  (registers the constructor)
from dinov3_mm.engine.optim.layer_decay import convnext_layers_above
from dinov3_mm.models.backbones import DINOv3ConvNeXt
from tests.checkpoints.toys import toy_backbone

LR, DECAY = 0.1, 0.5


class Model(nn.Module):
    """A backbone, perhaps inside an adapter, with a head of every kind of parameter."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.neck = nn.Sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))
        self.query = nn.Parameter(torch.zeros(1, 2, 4))
        self.embed = nn.Embedding(3, 4)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.backbone = inner


def build(model, *, weight_decay=0.05, **paramwise):
    optimizer = {"type": "AdamW", "lr": LR, "weight_decay": weight_decay}
    cfg = {
        "type": "OptimWrapper",
        "constructor": "LayerDecayOptimConstructor",
        "optimizer": optimizer,
        "paramwise_cfg": {"layerwise_decay": DECAY, **paramwise},
    }
    return build_optim_wrapper(model, cfg)


def by_name(wrapper):
    return {
        name: group for group in wrapper.optimizer.param_groups for name in group["param_names"]
    }


def vit(**arguments):
    return toy_backbone(num_registers=2, **arguments)  # two blocks


def convnext(**arguments):
    return DINOv3ConvNeXt(arch={"depths": [1, 2, 7, 1], "dims": [4, 8, 16, 32]}, **arguments)


@pytest.mark.parametrize("wrap", [nn.Identity, Wrapper])
def test_learning_rate_falls_layer_by_layer(wrap):
    inner = wrap(vit()) if wrap is Wrapper else vit()
    prefix = "backbone.backbone." if wrap is Wrapper else "backbone."
    groups = by_name(build(Model(inner), patch_embed_lr_mult=0.2, head_lr_mult=3.0))
    expected = {
        "norm.weight": 1,
        "blocks.1.attn.qkv.weight": DECAY,
        "blocks.0.mlp.fc1.bias": DECAY**2,
        "cls_token": DECAY**3,
        "storage_tokens": DECAY**3,
        "patch_embed.proj.weight": DECAY**3 * 0.2,
    }
    assert {name: groups[prefix + name]["lr"] / LR for name in expected} == pytest.approx(expected)
    assert groups["neck.0.weight"]["lr"] == pytest.approx(3 * LR)
    assert set(groups) == {name for name, _ in Model(inner).named_parameters()}


def test_only_matrices_and_kernels_are_decayed():
    model = Model(vit())
    groups = by_name(build(model, weight_decay=0.05))
    decayed = {name for name, group in groups.items() if group["weight_decay"] == 0.05}
    linears = {
        f"{name}.weight"
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    }
    assert decayed == linears
    assert {groups[name]["weight_decay"] for name in set(groups) - decayed} == {0}


def test_convnext_layers():
    depths = [3, 3, 27, 3]
    layers = {
        "norm.weight": 0,
        "stages.3.2.pwconv1.weight": 1,
        "downsample_layers.3.1.weight": 1,
        "stages.2.26.gamma": 2,
        "stages.2.24.gamma": 2,
        "stages.2.23.gamma": 3,
        "stages.2.0.gamma": 10,
        "downsample_layers.2.0.weight": 10,
        "stages.1.0.dwconv.weight": 11,
        "downsample_layers.1.0.weight": 11,
        "stages.0.0.dwconv.weight": 12,
        "downsample_layers.0.0.weight": 13,
    }
    assert {name: convnext_layers_above(name, depths) for name in layers} == layers


def test_convnext_in_a_model():
    groups = by_name(build(Model(convnext()), patch_embed_lr_mult=0.2))
    # Layers: stem, stages 0 and 1, three groups of stage 2, stage 3, norm.
    assert groups["backbone.downsample_layers.0.0.weight"]["lr"] == pytest.approx(
        LR * 0.2 * DECAY**7
    )
    assert groups["backbone.stages.2.6.norm.weight"]["lr"] == pytest.approx(LR * DECAY**2)
    assert groups["backbone.downsample_layers.0.1.weight"]["weight_decay"] == 0
    assert groups["backbone.stages.0.0.dwconv.weight"]["weight_decay"] == 0.05


def test_frozen_parameters_are_left_out():
    groups = by_name(build(Model(vit(frozen_stages=1))))
    names = {name for name in groups if name.startswith("backbone")}
    assert names and all(name.startswith(("backbone.blocks.1", "backbone.norm")) for name in names)
    model = Model(vit(frozen_stages=2))
    wrapper = build(model)
    assert not any(name.startswith("backbone") for name in by_name(wrapper))
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    sum(p.sum() for p in model.parameters() if p.requires_grad).backward()
    wrapper.step()
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.backbone.state_dict().items())
    assert len(wrapper.optimizer.state) == len(by_name(wrapper))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        build(model)


def test_custom_keys_take_the_longest_match():
    groups = by_name(
        build(
            Model(vit()),
            custom_keys={"neck": {"lr_mult": 0.1}, "neck.1": {"lr_mult": 2, "decay_mult": 0.5}},
        )
    )
    assert groups["neck.0.weight"]["lr"] == pytest.approx(LR * 0.1)
    assert groups["neck.0.weight"]["weight_decay"] == 0.05
    assert groups["neck.0.bias"]["weight_decay"] == 0
    assert groups["neck.1.weight"]["lr"] == pytest.approx(LR * 2)
    assert groups["neck.1.weight"]["weight_decay"] == pytest.approx(0.025)


def test_unwraps_data_parallel_and_compiled_blocks():
    class Wrapped(MMDistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    plain = by_name(build(Model(vit())))
    model = Model(vit())
    model.backbone.blocks[0] = torch.compile(model.backbone.blocks[0])
    wrapped = by_name(build(Wrapped(model)))
    assert {n: g["lr"] for n, g in wrapped.items()} == {n: g["lr"] for n, g in plain.items()}


@pytest.mark.parametrize(
    ("paramwise", "message"),
    [
        ({"layer_decay": 0.9}, "no setting 'layer_decay'.*layerwise_decay"),
        ({"layerwise_decay": "0.9"}, "must be a number"),
        ({"layerwise_decay": -1}, "must be a number >= 0"),
        ({"custom_keys": {"neck": {"lr_mul": 1}}}, "did you mean 'lr_mult'"),
        ({"custom_keys": {"nekc": {"lr_mult": 1}}}, "no trainable parameter has 'nekc'"),
    ],
)
def test_bad_settings_are_refused(paramwise, message):
    with pytest.raises(ValueError, match=message):
        build(Model(vit()), **paramwise)


def test_a_model_without_our_backbone_is_refused():
    with pytest.raises(ValueError, match="no backbone of this package"):
        build(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="needs optimizer"):
        build_optim_wrapper(
            Model(vit()),
            {"constructor": "LayerDecayOptimConstructor", "optimizer": {"type": "AdamW"}},
        )

"""The optimizer that the constructor builds: groups, names, kernels, errors."""

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import build_optim_wrapper

from dinov3_mm.engine.optim import PretrainOptimWrapper, param_multipliers
from tests.engine.optim.models import ToyModel


def build(model, paramwise_cfg=None, **wrapper):
    optimizer = wrapper.pop("optimizer", {"type": "AdamW", "lr": 1e-3})
    cfg = {"type": "PretrainOptimWrapper", "optimizer": optimizer, **wrapper}
    return build_optim_wrapper(
        model, {**cfg, "constructor": "PretrainOptimConstructor", "paramwise_cfg": paramwise_cfg}
    )


def by_name(wrapper):
    return {
        name: group for group in wrapper.optimizer.param_groups for name in group["param_names"]
    }


def test_every_student_parameter_is_in_one_group_and_the_teacher_in_none():
    model = ToyModel()
    wrapper = build(model)
    params = [p for group in wrapper.optimizer.param_groups for p in group["params"]]
    assert len(params) == len({id(p) for p in params})
    assert {id(p) for p in params} == {id(p) for p in model.student.parameters()}
    assert set(by_name(wrapper)) == {name for name, _ in model.student.named_parameters()}


def test_groups_hold_multipliers_and_sub_modules():
    groups = by_name(build(ToyModel(), {"layerwise_decay": 0.5, "patch_embed_lr_mult": 0.2}))
    assert groups["backbone.norm.weight"]["lr_multiplier"] == 1
    assert groups["backbone.blocks.1.mlp.weight"]["lr_multiplier"] == 0.5
    assert groups["backbone.blocks.0.mlp.weight"]["lr_multiplier"] == 0.25
    assert groups["backbone.cls_token"]["lr_multiplier"] == 0.125
    assert groups["backbone.patch_embed.0.weight"]["lr_multiplier"] == 0.125 * 0.2
    assert groups["backbone.cls_token"]["wd_multiplier"] == 1
    assert groups["backbone.norm.weight"]["wd_multiplier"] == 0
    assert groups["dino_head.last_layer.weight"]["is_last_layer"]
    assert not groups["dino_head.mlp.weight"]["is_last_layer"]
    assert groups["dino_head.mlp.weight"]["submodule"] == "dino_head"


def test_dino_head_weight_decay_multiplier_reaches_the_dino_head_only():
    groups = by_name(build(ToyModel(), {"dino_head_wd_multiplier": 0.5}))
    assert groups["dino_head.mlp.weight"]["wd_multiplier"] == 0.5
    assert groups["dino_head.last_layer.weight"]["wd_multiplier"] == 0.5
    assert groups["dino_head.mlp.bias"]["wd_multiplier"] == 0
    assert groups["ibot_head.mlp.weight"]["wd_multiplier"] == 1
    assert groups["backbone.cls_token"]["wd_multiplier"] == 1


def test_frozen_parameters_are_left_out():
    model = ToyModel()
    model.student["backbone"].requires_grad_(False)
    assert {group["submodule"] for group in build(model).optimizer.param_groups} == {
        "dino_head",
        "ibot_head",
    }
    model.student.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        build(model)


def test_names_lose_the_fragments_of_wrappers():
    model = ToyModel()
    model.student["backbone"].blocks[0] = torch.compile(model.student["backbone"].blocks[0])
    assert "backbone.blocks.0.mlp.weight" in by_name(build(model))


def test_fused_kernel_unless_the_config_says_otherwise():
    wrapper = build(ToyModel())
    assert isinstance(wrapper, PretrainOptimWrapper)
    assert wrapper.optimizer.defaults["fused"] is True
    with pytest.raises(TypeError, match="fused=True"):
        build(ToyModel(), optimizer={"type": "AdamW", "fused": False})
    with pytest.raises(TypeError, match="fused=True"):
        build(ToyModel(), optimizer={"type": "RMSprop"})


def test_unwraps_data_parallel():
    class Wrapped(MMDistributedDataParallel):
        def __init__(self, module):
            torch.nn.Module.__init__(self)
            self.module = module

    assert len(by_name(build(Wrapped(ToyModel())))) == len(by_name(build(ToyModel())))


@pytest.mark.parametrize(
    ("paramwise", "message"),
    [
        ({"layerwise_decai": 0.9}, "did you mean 'layerwise_decay'"),
        ({"patch_embed_lr_mult": "0.2"}, "must be a number"),
        ({"layerwise_decay": -1}, "must be a number >= 0"),
    ],
)
def test_bad_settings_are_refused(paramwise, message):
    with pytest.raises(ValueError, match=message):
        build(ToyModel(), paramwise)


def test_model_without_student_is_refused():
    with pytest.raises(ValueError, match=r"model\.student, Linear has none"):
        build(torch.nn.Linear(2, 2))


def test_convolutional_backbone_has_no_layer_decay():
    found = param_multipliers("stages.0.0.dwconv.weight", depth=0, layerwise_decay=0.5)
    assert (found.lr_multiplier, found.wd_multiplier) == (1, 1)

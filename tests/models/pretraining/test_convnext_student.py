"""A ConvNeXt in the algorithm: seen patches, stride 32, Gram on its own grid."""

import numpy as np
import pytest
import torch

from dinov3_mm.datasets.collate import mask_tensors
from dinov3_mm.engine.optim import build_param_groups
from dinov3_mm.models.pretraining import DINOv3

from .test_dinov3 import optimizer_for
from .toy import HEAD, build_toy, prepared

BACKBONE = dict(
    type="DINOv3ConvNeXt",
    arch=dict(depths=[1, 1, 2, 1], dims=[8, 16, 24, 32]),
    layer_scale_init_value=1.0,
)


def build(**settings) -> DINOv3:
    torch.manual_seed(0)
    model = DINOv3(dict(BACKBONE), HEAD, HEAD, **{"mask_student": False, **settings})
    model.init_weights()
    return model


def batch(images: int = 3, gram: bool = False) -> dict:
    """128 px global crops (16 positions), 64 px local (4), 192 px Gram crops (36)."""
    rng = np.random.default_rng(0)

    def crops(count, size):
        return torch.from_numpy(rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8))

    masks = np.zeros((2 * images, 16), bool)
    masks[:images] = rng.random((images, 16)) < 0.4
    result = dict(
        global_crops=crops(2 * images, 128),
        local_crops=crops(2 * images, 64),
        **mask_tensors(masks),
    )
    return {**result, "gram_crops": crops(2 * images, 192)} if gram else result


def test_a_step_trains_every_parameter():
    model = build()
    model.set_step(teacher_temp=0.04)
    wrapper = optimizer_for(model)
    before = {name: param.clone() for name, param in model.student.named_parameters()}
    for _ in range(2):
        logs = model.train_step(batch(), wrapper)
    assert all(value.isfinite() for value in logs.values())
    still = [
        name for name, param in model.student.named_parameters() if torch.equal(param, before[name])
    ]
    assert still == []
    groups = build_param_groups(model.student.backbone, "backbone", layerwise_decay=0.5)
    assert {group["lr_multiplier"] for group in groups} == {1.0}


def test_the_ibot_term_is_evaluated_at_the_masked_positions():
    model = build()
    model.set_step(teacher_temp=0.04)
    data = batch()
    first = model.loss(prepared(model, data))["ibot_loss"]
    data["masks"] = data["masks"].roll(1, 1)
    moved = {**data, **mask_tensors(data["masks"].numpy())}
    assert first != model.loss(prepared(model, moved))["ibot_loss"]


@torch.no_grad()
def test_gram_tokens_come_to_the_students_grid():
    model = build(gram=dict())
    model.set_step(teacher_temp=0.04)
    model.copy_teacher_to_gram()
    inputs = prepared(model, batch(gram=True))
    loss = model.loss(inputs)["gram_loss"]
    tokens = model.gram_teacher.backbone.forward_tokens(inputs["gram_crops"]).patches
    grid = tokens.transpose(1, 2).unflatten(2, (6, 6))
    small = torch.nn.functional.interpolate(grid, (4, 4), mode="bicubic", align_corners=False)
    student = model.student.backbone.forward_tokens(inputs["global_crops"]).patches
    pairs = [torch.nn.functional.normalize(x, dim=-1) for x in (student, small.flatten(2).mT)]
    expected = ((pairs[0] @ pairs[0].mT - pairs[1] @ pairs[1].mT) ** 2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-7)


def test_masking_a_backbone_that_cannot_be_masked_is_refused():
    with pytest.raises(ValueError, match=r"DINOv3ConvNeXt has no mask token.*mask_student=False"):
        build(mask_student=True)
    assert build_toy(mask_student=True).mask_student

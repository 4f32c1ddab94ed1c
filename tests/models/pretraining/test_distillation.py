"""Distillation models: what is compared with what, what is refused, what is saved."""

import copy

import pytest
import torch

from dinov3_mm.datasets.collate import mask_tensors
from dinov3_mm.models.pretraining import DINOv3, MultiDistillation
from dinov3_mm.models.pretraining.distillation import downsample

from .test_convnext_student import BACKBONE as CONVNEXT
from .test_convnext_student import batch as stride_32_batch
from .test_dinov3 import optimizer_for
from .toy import BACKBONE, HEAD, prepared, toy_batch

STUDENT_HEAD = dict(type="DINOv3Head", hidden_dims=20, bottleneck_dims=12)
RESNET = dict(type="TimmBackbone", name="resnet10t", batch_norm="sync")


def teacher_config(**changes) -> dict:
    return {
        "backbone": dict(BACKBONE),
        "dino_head": dict(HEAD),
        "ibot_head": {**HEAD, "num_prototypes": 20},
        **changes,
    }


def build(backbone: dict | None = None, *, ready: bool = True, **settings) -> DINOv3:
    torch.manual_seed(0)
    settings = {"distillation": teacher_config(), **settings}
    model = DINOv3(dict(backbone or BACKBONE), STUDENT_HEAD, STUDENT_HEAD, **settings)
    model.init_weights()
    if ready:
        model.distillation_teacher.load("random")
    model.set_step(teacher_temp=0.04)
    return model


def test_prototypes_are_the_teachers():
    model = build()
    assert model.student["dino_head"].num_prototypes == 24
    assert model.student["ibot_head"].num_prototypes == 20
    with pytest.raises(ValueError, match=r"dino_head: the student has 8 prototypes.*teacher 24"):
        DINOv3(
            dict(BACKBONE),
            {**STUDENT_HEAD, "num_prototypes": 8},
            STUDENT_HEAD,
            distillation=teacher_config(),
        )


def test_a_step_moves_the_student_only():
    model = build()
    wrapper = optimizer_for(model)
    before = copy.deepcopy(model)
    model.train_step(toy_batch(), wrapper)
    model.update_teacher(0.5)
    for name, moves in (("student", True), ("teacher", True), ("distillation_teacher", False)):
        pairs = zip(getattr(model, name).parameters(), getattr(before, name).parameters())
        assert any(not torch.equal(*pair) for pair in pairs) == moves, name
    assert not model.distillation_teacher.training and model.student.training


def test_the_student_sees_all_patches():
    model = build()
    batch = prepared(model, toy_batch())
    hidden = {**batch, "masks": torch.zeros_like(batch["masks"])}
    assert not model.mask_student
    torch.manual_seed(0)
    first = model.loss(batch)
    torch.manual_seed(0)
    assert torch.equal(first["ibot_loss"], model.loss(hidden)["ibot_loss"])


def test_the_teachers_crops_are_smaller_by_the_ratio_of_strides():
    model = build(CONVNEXT, distillation=teacher_config(resolution_scale=4.0))
    assert model.resolution_scale == 4.0
    seen = []
    model.distillation_teacher["backbone"].patch_embed.register_forward_pre_hook(
        lambda _, args: seen.append([images.shape for images in args[0]])
    )
    losses = model.loss(prepared(model, stride_32_batch()))
    assert losses["loss"].isfinite()
    assert seen == [[(6, 3, 32, 32)]]


def test_downsampling_is_an_antialiased_mean_field():
    ramp = torch.arange(16.0).expand(1, 1, 16, 16)
    small = downsample(ramp, 2.0)
    assert small.shape == (1, 1, 8, 8)
    torch.testing.assert_close(small[0, 0, 0, 1:-1], torch.arange(8.0)[1:-1] * 2 + 0.5)
    assert downsample(ramp, 1.0) is ramp
    assert downsample(torch.zeros(1, 1, 224, 224), 16 / 14).shape[-1] == 196
    with pytest.raises(ValueError, match=r"\(16, 16\) pixels divided by 3 are no whole number"):
        downsample(ramp, 3.0)


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"32 pixels apart.*teacher's 8: only 4 gives both"):
        build(CONVNEXT, distillation=teacher_config(resolution_scale=2.0))
    model = build(CONVNEXT)
    batch = stride_32_batch()
    batch.update(mask_tensors(torch.zeros(6, 25, dtype=torch.bool).numpy()))
    with pytest.raises(ValueError, match=r"gives 16 patch tokens.*the masks have 25"):
        model.loss(prepared(model, batch))


def test_a_teacher_without_weights_does_not_teach():
    with pytest.raises(RuntimeError, match=r"no weights: add dict\(type='DistillationHook'"):
        model = build(ready=False)
        model.loss(prepared(model, toy_batch()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(gram=dict()), "no Gram term"),
        (dict(distillation=dict(backbone=BACKBONE, dino_heads=1)), "did you mean 'dino_head'"),
        (dict(distillation=dict(backbone=BACKBONE)), "teacher's dino_head and ibot_head"),
    ],
)
def test_contradictions(settings, message):
    with pytest.raises(ValueError, match=message):
        build(**settings)


def test_the_teacher_is_no_part_of_the_state():
    model = build()
    state = model.state_dict()
    assert {key.split(".")[0] for key in state} == {"student", "teacher"}
    assert not model.load_state_dict(state, strict=True).missing_keys
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({k: v for k, v in state.items() if "student" not in k})


def test_diagnostics_are_the_students():
    model = build(dict(BACKBONE, arch=dict(embed_dims=16, num_layers=1, num_heads=2)))
    model.collect_diagnostics = True
    losses = model.loss(prepared(model, toy_batch()))
    assert losses["diag/teacher_entropy_max"] == torch.tensor(24.0).log()
    assert 1 <= losses["diag/feature_rank"] <= 6


def test_batch_norm_only_under_a_frozen_teacher_and_synced():
    model = build(RESNET)
    model.train_step(stride_32_batch(), optimizer_for(model))
    model.update_teacher(0.25)
    running = [
        network["backbone"].module.bn1.running_mean for network in (model.student, model.teacher)
    ]
    torch.testing.assert_close(running[1], 0.75 * running[0])
    with pytest.raises(ValueError, match=r"SyncedBatchNorm2d: batch norm.*batch_norm='group'"):
        DINOv3(dict(RESNET), dict(HEAD), dict(HEAD), mask_student=False)
    with pytest.raises(ValueError, match=r"is a BatchNorm2d: batch norm"):
        build({**RESNET, "batch_norm": None})
    DINOv3({**RESNET, "batch_norm": "frozen"}, dict(HEAD), dict(HEAD), mask_student=False)


def multi(students: dict, **settings) -> MultiDistillation:
    heads = dict(dino_head=STUDENT_HEAD, ibot_head=STUDENT_HEAD)
    model = MultiDistillation(teacher_config(), students, student=heads, **settings)
    model.init_weights()
    return model


def test_students_take_the_shared_arguments_and_their_own():
    model = multi(
        dict(
            a=dict(backbone=BACKBONE, ranks=(0, 3)),
            b=dict(backbone=CONVNEXT, dino_head=dict(hidden_dims=8), koleo=dict(weight=0.5)),
        ),
        compute_dtype="bf16",
    )
    assert model.students["a"].student["dino_head"].mlp[0].out_features == 20
    assert model.students["b"].student["dino_head"].mlp[0].out_features == 8
    assert model.students["b"].koleo["weight"] == 0.5
    assert model.students["a"].compute_dtype == "bf16"
    assert model.strides == {"a": 8, "b": 32} and not model.is_grouped
    assert not any("distillation" in key for key in model.state_dict())


@pytest.mark.parametrize(
    ("students", "message"),
    [
        ({}, "at least one student"),
        ({"a.b": dict(backbone=BACKBONE)}, "'a.b' cannot be the name"),
        ({"a": dict(backbone=BACKBONE, gram=dict())}, "student 'a': gram is the same for all"),
        ({"a": dict(backbone=BACKBONE, kolea=1)}, "student 'a': .*kolea"),
    ],
)
def test_bad_students(students, message):
    with pytest.raises((ValueError, TypeError), match=message):
        multi(students)


def test_forward_says_how_to_train():
    with pytest.raises(RuntimeError, match="MultiDistillationStrategy"):
        multi(dict(a=dict(backbone=BACKBONE)))({}, mode="loss")

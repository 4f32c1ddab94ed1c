"""Several frozen teachers of one student: what adds up, what is apart, what is refused."""

import copy

import pytest
import torch

from dinov3_mm.models.pretraining import DINOv3, MultiDistillation
from dinov3_mm.models.pretraining.diagnostics import diagnose

from .test_convnext_student import BACKBONE as CONVNEXT
from .test_convnext_student import batch as stride_32_batch
from .test_dinov3 import optimizer_for
from .test_distillation import STUDENT_HEAD, teacher_config
from .test_distillation import build as build_single
from .toy import BACKBONE, HEAD, prepared, toy_batch

TERMS = ("dino_local_loss", "dino_global_loss", "ibot_loss")
WIDE = dict(BACKBONE, arch=dict(embed_dims=48, num_layers=1, num_heads=2))
OTHER = teacher_config(backbone=WIDE, dino_head={**HEAD, "num_prototypes": 40})


def build(teachers: dict, backbone: dict = BACKBONE, *, ready: bool = True, **settings) -> DINOv3:
    torch.manual_seed(0)
    model = DINOv3(
        dict(backbone), STUDENT_HEAD, STUDENT_HEAD, distillation=dict(teachers=teachers), **settings
    )
    model.init_weights()
    if ready:
        model.distillation_teacher.load("random")
    model.set_step(teacher_temp=0.04)
    return model


def tie(model: DINOv3, single: DINOv3) -> None:
    """Backbone, heads and teachers of ``single``, for every teacher."""
    model.student["backbone"].load_state_dict(single.student["backbone"].state_dict())
    for name, teacher in model.distillation_teacher.items():
        for part in ("dino_head", "ibot_head"):
            model.student[part][name].load_state_dict(single.student[part].state_dict())
        for part, module in teacher.items():
            module.load_state_dict(single.distillation_teacher[part].state_dict())


def grads(model: DINOv3, batch: dict) -> tuple[dict, dict]:
    """Losses, and the gradient of each parameter of the student."""
    torch.manual_seed(1)
    losses = model.loss(batch)
    model.zero_grad()
    losses["loss"].backward()
    return losses, {
        n: p.grad.clone() for n, p in model.student.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("prototype_chunk_size", [None, 7])
def test_twice_the_same_teacher_is_that_teacher(prototype_chunk_size):
    """Halves of equal losses add up; each head has half of the gradient, the backbone all."""
    chunks = dict(prototype_chunk_size=prototype_chunk_size)
    single = build_single(**chunks)
    model = build(dict(a=teacher_config(weight=0.5), b=teacher_config()), **chunks)
    assert model.distillation_teacher.weights == {"a": 0.5, "b": 0.5}
    tie(model, single)
    batch = prepared(model, toy_batch())
    expected, expected_grads = grads(single, batch)
    losses, own = grads(model, batch)
    for key, value in expected.items():
        torch.testing.assert_close(losses[key], value, rtol=1e-6, atol=1e-7)
    for name in "ab":
        for term in TERMS:
            torch.testing.assert_close(losses[f"teacher/{name}/{term}"], expected[term])
    for key, value in expected_grads.items():
        network, rest = key.split(".", 1)
        if network == "backbone":
            torch.testing.assert_close(own[key], value, rtol=1e-4, atol=1e-6)
        else:
            for name in "ab":
                torch.testing.assert_close(
                    own[f"{network}.{name}.{rest}"], value / 2, rtol=1e-4, atol=1e-7
                )


def test_losses_and_gradients_are_linear_in_the_weights():
    """Against single distillations: terms by weight, KoLeo once."""
    weights = dict(a=0.7, b=2.0)
    teachers = dict(a=teacher_config(weight=0.7), b={**OTHER, "weight": 2.0})
    model = build(teachers)
    batch = prepared(model, toy_batch())
    losses, own = grads(model, batch)
    total, koleo = 0.0, 0.2 * losses["koleo_loss"]
    backbone_grads = {}
    for name, settings in (("a", teacher_config()), ("b", OTHER)):
        single = build_single(distillation=settings, koleo=dict(weight=0.0))
        single.student["backbone"].load_state_dict(model.student["backbone"].state_dict())
        for part in ("dino_head", "ibot_head"):
            single.student[part].load_state_dict(model.student[part][name].state_dict())
        teacher = model.distillation_teacher[name]
        for part, module in teacher.items():
            single.distillation_teacher[part].load_state_dict(module.state_dict())
        expected, expected_grads = grads(single, batch)
        for term in TERMS:
            torch.testing.assert_close(losses[f"teacher/{name}/{term}"], expected[term])
        total = total + weights[name] * expected["loss"]
        for key, value in expected_grads.items():
            network, rest = key.split(".", 1)
            if network == "backbone":
                backbone_grads[key] = backbone_grads.get(key, 0) + weights[name] * value
            else:
                torch.testing.assert_close(
                    own[f"{network}.{name}.{rest}"], weights[name] * value, rtol=1e-4, atol=1e-6
                )
    torch.testing.assert_close(losses["loss"], total + koleo, rtol=1e-6, atol=0)
    model.koleo["weight"] = 0.0
    _, without_koleo = grads(model, batch)
    for key, value in backbone_grads.items():
        torch.testing.assert_close(without_koleo[key], value, rtol=1e-4, atol=1e-6)


def test_each_teacher_has_prototypes_and_a_scale_of_its_own():
    coarse = teacher_config(backbone=dict(BACKBONE, patch_size=16))
    model = build(dict(fine=OTHER, coarse=coarse), CONVNEXT)
    assert model.resolution_scale == {"fine": 4.0, "coarse": 2.0}
    heads = model.student["dino_head"]
    assert {n: head.num_prototypes for n, head in heads.named_children()} == {
        "fine": 40,
        "coarse": 24,
    }
    losses = model.train_step(stride_32_batch(), optimizer_for(model))
    assert losses["loss"].isfinite()
    assert losses["teacher/fine/ibot_loss"] != losses["teacher/coarse/ibot_loss"]


def test_teachers_are_frozen_and_no_part_of_the_state():
    model = build(dict(a=teacher_config(), b=OTHER))
    before = copy.deepcopy(model)
    model.train_step(toy_batch(), optimizer_for(model))
    model.update_teacher(0.5)
    pairs = zip(model.distillation_teacher.parameters(), before.distillation_teacher.parameters())
    assert all(torch.equal(*pair) for pair in pairs)
    state = model.state_dict()
    assert {key.split(".")[0] for key in state} == {"student", "teacher"}
    assert not model.load_state_dict(state, strict=True).missing_keys
    assert len(model.distillation_teacher.fingerprint()) == 6
    a, b = (
        build(dict(a=teacher_config(), b=teacher_config())).distillation_teacher[n] for n in "ab"
    )
    assert any(not torch.equal(*pair) for pair in zip(a.parameters(), b.parameters()))


def test_diagnostics_of_each():
    model = build(dict(a=teacher_config(), b=OTHER))
    model.collect_diagnostics = True
    losses = model.loss(prepared(model, toy_batch()))
    assert losses["diag/a/teacher_entropy_max"] == torch.tensor(24.0).log()
    assert losses["diag/b/teacher_entropy_max"] == torch.tensor(40.0).log()
    probs = {"a": torch.eye(4), "b": torch.full((4, 4), 0.25)}
    found = diagnose(torch.randn(4, 8), torch.randn(4, 2, 8), probs)
    assert found["diag/prototype_usage"] == (1 + 0.25) / 2
    assert found["diag/b/prototype_usage"] == 0.25


@pytest.mark.parametrize(
    ("teachers", "message"),
    [
        ({}, "names each teacher"),
        ([1], "names each teacher"),
        ({"a.b": OTHER}, "'a.b' cannot be the name of a teacher"),
        ({"keys": OTHER}, "'keys' cannot be the name of a teacher"),
        ({"a": {**OTHER, "weight": 0}}, "teacher 'a': weight must be positive, got 0"),
        ({"a": {**OTHER, "wait": 1}}, "teacher 'a': distillation has no setting 'wait'"),
        ({"a": dict(backbone=BACKBONE)}, "teacher 'a': .*dino_head and ibot_head"),
        ({"a": {**OTHER, "resolution_scale": 2.0}}, "teacher 'a': resolution_scale=2.0"),
    ],
)
def test_bad_teachers(teachers, message):
    with pytest.raises(ValueError, match=message):
        build(teachers)


def test_what_does_not_go_together():
    with pytest.raises(ValueError, match="teachers and also backbone, which belongs to one"):
        build_single(distillation=dict(teachers=dict(a=OTHER), backbone=BACKBONE))
    with pytest.raises(ValueError, match="teacher 'b': dino_head: the student has 24 prototypes"):
        head = {**STUDENT_HEAD, "num_prototypes": 24}
        DINOv3(
            dict(BACKBONE),
            head,
            STUDENT_HEAD,
            distillation=dict(teachers=dict(a=teacher_config(), b=OTHER)),
        )
    with pytest.raises(ValueError, match="several students have one teacher"):
        MultiDistillation(dict(teachers=dict(a=OTHER)), dict(s=dict(backbone=BACKBONE)))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("x.pth", r"a file each: checkpoint=dict\(first=FILE, second=FILE\), got 'x.pth'"),
        (
            dict(first="random", secnd="random"),
            "no teacher is called 'secnd'; did you mean 'second'",
        ),
        (dict(first="random"), "no file for the teachers second"),
    ],
)
def test_files_that_are_not_one_for_each(files, message):
    model = build(dict(first=OTHER, second=OTHER), ready=False)
    with pytest.raises(ValueError, match=message):
        model.distillation_teacher.load(files)
    with pytest.raises(RuntimeError, match="the distillation teacher has no weights"):
        model.loss(prepared(model, toy_batch()))

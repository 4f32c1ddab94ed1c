"""One whole training iteration of a tiny model against the reference vectors."""

import pytest
import torch

from tests.golden import assert_parity

from .ssl_cases import (
    DESCRIPTION,
    GRAD_TOLERANCE,
    LOG_KEYS,
    LOSS_TOLERANCE,
    OPTIMIZER,
    SCALARS,
    STEP_TOLERANCE,
    TENSORS,
    VARIANTS,
    build_model,
    optimizer_wrapper,
    run_losses,
    whole_batch,
)


def test_every_variant_is_tested():
    assert {name for name in SCALARS if name.startswith("variant")} == VARIANTS.keys() - {"main"}


@pytest.mark.parametrize("prototype_chunk_size", [None, 7])
@pytest.mark.parametrize("name", VARIANTS)
def test_losses(name, prototype_chunk_size):
    expected = SCALARS[name]
    model = build_model(**VARIANTS[name], prototype_chunk_size=prototype_chunk_size)
    losses = run_losses(model, expected)
    assert losses.keys() == LOG_KEYS.keys()
    for ours, theirs in LOG_KEYS.items():
        assert_parity(losses[ours], torch.tensor(expected[theirs]), LOSS_TOLERANCE)


def test_views_of_teacher_student_and_gram_teacher():
    model = build_model()
    model.set_step(teacher_temp=DESCRIPTION["config"]["teacher_temp"])
    batch = whole_batch()
    with torch.no_grad():
        teacher, student = model._run_teacher(batch), model._run_student(batch)
        gram = model._gram_targets(teacher, batch)
    for actual, name in (
        (teacher.cls.unflatten(0, (2, 4)), "teacher_out.cls_pre_head"),
        (teacher.patches.unflatten(0, (2, 4))[:, :2], "teacher_out.patch_pre_head_first2"),
        (teacher.cls_targets.unflatten(0, (2, 4)), "teacher_out.cls_centered"),
        (teacher.patch_targets, "teacher_out.masked_patch_centered"),
        (student.global_cls.unflatten(0, (2, 4)), "student_global.cls_pre_head"),
        (student.patches.unflatten(0, (2, 4))[:, :2], "student_global.patch_pre_head_first2"),
        (student.global_scores.unflatten(0, (2, 4)), "student_global.cls_after_head"),
        (student.local_scores.unflatten(0, (4, 4)), "student_local.cls_after_head"),
        (student.patch_scores, "student_global.masked_patch_after_head"),
        (gram[:2], "gram_out.teacher_patches_resized_first2"),
    ):
        assert_parity(actual, TENSORS[name])


@pytest.mark.parametrize("prototype_chunk_size", [None, 7])
def test_gradients(prototype_chunk_size):
    model = build_model(prototype_chunk_size=prototype_chunk_size)
    run_losses(model, SCALARS["main"])["loss"].backward()
    grads = {name: p.grad for name, p in model.student.named_parameters()}
    stored = [key.removeprefix("grad.") for key in TENSORS if key.startswith("grad.")]
    assert len(stored) > 10
    for name in stored:
        assert_parity(grads[name], TENSORS[f"grad.{name}"], GRAD_TOLERANCE)
    norms = SCALARS["grad_norm_all_params"]
    assert norms.keys() == grads.keys()
    for name, norm in norms.items():
        assert_parity(grads[name].norm(), torch.tensor(norm), GRAD_TOLERANCE)
    assert all(p.grad is None for p in model.teacher.parameters())
    assert all(p.grad is None for p in model.gram_teacher.parameters())


@pytest.mark.parametrize("as_tensor", [False, True])
def test_parameters_after_clip_adamw_and_ema(as_tensor):
    model = build_model()
    wrapper = optimizer_wrapper(model)
    loss, _ = model.parse_losses(run_losses(model, SCALARS["main"]))
    wrapper.update_params(loss)
    momentum = OPTIMIZER["ema_momentum"]
    model.update_teacher(torch.tensor(momentum) if as_tensor else momentum)
    for name, norm in SCALARS["grad_norms_before_clip"].items():
        assert_parity(wrapper.step_metrics[f"grad_norm/{name}"], torch.tensor(norm), 1e-4)
    for branch in ("student", "teacher"):
        params = dict(getattr(model, branch).named_parameters())
        for name, norm in SCALARS["after_param_norms"][branch].items():
            assert_parity(params[name].norm(), torch.tensor(norm), STEP_TOLERANCE)
        prefix = f"after.{branch}."
        for key in (key for key in TENSORS if key.startswith(prefix)):
            actual = params[key.removeprefix(prefix)]
            assert_parity(actual, TENSORS[key], STEP_TOLERANCE)

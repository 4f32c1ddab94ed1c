"""The Gram teacher's life: empty, loaded, copied, live, saved and restored."""

import pytest
import torch

from dinov3_mm.checkpoints import export_backbone
from dinov3_mm.models.losses import gram_loss
from tests.golden import assert_parity

from .toy import build_toy, prepared, toy_batch


def losses_of(model, *, gram_crops: bool = True, **step):
    model.set_step(teacher_temp=0.05, **step)
    return model(prepared(model, toy_batch(gram=gram_crops)), mode="loss")


def perturb(module) -> None:
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.add_(0.1 * torch.rand_like(tensor.float()))


def test_empty_teacher_may_not_count():
    model = build_toy(gram=dict(weight=2.0))
    assert not model.gram_teacher_ready
    with pytest.raises(
        RuntimeError, match=r"weight 2.0 but its teacher has no weights.*GramAnchor"
    ):
        losses_of(model)
    with pytest.raises(RuntimeError, match="GramAnchorHook"):
        losses_of(model, gram_weight=torch.tensor(0.0))  # a device value is not read
    losses = losses_of(model, gram_weight=0.0)
    assert losses["gram_loss"].item() == losses["gram_weight"].item() == 0


def test_weight_comes_from_the_config_until_a_hook_sets_it():
    model = build_toy(gram=dict(weight=2.0))
    model.copy_teacher_to_gram()
    perturb(model.gram_teacher.backbone)
    base, gram = (losses_of(model)[key].item() for key in ("loss", "gram_loss"))
    assert gram > 1e-4
    changed = losses_of(model, gram_weight=5.0)
    assert changed["gram_weight"].item() == 5
    assert changed["loss"].item() - base == pytest.approx(3 * gram, rel=1e-3)
    off = losses_of(model, gram_weight=0.0)  # a ready teacher is compared even at weight 0
    assert off["gram_loss"].item() == pytest.approx(gram, rel=1e-5)


def test_copy_takes_parameters_and_buffers():
    model = build_toy(gram=dict())
    perturb(model.teacher.backbone)
    model.copy_teacher_to_gram()
    assert model.gram_teacher_ready
    copied = model.gram_teacher.backbone.state_dict()
    original = model.teacher.backbone.state_dict()
    assert all(torch.equal(copied[key], value) for key, value in original.items())
    perturb(model.teacher.backbone)
    assert not torch.equal(copied["cls_token"], model.teacher.backbone.cls_token)


def test_load_from_export_and_from_state_dict(tmp_path):
    source = build_toy()
    perturb(source.teacher)
    path = tmp_path / "teacher.safetensors"
    statistics = dict(mean=[0.5] * 3, std=[0.2] * 3)
    export_backbone(source.teacher_backbone, path, dict(statistics=statistics, provenance={}))
    model = build_toy(gram=dict())
    assert str(path) in model.load_gram_teacher(path)
    assert model.gram_teacher_ready
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = source.teacher_backbone.forward_tokens(images).patches
        assert_parity(model.gram_teacher.backbone.forward_tokens(images).patches, expected)

    other = build_toy(gram=dict())
    other.load_gram_teacher(source.teacher_backbone.state_dict())
    assert torch.equal(other.gram_teacher.backbone.cls_token, source.teacher_backbone.cls_token)
    with pytest.raises(ValueError, match="do not fit the Gram teacher"):
        other.load_gram_teacher({"cls_token": torch.zeros(1)})
    narrow = build_toy(gram=dict(), backbone=dict(patch_size=16))
    with pytest.raises(ValueError, match="do not fit"):
        narrow.load_gram_teacher(path)
    assert not narrow.gram_teacher_ready


def test_readiness_survives_a_resume():
    model = build_toy(gram=dict())
    model.copy_teacher_to_gram()
    resumed = build_toy(gram=dict())
    resumed.load_state_dict(model.state_dict())
    assert resumed.gram_teacher_ready
    empty = build_toy(gram=dict())
    assert not empty.gram_teacher_ready
    resumed.load_state_dict(empty.state_dict())
    assert not resumed.gram_teacher_ready
    # A stage that adds the Gram term resumes a state without its teacher.
    absent = resumed.load_state_dict(build_toy().state_dict(), strict=False)
    assert all(key.startswith("gram_teacher.") for key in absent.missing_keys)
    assert not resumed.gram_teacher_ready


def test_live_teacher_uses_the_students_crops():
    model = build_toy(gram=dict(teacher="ema"))
    perturb(model.teacher)
    assert model.gram_teacher_ready and not hasattr(model, "gram_teacher")
    inputs = prepared(model, toy_batch())
    losses = losses_of(model, gram_crops=False)
    with torch.no_grad():
        student = model.student.backbone.forward_tokens(inputs["global_crops"], inputs["masks"])
        teacher = model.teacher_backbone.forward_tokens(inputs["global_crops"])
        expected = gram_loss(student.patches, teacher.patches)
    assert_parity(losses["gram_loss"], expected)
    with pytest.raises(ValueError, match="no Gram teacher of its own"):
        model.copy_teacher_to_gram()


@pytest.mark.parametrize("teacher, gram_crops", [("frozen", False), ("ema", True)])
def test_crops_must_suit_the_teacher(teacher, gram_crops):
    model = build_toy(gram=dict(teacher=teacher))
    if teacher == "frozen":
        model.copy_teacher_to_gram()
    with pytest.raises(ValueError, match="a frozen Gram teacher needs its own crops"):
        losses_of(model, gram_crops=gram_crops)


def test_model_without_gram_term():
    model = build_toy()
    assert not model.gram_teacher_ready and model.gram is None
    assert not any("gram" in key for key in losses_of(model, gram_crops=False))

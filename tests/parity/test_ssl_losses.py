"""Losses and heads against the reference vectors (values and gradients)."""

import pytest
import torch

from dinov3_mm.models.losses import (
    dino_loss,
    gram_loss,
    ibot_loss,
    koleo_loss,
    resize_tokens,
    sinkhorn_knopp,
)
from dinov3_mm.models.pretraining import DINOv3Head
from tests.golden import assert_parity, load_golden

DESCRIPTION, TENSORS = load_golden("ssl_losses")
SCALARS = DESCRIPTION["scalars"]


def leaf(name: str) -> torch.Tensor:
    return TENSORS[name].clone().requires_grad_()


def assert_scalar(loss: torch.Tensor, name: str) -> None:
    assert loss.dtype == torch.float32
    assert_parity(loss, torch.tensor(SCALARS[name]))


@pytest.mark.parametrize(
    "kind, suffix, temp, iters",
    [
        ("cls", "temp0.04", 0.04, 3),
        ("cls", "temp0.07", 0.07, 3),
        ("cls", "temp0.07_iters1", 0.07, 1),
        ("cls", "temp0.07_iters0", 0.07, 0),
        ("patch", "temp0.07", 0.07, 3),
    ],
)
def test_sinkhorn(kind, suffix, temp, iters):
    logits = TENSORS[f"sk_{kind}.logits"].clone()
    probs = sinkhorn_knopp(logits, temp, num_iters=iters)
    assert_parity(probs, TENSORS[f"sk_{kind}.probs_{suffix}"])
    assert torch.equal(logits, TENSORS[f"sk_{kind}.logits"])


@pytest.mark.parametrize(
    "student, ignore, loss_name, grad_name",
    [
        ("student_global", True, "loss_global_ignore_diag", "grad_global_ignore_diag"),
        ("student_global", False, "loss_global_full", "grad_global_full"),
        ("student_local", False, "loss_local", "grad_local"),
    ],
)
def test_dino(student, ignore, loss_name, grad_name):
    logits = leaf(f"dino.{student}")
    loss = dino_loss(logits, TENSORS["dino.teacher_probs"], ignore_diagonal=ignore)
    loss.backward()
    assert_scalar(loss, f"dino.{loss_name}")
    assert_parity(logits.grad, TENSORS[f"dino.{grad_name}"])


def test_ibot():
    logits = leaf("ibot.student")
    num_images = len(TENSORS["ibot.masks"])
    loss = ibot_loss(
        logits, TENSORS["ibot.teacher_probs"], TENSORS["ibot.masks_weight"], num_images
    )
    loss.backward()
    assert_scalar(loss, "ibot.loss")
    assert_parity(logits.grad, TENSORS["ibot.grad"])


@pytest.mark.parametrize(
    "name, options",
    [
        ("koleo", {}),
        ("koleo_dist_world1.topk1", dict(distributed=True)),
        ("koleo_dist_world1.topk3", dict(distributed=True, topk=3)),
    ],
)
def test_koleo(name, options):
    features = leaf("koleo.x")
    loss = koleo_loss(features, **options)
    loss.backward()
    assert_scalar(loss, f"{name}.loss")
    assert_parity(features.grad, TENSORS[f"{name}.grad"])


def test_koleo_averages_leading_axes():
    crops = torch.stack([TENSORS["koleo.x"], TENSORS["koleo.x"].flip(1) * 2])
    expected = SCALARS["koleo.loss"]  # a permutation of the axes and the length change nothing
    assert_parity(koleo_loss(crops), torch.tensor(expected))


@pytest.mark.parametrize("image_level", [True, False])
@pytest.mark.parametrize(
    "normalized, remove_neg, only_teacher",
    [(n, r, t) for n in (1, 0) for r, t in ((0, 0), (1, 0), (0, 1))],
)
def test_gram(normalized, remove_neg, only_teacher, image_level):
    name = f"gram.norm{normalized}_removeneg{remove_neg}_onlyteacher{only_teacher}"
    name = f"{name}_img{int(image_level)}"
    student = leaf("gram.student")
    loss = gram_loss(
        student,
        TENSORS["gram.teacher"],
        normalized=bool(normalized),
        img_level=image_level,
        remove_neg=bool(remove_neg),
        remove_only_teacher_neg=bool(only_teacher),
    )
    loss.backward()
    assert_scalar(loss, f"{name}.loss")
    assert_parity(student.grad, TENSORS[f"{name}.grad"])


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
def test_resize(method, antialias):
    resized = resize_tokens(
        TENSORS["resize.in"], (8, 8), (4, 4), method=method, antialias=antialias
    )
    assert_parity(resized, TENSORS[f"resize.{method}_aa{int(antialias)}"])


def test_resize_nine_to_six():
    resized = resize_tokens(TENSORS["resize_9to6.in"], (9, 9), (6, 6))
    assert_parity(resized, TENSORS["resize_9to6.bicubic_aa0"])


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_head(layers):
    head = DINOv3Head(12, 40, hidden_dims=20, bottleneck_dims=9, num_layers=layers)
    prefix = f"head{layers}.sd."
    state = {key[len(prefix) :]: value for key, value in TENSORS.items() if key.startswith(prefix)}
    head.load_state_dict(state, strict=True)
    with torch.no_grad():
        features = head.project(TENSORS[f"head{layers}.in"])
        assert_parity(features, TENSORS[f"head{layers}.no_last"])
        assert_parity(head.last_layer(features), TENSORS[f"head{layers}.out"])
        assert_parity(head(TENSORS[f"head{layers}.in"]), TENSORS[f"head{layers}.out"])

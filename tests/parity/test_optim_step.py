"""Clipping, parameter groups and AdamW of one step against the reference's parameters after it."""

import torch
from torch import nn

from dinov3_mm.engine.optim import PretrainOptimConstructor
from tests.golden import load_golden, max_difference
from tests.parity.test_optim_param_groups import module_with

DESCRIPTION, TENSORS = load_golden("ssl_full_step")
PARTS = ("backbone", "dino_head", "ibot_head")


def student_with_gradients() -> nn.Module:
    """The reference's weights before the step, with its gradients.

    Where only the norm of a gradient is known, a constant gradient of that norm stands in.
    """
    scalars = DESCRIPTION["scalars"]
    model = nn.Module()
    model.student = nn.Module()
    for part in PARTS:
        prefix = f"{part}."
        norms = scalars["grad_norm_all_params"]
        names = [name.removeprefix(prefix) for name in norms if name.startswith(prefix)]
        model.student.add_module(part, module_with(names))
    for name, param in model.student.named_parameters():
        param.data = TENSORS[f"w.student.{name}"].clone()
        norm = scalars["grad_norm_all_params"][name]
        known = TENSORS.get(f"grad.{name}")
        param.grad = (
            torch.full_like(param, norm / param.numel() ** 0.5) if known is None else known.clone()
        )
    return model


def test_step_matches_the_reference():
    model = student_with_gradients()
    setting = DESCRIPTION["optimizer"]
    wrapper = PretrainOptimConstructor(
        {
            "type": "PretrainOptimWrapper",
            "optimizer": {"type": "AdamW", "betas": (0.9, 0.999)},
            "clip_grad": setting["clip_grad_per_submodule"],
        },
        {
            "layerwise_decay": setting["layerwise_decay"],
            "patch_embed_lr_mult": setting["patch_embed_lr_mult"],
        },
    )(model)
    for group in wrapper.optimizer.param_groups:
        lr = setting["last_layer_lr" if group["is_last_layer"] else "lr"]
        group["lr"] = lr * group["lr_multiplier"]
        group["weight_decay"] = setting["weight_decay"] * group["wd_multiplier"]
    wrapper.step()

    for part, norm in DESCRIPTION["scalars"]["grad_norms_before_clip"].items():
        assert abs(wrapper.step_metrics[f"grad_norm/{part}"].item() - norm) <= 1e-5 * norm
    after = dict(model.student.named_parameters())
    compared = 0
    for key, expected in TENSORS.items():
        name = key.removeprefix("after.student.")
        if key.startswith("after.student.") and f"grad.{name}" in TENSORS:
            assert max_difference(after[name], expected) <= 2e-5, name
            assert max_difference(expected, TENSORS[f"w.student.{name}"]) > 1e-4, name
            compared += 1
    assert compared >= 10

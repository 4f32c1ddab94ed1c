"""Schedules of every official recipe against reference samples, to 1e-12."""

import pytest

from dinov3_mm.engine.optim import build_schedule, scale_lr_schedule
from tests.golden import load_golden

DESCRIPTION, TENSORS = load_golden("ssl_schedules")
RECIPES = DESCRIPTION["recipes"]


def flat(value):
    return {"type": "warmup_cosine", "start": value, "peak": value, "end": value}


IMAGENET = {
    "lr": {"type": "cosine", "base": 0.001, "final": 1e-6, "warmup_iters": 12_500},
    "weight_decay": {"type": "cosine", "base": 0.04, "final": 0.4},
    "momentum": {"type": "cosine", "base": 0.992, "final": 1.0},
    "teacher_temp": {
        "type": "cosine",
        "base": 0.07,
        "final": 0.07,
        "start": 0.04,
        "warmup_iters": 37_500,
        "total_iters": 37_500,
    },
    "freeze": 1250,
}


def convnext(peak, decay):
    return {
        "lr": {
            "type": "warmup_cosine",
            "start": 1e-6,
            "peak": peak,
            "end": 1e-6,
            "warmup_iters": 100_000,
        },
        "weight_decay": {
            "type": "warmup_cosine",
            "start": decay,
            "peak": 0.2,
            "end": 0.2,
            "warmup_iters": 625_000,
        },
        "momentum": {"type": "linear", "start": 0.994, "end": 1.0},
        "teacher_temp": {
            "type": "warmup_cosine",
            "start": 0.04,
            "peak": 0.07,
            "end": 0.07,
            "warmup_iters": 150_000,
        },
        "freeze": 1250,
    }


EXPECTED = {
    "vit7b_pretrain": {
        "lr": {
            "type": "warmup_cosine",
            "start": 0,
            "peak": 5e-5,
            "end": 5e-5,
            "warmup_iters": 100_000,
        },
        "weight_decay": flat(0.04),
        "momentum": flat(0.994),
        "teacher_temp": {
            "type": "warmup_cosine",
            "start": 0.04,
            "peak": 0.07,
            "end": 0.07,
            "warmup_iters": 100_000,
        },
        "freeze": 5000,
    },
    "vit7b_gram": {
        "lr": {
            "type": "warmup_cosine",
            "start": 0,
            "peak": 3e-5,
            "end": 3e-5,
            "warmup_iters": 100_000,
        },
        "weight_decay": 0.04,
        "momentum": 0.999,
        "teacher_temp": {
            "type": "warmup_cosine",
            "start": 0.04,
            "peak": 0.07,
            "end": 0.07,
            "warmup_iters": 100_000,
        },
        "local_loss_weight": {
            "type": "warmup_cosine",
            "start": 1,
            "peak": 1,
            "end": 0.5,
            "warmup_iters": 1_000_000,
            "cosine_iters": 1000,
        },
        "gram_loss_weight": {
            "type": "warmup_cosine",
            "start": 0,
            "peak": 0,
            "end": 2.0,
            "warmup_iters": 1_000_000,
            "cosine_iters": 1000,
        },
        "freeze": 5000,
    },
    "vit7b_highres": {
        "lr": {
            "type": "warmup_cosine",
            "start": 0,
            "peak": 0,
            "end": 1.25e-5,
            "cosine_iters": 10_000,
        },
        "weight_decay": flat(0.04),
        "momentum": flat(0.999),
        "teacher_temp": flat(0.07),
        "local_loss_weight": {
            "type": "warmup_cosine",
            "start": 0.5,
            "peak": 0.5,
            "end": 0.5,
            "cosine_iters": 0,
        },
        "gram_loss_weight": {
            "type": "warmup_cosine",
            "start": 1.5,
            "peak": 1.5,
            "end": 1.5,
            "cosine_iters": 0,
        },
        "freeze": 0,
    },
    "vitl_im1k": IMAGENET,
    "multidist_test_vits": IMAGENET,
    "vitl_distilled_hrft": {
        "lr": {"type": "warmup_cosine", "start": 0, "peak": 0, "end": 5e-5, "cosine_iters": 12_500},
        "weight_decay": flat(0.04),
        "momentum": {"type": "warmup_cosine", "start": 0.994, "peak": 0.994, "end": 1.0},
        "teacher_temp": {"type": "warmup_cosine", "start": 0.04, "peak": 0.07, "end": 0.07},
        "freeze": 0,
    },
    "convnext_tiny_test": convnext(2e-4, 0.04),
    "convnext_small_test": convnext(2e-4, 0.04),
    "convnext_base_test": convnext(1e-4, 0.02),
    "convnext_large_test": convnext(1e-4, 0.04),
}

SAMPLED = sorted(
    name.removesuffix(".idx")
    for name in TENSORS
    if name.endswith(".idx") and not name.startswith(("v1_raw", "v2_raw"))
)


def sampled(name):
    return TENSORS[f"{name}.idx"].tolist(), TENSORS[f"{name}.val"].tolist()


def largest_difference(schedule, name):
    iterations, values = sampled(name)
    return max(abs(schedule(it) - value) for it, value in zip(iterations, values, strict=True))


@pytest.mark.parametrize("name", SAMPLED)
def test_recipe(name):
    recipe, quantity = name.split(".")
    setting = RECIPES[recipe]
    total_iters = setting["epochs"] * setting["epoch_length"]
    batch = setting["world_size"] * setting["batch_size_per_gpu"]
    key = "lr" if quantity == "last_layer_lr" else quantity
    cfg = EXPECTED[recipe][key]
    if key == "lr":
        cfg = scale_lr_schedule(cfg, "sqrt_wrt_1024", batch)
    schedule = build_schedule(cfg, total_iters=total_iters)
    freeze = EXPECTED[recipe]["freeze"] if quantity == "last_layer_lr" else 0
    assert largest_difference(lambda it: 0.0 if it < freeze else schedule(it), name) <= 1e-12
    after_end = RECIPES.get(f"{name}.final_value_after_end")
    if after_end is not None:
        assert schedule(total_iters) == after_end


@pytest.mark.parametrize(
    ("name", "cfg"),
    [
        ("v1_raw.trunc0.0", {"type": "cosine"}),
        ("v1_raw.trunc0.25", {"type": "cosine", "trunc_extra": 0.25}),
    ],
)
def test_cosine_with_freeze_warmup_and_truncation(name, cfg):
    cfg = dict(cfg, base=1.0, final=0.1, start=0.2, warmup_iters=10, freeze_iters=5)
    assert largest_difference(build_schedule(cfg, total_iters=100), name) <= 1e-12


@pytest.mark.parametrize(
    ("name", "cosine_iters"),
    [("v2_raw.full", None), ("v2_raw.cosine30", 30), ("v2_raw.cosine0", 0)],
)
def test_warmup_cosine_lengths(name, cosine_iters):
    cfg = {
        "type": "warmup_cosine",
        "start": 0.2,
        "peak": 1.0,
        "end": 0.1,
        "warmup_iters": 10,
        "cosine_iters": cosine_iters,
    }
    assert largest_difference(build_schedule(cfg, total_iters=100), name) <= 1e-12
